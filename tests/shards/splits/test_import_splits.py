import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import build
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.sample import DataSet
from shards.splits.import_splits import import_splits


@pytest.fixture
def singles(tmp_path: Path, table: Callable[..., DataSet]) -> ShardSet:
    """Twelve images, each its own group."""
    build(table(12, groups=12), tmp_path / "singles", workers=1)
    return open_set(tmp_path / "singles")


def names(shard_set: ShardSet) -> list[str]:
    return [str(path) for path in shard_set.samples.path]


def meta(
    shard_set: ShardSet, folder: Path, columns: dict[str, list[str]], *, skip: int = 0
) -> Path:
    """The rows are reversed, so an import by position would be wrong."""
    path = folder / "meta_info_MineDataset.csv"
    lines = [",".join(["img_name", "mos", *columns])]
    for k, name in reversed(list(enumerate(names(shard_set)))):
        lines.append(
            ",".join([f"photos/{name}", "1.0", *(column[k] for column in columns.values())])
        )
    path.write_text("\n".join(lines[: len(lines) - skip]) + "\n")
    return path


PARTS = ["train"] * 7 + ["val"] * 2 + ["test"] * 3


def test_pyiqa_columns_are_read_by_name(singles: ShardSet, tmp_path: Path) -> None:
    other = ["test", "test", *["train"] * 8, "val", "val"]
    path = meta(singles, tmp_path, {"official_split": PARTS, "ratio721_seed123_split_01": other})
    first, second = import_splits(singles, path)
    assert (first.train.tolist(), first.val.tolist()) == (list(range(7)), [7, 8])
    assert second.test.tolist() == [0, 1]
    assert second.name == "imported-ratio721_seed123_split_01"
    assert import_splits(singles, path, column="official_split")[0].hash == first.hash


def test_numbers_are_parts_in_older_files(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"split": ["0"] * 7 + ["1"] * 2 + ["2"] * 3})
    assert import_splits(singles, path)[0].test.tolist() == [9, 10, 11]


def test_an_802_split_reports_on_what_it_calls_val(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"ratio802_seed123_split_01": ["train"] * 10 + ["val"] * 2})
    (split,) = import_splits(singles, path)
    assert (split.val.size, split.test.tolist()) == (0, [10, 11])
    assert "calls the held-out part `val`" in split.note


def test_the_shift_of_pyiqas_loader_can_be_repeated(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"split": PARTS})
    straight = import_splits(singles, path)[0]
    (shifted,) = import_splits(singles, path, shift_rows=2)
    assert "shifts them by 2 rows" in shifted.note
    # Rows are reversed: row r is image 11 - r, and takes the part of image 13 - r.
    assert shifted.test.tolist() == [id - 2 for id in straight.test.tolist()]


def test_an_older_pickle_needs_the_names_its_numbers_mean(
    singles: ShardSet, tmp_path: Path
) -> None:
    path = meta(singles, tmp_path, {"split": PARTS})
    rows = {1: {"train": list(range(9)), "val": [], "test": [9, 10, 11]}}
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(rows))
    with pytest.raises(ShardError, match="mean nothing without the list"):
        import_splits(singles, tmp_path / "split.pkl")
    (split,) = import_splits(singles, tmp_path / "split.pkl", names=path)
    assert split.test.tolist() == [0, 1, 2]


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/tmp/lmcl-evil-was-here"),))


def test_a_pickle_that_wants_to_run_something_is_refused(singles: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "split.pkl").write_bytes(pickle.dumps({1: Evil()}))
    path = meta(singles, tmp_path, {"split": PARTS})
    with pytest.raises(ShardError, match="not a pickle of plain lists"):
        import_splits(singles, tmp_path / "split.pkl", names=path)
    assert not Path("/tmp/lmcl-evil-was-here").exists()


def test_arniqa_padding_is_stripped_and_said(singles: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "arniqa"
    folder.mkdir()
    np.save(folder / "train.npy", np.array([[0, 1, 2, 3, 4, 5, 6, -1], [4, 5, 6, 7, 8, 9, 10, 11]]))
    np.save(folder / "val.npy", np.array([[7, 8], [0, -1]]))
    np.save(folder / "test.npy", np.array([[9, 10, 11], [1, 2, 3]]))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(f"Mine/{name},1.0" for name in reversed(names(singles))))
    first, second = import_splits(singles, folder, names=listed)
    assert first.train.tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert first.note == "1 entries of -1 were padding and are stripped"
    assert 0 not in first.train.tolist()
    assert second.test.tolist() == [8, 9, 10]


