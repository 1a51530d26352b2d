"""Label files that are workbooks."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.errors import ShardError


def read_sheet(path: Path, sheet: str | None = None) -> Iterator[tuple[Any, ...]]:
    """Rows of one sheet as tuples of cell values; the first sheet if none is named.

    Raises:
        ShardError: If the file is no workbook or has no such sheet.
    """
    import openpyxl  # a quarter of a second that only sets with workbooks need

    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except Exception as error:
        # A damaged workbook fails as zip, as XML, as KeyError ...
        raise ShardError(
            f"{path}: cannot be read as a workbook ({error}); unpack it again", exit_code=3
        ) from error
    try:
        if sheet is not None and sheet not in book.sheetnames:
            raise ShardError(
                f"{path}: has no sheet {sheet!r}, only {', '.join(book.sheetnames)}", exit_code=3
            )
        page = book[sheet] if sheet is not None else book.worksheets[0]
        yield from page.iter_rows(values_only=True)
    finally:
        book.close()
