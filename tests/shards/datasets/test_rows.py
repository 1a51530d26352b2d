"""Workbooks as people keep them, and labels of a file of pictures, which are read once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from shards.cli import cli
from shards.datasets import rows
from shards.datasets.table import open_table
from shards.read import open_set

TABLE: list[list[Any]] = [["image", "mos"], ["0.jpg", 1.5], ["1.jpg", 2.5], ["2.jpg", 4]]
TITLED = [["Study of 2024"], [], ["by hand"], *TABLE]
FORMULA = [*TABLE[:2], ["1.jpg", "=1+1.5"], TABLE[3]]
NOTES = [["The scores are on the next sheet"]]


@pytest.fixture
def build(tmp_path: Path) -> Callable[[dict[str, list[list[Any]]]], tuple[int, str]]:
    """`lmcl-shard build table` on a workbook of these sheets."""
    (tmp_path / "photos").mkdir()
    for number in range(3):
        color = (40 * number, 90, 120)
        Image.new("RGB", (48, 40), color).save(tmp_path / "photos" / f"{number}.jpg")

    def run(sheets: dict[str, list[list[Any]]]) -> tuple[int, str]:
        book = openpyxl.Workbook()
        book.remove(book.active)
        for name, cells in sheets.items():
            page = book.create_sheet(name)
            for row in cells:
                page.append(row)
        book.save(tmp_path / "my.xlsx")
        words = ("build", "table", str(tmp_path / "my.xlsx"), "--workers", "1", "--no-progress")
        where = ("--images", str(tmp_path / "photos"), "--output", str(tmp_path / "set"))
        done = CliRunner().invoke(cli, [*words, *where])
        code = getattr(done.exception, "exit_code", done.exit_code)
        return code, f"{done.output}{done.exception or ''}"

    return run


@pytest.mark.parametrize(
    ("sheets", "told"),
    [
        ({"A": TABLE}, ""),
        ({"A": TITLED}, "2 rows above the header passed over"),
        ({"A": TABLE, "B": NOTES}, "the first sheet 'A' of 2"),
        ({"A": TABLE, "B": [*TABLE[:1], ["2.jpg", 9]]}, "the first sheet 'A' of 2"),
        ({"Read me": [], "B": TABLE}, "the sheet 'B', as the first has no table"),
        ({"Read me": NOTES, "B": TITLED, "C": NOTES}, "the sheet 'B', as the first has no table"),
        ({"Only names": TABLE[:1], "B": TABLE}, "the sheet 'B', as the first has no table"),
    ],
)
def test_workbooks_as_people_keep_them_are_read(
    build: Callable[..., tuple[int, str]],
    tmp_path: Path,
    sheets: dict[str, list[list[Any]]],
    told: str,
) -> None:
    code, output = build(sheets)
    assert code == 0, output
    assert told in output
    assert open_set(tmp_path / "set").samples.mos.tolist() == [1.5, 2.5, 4.0]


@pytest.mark.parametrize(
    ("sheets", "words"),
    [
        ({"A": FORMULA}, ("cell B3 holds a formula", "open the workbook in a spreadsheet program")),
        ({"A": [], "B": TABLE, "C": TABLE},
         ("its first sheet 'A' has no table", "2 others have: 'B', 'C'", "to the front")),
        ({"A": [], "B": NOTES, "C": [["a", "b"], ["0.jpg", 1]]},
         ("its first sheet 'A' has no rows", "no other ('B', 'C') has a column of images",
          "--path-column")),
        ({"A": TABLE[:1]}, ("has no rows",)),
    ],
)  # fmt: skip
def test_what_may_mean_two_things_is_refused(
    build: Callable[..., tuple[int, str]],
    sheets: dict[str, list[list[Any]]],
    words: tuple[str, ...],
) -> None:
    code, output = build(sheets)
    assert code == 3
    assert "Traceback" not in output
    for word in words:
        assert word in output, output


def test_labels_of_a_large_file_of_pictures_are_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [{"bytes": b"\xff\xd8\xff" + bytes(9 << 20), "path": f"{n}.jpg"} for n in range(2)]
    table = pa.table({"image": cells, "mos": [1.0, 2.0]})
    pq.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False)
    assert (tmp_path / "x.parquet").stat().st_size > rows._HELD_BYTES
    read, times = rows.read_parquet, []
    monkeypatch.setattr(rows, "read_parquet", lambda path: (times.append(path), read(path))[1])
    samples = list(open_table(tmp_path / "x.parquet").samples())
    assert [sample.mos for sample in samples] == [1.0, 2.0]
    assert len(times) == 1
