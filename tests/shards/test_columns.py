"""Columns in files that processes share: the same numbers, whatever happens to the files."""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import shards.columns as columns
from shards.build.build import build
from shards.cache import cache_root
from shards.columns import ColumnFiles
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.sample import DataSet
from shards.sample_table import SCHEMA, SampleTable
from shards.splits.draw import make_splits
from shards.splits.split import Protocol, load_split, write_split

NUMBERS = (
    "ok", "shard", "offset", "size", "width", "height", "mos", "mos_std", "group_key", "level",
    "sha256",
)  # fmt: skip


@pytest.fixture
def large(packed: ShardSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ShardSet:
    """A set whose twelve rows count as many."""
    monkeypatch.setattr("shards.sample_table.SHARED_FROM_ROWS", 1)
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    return open_set(packed.root)


def _folder(shard_set: ShardSet) -> Path:
    """Where the files of the set's table are; made by the first that asks."""
    assert shard_set.samples.files is not None
    return shard_set.samples.files._folder


def _is_mapped(array: np.ndarray) -> bool:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return isinstance(array.base, pa.Buffer) and not array.base.is_mutable


def test_every_column_of_numbers_is_mapped_and_equals_the_one_in_memory(large: ShardSet) -> None:
    plain = SampleTable(large.samples.path_of_file)
    for _ in range(2):
        table = open_set(large.root).samples
        for name in SCHEMA.names[1:]:
            mapped, private = getattr(table, name), getattr(plain, name)
            np.testing.assert_array_equal(mapped, private)
            assert mapped.dtype == private.dtype
            assert _is_mapped(mapped) == (name in NUMBERS), name
            assert not mapped.flags.writeable
        np.testing.assert_array_equal(table.ids(), plain.ids())
        assert _is_mapped(table.ids())
    assert [table.row(k) for k in range(12)] == [plain.row(k) for k in range(12)]


def test_nothing_is_ever_written_to_the_folder_of_a_set(large: ShardSet, tmp_path: Path) -> None:
    before = sorted(str(path) for path in Path(large.root).rglob("*"))
    (drawn,) = make_splits(large, repeats=1)
    assert large.samples.mos.size
    assert drawn.train.size
    assert sorted(str(path) for path in Path(large.root).rglob("*")) == before
    assert list((tmp_path / "cache").rglob("mos.arrow"))


def test_a_small_set_has_no_files(
    packed: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    assert open_set(packed.root).samples.mos.size
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LMCL_CACHE": "{tmp}/a", "XDG_CACHE_HOME": "{tmp}/b"}, "a"),
        ({"XDG_CACHE_HOME": "{tmp}/b"}, "b/lmcl"),
        ({"XDG_CACHE_HOME": "relative"}, ".cache/lmcl"),
        ({}, ".cache/lmcl"),
    ],
)
def test_the_cache_is_where_the_user_wants_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("LMCL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    assert cache_root() == tmp_path / expected


def test_where_nothing_can_be_written_columns_are_kept_in_memory_and_a_warning_says_so(
    large: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_bytes(b"in the way")
    with caplog.at_level(logging.WARNING):
        mos = open_set(large.root).samples.mos
    np.testing.assert_array_equal(mos, SampleTable(large.samples.path_of_file).mos)
    assert "set LMCL_CACHE" in caplog.text


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "longer", "another type"])
def test_a_damaged_file_is_made_anew(large: ShardSet, how: str) -> None:
    expected = large.samples.mos.copy()
    path = _folder(large) / "mos.arrow"
    whole = path.read_bytes()
    if how in ("longer", "another type"):
        values = np.zeros(*((13, np.float64) if how == "longer" else (12, np.float32)))
        columns._write(path, values)
    else:
        contents = {
            "cut": whole[:-8],
            "empty": b"",
            "garbage": bytes(len(whole)),
        }
        path.unlink()
        path.write_bytes(contents[how])
    again = open_set(large.root).samples.mos
    np.testing.assert_array_equal(again, expected)
    assert path.read_bytes() == whole


def test_a_set_built_anew_is_not_answered_from_old_files(
    large: ShardSet, table: Callable[..., DataSet], tmp_path: Path
) -> None:
    assert large.samples.mos.size == 12
    old = _folder(large)
    shutil.rmtree(tmp_path / "mine")
    build(table(9), large.root, workers=1, overwrite=True)
    again = open_set(large.root)
    assert again.samples.mos.size == 9
    assert not old.exists()


def test_files_of_others_in_the_cache_survive_a_table_that_changed(
    large: ShardSet, table: Callable[..., DataSet], tmp_path: Path
) -> None:
    assert large.samples.mos.size == 12
    old = _folder(large)
    (old / "notes.txt").write_text("mine")
    (old / "folder").mkdir()
    shutil.rmtree(tmp_path / "mine")
    build(table(9), large.root, workers=1, overwrite=True)
    assert open_set(large.root).samples.mos.size == 9
    assert sorted(path.name for path in old.iterdir()) == ["folder", "notes.txt"]