def test_text_lists_are_read(singles: ShardSet, tmp_path: Path) -> None:
    folder = tmp_path / "liqe1"
    folder.mkdir()
    for part, start, end in (("train", 0, 7), ("val", 7, 9), ("test", 9, 12)):
        lines = [f"x/{name}\t0.5\tblur" for name in names(singles)[start:end]]
        (folder / f"mine_{part}.txt").write_text("\n".join(lines))
    (split,) = import_splits(singles, folder)
    assert split.val.tolist() == [7, 8]


def test_a_name_that_is_not_in_the_set_is_named(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"split": PARTS})
    path.write_text(path.read_text() + "photos/other.png,1.0,train\n")
    with pytest.raises(ShardError, match=r"1 images .* first photos/other\.png"):
        import_splits(singles, path)
    (split,) = import_splits(singles, path, allow_missing=True)
    assert "1 images of the list are not in this set" in split.note


def test_images_in_no_part_are_counted(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"split": PARTS}, skip=2)
    assert "2 images of this set are in no part" in import_splits(singles, path)[0].note


def test_an_imported_split_that_leaks_is_refused(packed: ShardSet, tmp_path: Path) -> None:
    path = meta(packed, tmp_path, {"split": PARTS})
    with pytest.raises(ShardError, match="leaks"):
        import_splits(packed, path)


def test_a_name_that_fits_two_images_is_refused(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    from shards.datasets.table import open_table

    for folder in ("jp2k", "wn"):
        (tmp_path / "live" / folder).mkdir(parents=True)
        (tmp_path / "live" / folder / "img1.bmp").write_bytes(picture(len(folder)))
    (tmp_path / "live.csv").write_text("path,score\njp2k/img1.bmp,1\nwn/img1.bmp,2\n")
    build(open_table(tmp_path / "live.csv", images=tmp_path / "live"), tmp_path / "o", workers=1)
    shard_set = open_set(tmp_path / "o")
    lists = tmp_path / "lists"
    lists.mkdir()
    (lists / "train.txt").write_text("x/jp2k/img1.bmp\n")
    (lists / "test.txt").write_text("img1.bmp\n")
    with pytest.raises(ShardError, match=r"'img1\.bmp' fits several images"):
        import_splits(shard_set, lists)
    (lists / "test.txt").write_text("LIVE/wn/img1.bmp\n")
    assert import_splits(shard_set, lists)[0].test.tolist() == [1]


NUMBERED_WRONGLY = {
    "1 and 2": ["1"] * 9 + ["2"] * 3,
    "-1 and 1": ["-1"] * 9 + ["1"] * 3,
    "0 and 3": ["0"] * 9 + ["3"] * 3,
    "1.0 and 2.0": ["1.0"] * 9 + ["2.0"] * 3,
    "1_0": ["0"] * 8 + ["2"] * 3 + ["1_0"],
}
EMPTY = {
    "blanks everywhere": [""] * 12,
    "train everywhere": ["train"] * 12,
    "test everywhere": ["test"] * 12,
    "val and nothing else": ["val"] * 12,
    "0 everywhere": ["0"] * 12,
    "nan everywhere": ["nan"] * 12,
}


@pytest.mark.parametrize("kind", NUMBERED_WRONGLY)
def test_a_coding_that_is_not_0_1_2_is_refused(
    singles: ShardSet, tmp_path: Path, kind: str
) -> None:
    path = meta(singles, tmp_path, {"split": NUMBERED_WRONGLY[kind]})
    with pytest.raises(ShardError, match=r"not 0 = train|none of train") as caught:
        import_splits(singles, path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", EMPTY)
def test_a_split_with_an_empty_part_is_refused(
    singles: ShardSet, tmp_path: Path, kind: str
) -> None:
    path = meta(singles, tmp_path, {"split": EMPTY[kind]})
    with pytest.raises(ShardError, match=r"leaves (train|test) empty"):
        import_splits(singles, path)


def test_numbers_with_a_point_are_the_numbers(singles: ShardSet, tmp_path: Path) -> None:
    column = ["0.0"] * 7 + ["1.0"] * 2 + ["2.0"] * 3
    (split,) = import_splits(singles, meta(singles, tmp_path, {"split": column}))
    assert (split.train.size, split.val.tolist(), split.test.tolist()) == (7, [7, 8], [9, 10, 11])


def test_an_npy_of_padding_alone_is_an_empty_part(singles: ShardSet, tmp_path: Path) -> None:
    for part, rows in (("train", [-1, -1]), ("val", [0, 1]), ("test", [2, 3])):
        np.save(tmp_path / f"{part}.npy", np.array([rows]))
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names(singles)))
    with pytest.raises(ShardError, match="leaves train empty"):
        import_splits(singles, tmp_path, names=listed)


