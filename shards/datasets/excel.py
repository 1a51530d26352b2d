"""Label files that are workbooks."""

import datetime
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from shards.datasets.foreign import read_in_child
from shards.errors import ShardError
from shards.text import printable

_MOST_BYTES = 256 << 20
_MOST_UNPACKED = 1 << 29
_MOST_ROWS, _MOST_COLUMNS = 1 << 20, 1 << 14
_MOST_TEXT = 32_767
"""Characters that a cell may hold, by the format."""
_BATCH = 500

Numbered = tuple[int, list[Any]]


def read_sheet(
    path: Path, sheet: str | None = None, *, on_names: Callable[[list[str]], None] | None = None
) -> Iterator[Numbered]:
    """Rows of one sheet (the first, if none is named) with their numbers; empty rows are left out.

    Rows count from 1. A cell is a text, a number, a truth value or None; dates are text, and a
    formula is the value that was stored with it.

    Args:
        path: The workbook.
        sheet: Name of the sheet.
        on_names: Called with the names of all sheets before the first row.

    Raises:
        ShardError: If the file is no workbook, is damaged, is larger than a workbook can be, has
            no such sheet, or holds a formula without a value.
    """
    answers = read_in_child("shards.datasets.excel:batches", path, sheet, limit_bytes=_MOST_BYTES)
    names = next(answers)
    if on_names is not None:
        on_names(names)
    for batch in answers:
        yield from ((number, cells) for number, cells in batch)


def batches(path: Path, sheet: str | None) -> Iterator[list[Any]]:
    """The sheets' names, then batches of rows, in this process: run by `read_in_child`."""
    import openpyxl  # a quarter of a second that only sets with workbooks need

    _refuse_bomb(path)
    book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    if sheet is not None and sheet not in book.sheetnames:
        raise ShardError(
            f"{printable(path)}: has no sheet {sheet!r}, only "
            f"{', '.join(printable(name, 60) for name in book.sheetnames)}",
            exit_code=3,
        )
    if not book.worksheets:
        raise ShardError(f"{printable(path)}: has no sheet", exit_code=3)
    page = book[sheet] if sheet is not None else book.worksheets[0]
    yield [page.title, *(name for name in book.sheetnames if name != page.title)]
    batch: list[Numbered] = []
    for number, cells in _rows(page, path):
        if any(cell is not None for cell in cells):
            batch.append((number, cells))
        if len(batch) == _BATCH:
            yield batch
            batch = []
    yield batch


def _rows(page: Any, path: Path) -> Iterator[Numbered]:
    """Like openpyxl's own iterator, which fills gaps with rows and loses rows that go back."""
    from openpyxl.worksheet._reader import FORMULA_TAG, VALUE_TAG, WorkSheetParser

    class Parser(WorkSheetParser):  # type: ignore[misc]
        def parse_cell(self, element: Any) -> Any:
            # Programs that do not compute write none, or an empty one; a text may be empty.
            value = element.find(VALUE_TAG)
            has_value = value is not None and (value.text or element.get("t") == "str")
            if not has_value and element.find(FORMULA_TAG) is not None:
                raise ShardError(
                    f"{printable(path)}: cell {printable(element.get('r'), 20)} holds a formula "
                    "whose value was never stored; open the workbook in a spreadsheet program and "
                    "save it, or save it as CSV",
                    exit_code=3,
                )
            return super().parse_cell(element)

    last = 0
    book = page.parent
    with page._get_source() as source:
        parser = Parser(
            source, page._shared_strings, data_only=True, epoch=book.epoch,
            date_formats=book._date_formats, timedelta_formats=book._timedelta_formats,
        )  # fmt: skip
        for number, row in parser.parse():
            if not last < number <= _MOST_ROWS:
                raise ShardError(
                    f"{printable(path)}: row {number} follows row {last}; rows count up, to "
                    f"{_MOST_ROWS:,} at most: the workbook is damaged, save it again",
                    exit_code=3,
                )
            last = number
            yield number, _cells(row, f"{printable(path)}: row {number}")


def _cells(row: list[dict[str, Any]], where: str) -> list[Any]:
    cells: list[Any] = []
    for cell in row:
        column = cell["column"]
        if not len(cells) < column <= _MOST_COLUMNS:
            raise ShardError(
                f"{where}: column {column} follows column {len(cells)}; the workbook is damaged, "
                "save it again",
                exit_code=3,
            )
        cells += [None] * (column - 1 - len(cells)) + [_plain(cell["value"], where)]
    return cells


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        raise ShardError(
            f"{where}: a cell of {len(value):,} characters, more than the {_MOST_TEXT:,} of the "
            "format; the workbook is damaged",
            exit_code=3,
        )
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return float(value)
    return value


def _refuse_bomb(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > _MOST_UNPACKED:
        raise ShardError(
            f"{printable(path)}: unpacks to {unpacked:,} bytes, more than the {_MOST_UNPACKED:,} a "
            "workbook of labels may have; save it as CSV",
            exit_code=3,
        )