def test_columns_are_bound_to_the_bytes_of_the_table_whatever_its_times_say(
    large: ShardSet,
) -> None:
    path = large.samples.path_of_file
    before, status = large.samples.mos.copy(), path.stat()
    edited = pq.read_table(path)
    place = edited.schema.get_field_index("mos")
    edited = edited.set_column(place, "mos", [pa.array(before[::-1])])
    pq.write_table(edited, path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    np.testing.assert_array_equal(open_set(large.root).samples.mos, before[::-1])


def test_a_note_in_the_cache_that_is_damaged_is_not_believed(large: ShardSet) -> None:
    expected = large.samples.mos.copy()
    (note,) = _folder(large).parent.glob("*.json")
    for contents in (
        b"",
        b"[]",
        note.read_bytes().replace(b'"sha256":"', b'"sha256":"../../'),
        b"\0",
    ):
        note.write_bytes(contents)
        np.testing.assert_array_equal(open_set(large.root).samples.mos, expected)


def _files(folder: Path) -> ColumnFiles:
    table = folder / "table"
    if not table.exists():
        table.write_bytes(b"a table")
    return ColumnFiles(folder / "cache", table)


def test_a_file_that_was_not_finished_is_never_seen(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(3)
        assert not list(tmp_path.rglob("x.arrow"))
        raise KeyboardInterrupt

    files = _files(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        files.make("x", np.int64, (6,), pieces)
    assert files.get("x", np.int64, (6,)) is None
    assert [path.name for path in files._folder.iterdir()] == ["lock"]


@pytest.mark.parametrize("values", [np.arange(5), np.arange(6.0)], ids=["length", "type"])
def test_pieces_that_are_not_what_was_announced_are_refused(
    tmp_path: Path, values: np.ndarray
) -> None:
    files = _files(tmp_path)
    with pytest.raises(ValueError, match="it should"):
        files.make("x", np.int64, (6,), lambda: [values])
    assert files.get("x", np.int64, (6,)) is None


def _make_slowly(folder: Path, out: "multiprocessing.Queue[tuple[int, list[int]]]") -> None:
    made = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal made
        made += 1
        yield from (np.full(1000, k) for k in range(1000))

    array = _files(folder).make("x", np.int64, (1_000_000,), pieces)
    assert array is not None
    out.put((made, array[[0, 500_000, -1]].tolist()))


def test_of_processes_that_start_together_one_makes_the_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=_make_slowly, args=(tmp_path, out)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = [out.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(made for made, _ in found) == [0, 0, 1]
    assert all(values == [0, 500, 999] for _, values in found)


@pytest.mark.parametrize("protocol", ["70-10-20", "80-20"])
def test_the_parts_of_a_large_split_are_mapped_and_equal_those_drawn(
    large: ShardSet, protocol: Protocol
) -> None:
    (drawn,) = make_splits(large, protocol=protocol, repeats=1)
    write_split(large.root, drawn)
    for _ in range(2):
        loaded = load_split(open_set(large.root), drawn.name)
        assert len(list(_folder(large).glob("split-*.arrow"))) == 3
        for part in ("train", "val", "test"):
            np.testing.assert_array_equal(loaded.part(part), drawn.part(part))
            assert _is_mapped(loaded.part(part)) or drawn.part(part).size == 0
        assert loaded.hash == drawn.hash


def test_a_split_edited_after_it_was_kept_is_refused(large: ShardSet) -> None:
    (drawn,) = make_splits(large, repeats=1)
    path = Path(large.root) / write_split(large.root, drawn)
    load_split(large, drawn.name)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"val":[', f'"val":[{drawn.test[0]},'), encoding="utf-8")
    with pytest.raises(ShardError, match="do not match its hash"):
        load_split(open_set(large.root), drawn.name)


def test_a_kept_split_that_was_damaged_is_read_from_its_own_file(large: ShardSet) -> None:
    (drawn,) = make_splits(large, repeats=1)
    write_split(large.root, drawn)
    load_split(large, drawn.name)
    (kept,) = _folder(large).glob("split-*-train.arrow")
    data = kept.read_bytes()
    at = data.index(drawn.train.tobytes())
    kept.unlink()  # a mapped file is never changed in place
    kept.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    loaded = load_split(open_set(large.root), drawn.name)
    np.testing.assert_array_equal(loaded.train, drawn.train)


def test_columns_that_come_with_a_set_are_neither_believed_nor_removed(large: ShardSet) -> None:
    expected = large.samples.mos.copy()
    status = large.samples.path_of_file.stat()
    key = f"v1-{large.manifest.samples_sha256[:16]}-{status.st_size}-{status.st_mtime_ns}"
    folder = Path(large.root) / ".columns" / key  # as the version before this one named it
    folder.mkdir(parents=True)
    np.save(folder / "mos.npy", np.zeros(12))
    (folder.parent / "other").mkdir()
    np.testing.assert_array_equal(open_set(large.root).samples.mos, expected)
    assert (folder / "mos.npy").exists()
    assert (folder.parent / "other").exists()