def test_a_repeated_column_is_refused(singles: ShardSet, tmp_path: Path) -> None:
    path = meta(singles, tmp_path, {"split": PARTS, "Split": PARTS[::-1]})
    with pytest.raises(ShardError, match="'split' and 'Split' have one name"):
        import_splits(singles, path)


@pytest.mark.parametrize("ending", ["csv", "txt"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_names_are_counted_from_the_first_image_with_or_without_a_header(
    singles: ShardSet, tmp_path: Path, ending: str, mark: str
) -> None:
    """A header that is not there once shifted every number by one."""
    rows = {1: {"train": list(range(9)), "val": [], "test": [9, 10, 11]}}
    (tmp_path / "split.pkl").write_bytes(pickle.dumps(rows))
    listed = tmp_path / f"names.{ending}"
    lines = [f"{name},1.0" for name in names(singles)]
    for header in (["img_name,mos"], ["dis_img_path,score"], []):
        listed.write_text(mark + "\n".join([*header, *lines]) + "\n", encoding="utf-8")
        if ending == "csv" and not header:
            with pytest.raises(ShardError, match="the first line holds the image"):
                import_splits(singles, tmp_path / "split.pkl", names=listed)
            continue
        (split,) = import_splits(singles, tmp_path / "split.pkl", names=listed)
        assert split.test.tolist() == [9, 10, 11]


def test_an_empty_line_in_a_list_of_names_is_refused(singles: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "split.pkl").write_bytes(pickle.dumps({1: {"train": [0], "test": [1]}}))
    (tmp_path / "names.txt").write_text("\n\n".join(names(singles)) + "\n\n")
    with pytest.raises(ShardError, match="names no image, so what the numbers count is not known"):
        import_splits(singles, tmp_path / "split.pkl", names=tmp_path / "names.txt")


@pytest.mark.parametrize("row", [1.7, True, "0123", None, [1], -1, 12, 10**30], ids=repr)
def test_row_numbers_are_whole_numbers_of_the_list(
    singles: ShardSet, tmp_path: Path, row: object
) -> None:
    (tmp_path / "split.pkl").write_bytes(pickle.dumps({1: {"train": [0, row], "test": [2]}}))
    path = meta(singles, tmp_path, {"split": PARTS})
    with pytest.raises(ShardError, match=r"is no row number|is not in 0 \.\. 11|not a pickle"):
        import_splits(singles, tmp_path / "split.pkl", names=path)


@pytest.mark.parametrize("kind", ["fifo", "sparse", "npy claims", "npy of text", "npz"])
def test_files_of_a_split_are_regular_and_of_sane_size(
    singles: ShardSet, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    (tmp_path / "names.txt").write_text("\n".join(names(singles)))
    for part in ("train", "val", "test"):
        np.save(folder / f"{part}.npy", np.array([[0, 1]]))
    file = folder / "val.npy"
    if kind == "fifo":
        file.unlink()
        os.mkfifo(file)
    elif kind == "sparse":
        with file.open("wb") as out:
            out.truncate(5 << 30)
    elif kind == "npy claims":
        file.write_bytes(file.read_bytes().replace(b"(1, 2)", b"(9, 9)"))
    elif kind == "npy of text":
        np.save(file, np.array([["a", "b"]]))
    else:
        with file.open("wb") as out:
            np.savez(out, np.zeros(3))
    with pytest.raises(ShardError, match=r"val\.npy: ") as caught:
        import_splits(singles, folder, names=tmp_path / "names.txt")
    assert len(str(caught.value).encode()) <= 2048
