"""Columns in files that processes share: the same numbers, whatever happens to the files."""

import logging
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import build
from shards.columns import COLUMNS, ColumnFiles
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
    (folder,) = (Path(shard_set.root) / COLUMNS).iterdir()
    return folder


def _is_mapped(array: np.ndarray) -> bool:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return isinstance(array, np.memmap)


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


def test_a_small_set_has_no_files_beside_it(packed: ShardSet) -> None:
    assert packed.samples.mos.size
    assert not (Path(packed.root) / COLUMNS).exists()


def test_a_folder_that_cannot_be_written_to_leaves_them_to_the_cache(
    large: ShardSet, tmp_path: Path
) -> None:
    (Path(large.root) / COLUMNS).write_bytes(b"in the way")
    assert _is_mapped(open_set(large.root).samples.mos)
    assert list((tmp_path / "cache").rglob("mos.npy"))


def test_where_nothing_can_be_written_columns_are_kept_in_memory_and_a_warning_says_so(
    large: ShardSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(large.root) / COLUMNS).write_bytes(b"in the way")
    (tmp_path / "cache").write_bytes(b"in the way")
    with caplog.at_level(logging.WARNING):
        mos = open_set(large.root).samples.mos
    np.testing.assert_array_equal(mos, SampleTable(large.samples.path_of_file).mos)
    assert "set LMCL_CACHE" in caplog.text


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "an archive", "longer", "another type"])
def test_a_damaged_file_is_made_anew(large: ShardSet, how: str) -> None:
    expected = large.samples.mos.copy()
    path = _folder(large) / "mos.npy"
    whole = path.read_bytes()
    if how in ("longer", "another type"):
        path.unlink()
        np.save(path, np.zeros(*((13, np.float64) if how == "longer" else (12, np.float32))))
    else:
        contents = {
            "cut": whole[:-8],
            "empty": b"",
            "garbage": bytes(len(whole)),
            "an archive": b"PK\3\4" + whole[4:],
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


def test_a_build_removes_the_files_of_the_set_it_replaces(
    large: ShardSet, table: Callable[..., DataSet], tmp_path: Path
) -> None:
    assert large.samples.mos.size == 12
    shutil.rmtree(tmp_path / "mine")
    build(table(9), large.root, workers=1, overwrite=True)
    assert not (Path(large.root) / COLUMNS).exists()


def test_a_file_that_was_not_finished_is_never_seen(tmp_path: Path) -> None:
    def pieces() -> Iterator[np.ndarray]:
        yield np.arange(3)
        assert not list(tmp_path.rglob("x.npy"))
        raise KeyboardInterrupt

    files = ColumnFiles([tmp_path], "key")
    with pytest.raises(KeyboardInterrupt):
        files.make("x", np.int64, (6,), pieces)
    assert files.get("x", np.int64, (6,)) is None
    assert [path.name for path in (tmp_path / "key").iterdir()] == ["lock"]


@pytest.mark.parametrize("values", [np.arange(5), np.arange(6.0)], ids=["length", "type"])
def test_pieces_that_are_not_what_was_announced_are_refused(
    tmp_path: Path, values: np.ndarray
) -> None:
    files = ColumnFiles([tmp_path], "key")
    with pytest.raises(ValueError, match="it should"):
        files.make("x", np.int64, (6,), lambda: [values])
    assert files.get("x", np.int64, (6,)) is None


def _make_slowly(folder: Path, out: "multiprocessing.Queue[tuple[int, list[int]]]") -> None:
    made = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal made
        made += 1
        yield from (np.full(1000, k) for k in range(1000))

    array = ColumnFiles([folder], "key").make("x", np.int64, (1_000_000,), pieces)
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
        assert len(list(_folder(large).glob("split-*.npy"))) == 3
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
    (kept,) = _folder(large).glob("split-*-train.npy")
    data = bytearray(kept.read_bytes())
    data[-8] ^= 1
    kept.unlink()
    kept.write_bytes(data)
    loaded = load_split(open_set(large.root), drawn.name)
    np.testing.assert_array_equal(loaded.train, drawn.train)
