"""The one reader of tables: CSV in any dialect, TSV, JSONL, JSON, Parquet, Arrow and xlsx.

`open_rows(path) -> LabelTable` for who wants to know how the file is written, `read_rows(path)` for
who only wants rows. What a file is, its first bytes say; its name does not have to.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shards.datasets.dialect import Dialect, dialect_rows, recognise
from shards.datasets.excel import read_sheet
from shards.datasets.parquet import read_head, read_parquet
from shards.datasets.roles import KNOWN_KEYS, PATH, find_column
from shards.datasets.values import MarkFinder, NumberMarks, column_key, is_missing, one_name_each
from shards.errors import ShardError
from shards.source_files import MAX_TABLE_BYTES, open_regular, read_text, text_lines
from shards.text import printable

Row = Mapping[str, Any]
Numbered = tuple[int, Row]

_TEXT = (".csv", ".tsv", ".tab", ".psv", ".txt")
_JSON_LINES = (".jsonl", ".ndjson")
TABLE_ENDINGS = frozenset(
    {*_TEXT, *_JSON_LINES, ".json", ".parquet", ".arrow", ".feather", ".xlsx"}
)
"""Of files that are tables; others are named as what they are."""
_KNOWN = "a table ends in .csv, .tsv, .txt, .jsonl, .json, .parquet, .arrow or .xlsx"
_HELD_BYTES = 1 << 24
_HELD_CELLS = 500_000
_MOST_JSON = 256 << 20
_ABOVE = 20
_BLOCK = 1 << 20
_MOST_NAMED = 10
_LOOKED_AT = 10_000
"""Rows of a typed table in which texts of numbers are looked for."""
_ODS = b"mimetypeapplication/vnd.oasis.opendocument"
_SAVE = "open it in a spreadsheet program and save it as .xlsx or CSV"
_OTHERS = (
    (b"\xd0\xcf\x11\xe0", "a workbook of the old kind (.xls)", _SAVE),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with `gunzip`"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with `zstd -d`"),
    (b"BZh", "compressed by bzip2", "unpack it with `bunzip2`"),
    (b"<", "a page of HTML or XML", _SAVE),
    (b"%PDF", "a PDF", "ask for the table itself"),
    (b"{\\rtf", "a document (RTF)", _SAVE),
    (b"SQLite format", "a database", "export the table as CSV"),
)
"""What people give for a table: how it begins, what it is, the way out."""


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """A table that can be read as often as wanted."""

    path: Path
    """The file."""
    names: tuple[str, ...]
    """Columns, in lower case, as rows have them."""
    rows: Callable[[], Iterator[Numbered]]
    """Rows by column name, each with its number in the file: the line of a text, the row of a
    sheet; in Parquet and JSON arrays the first is 1."""
    told: tuple[str, ...] = ()
    """What was recognised and is not as in a plain CSV, in words."""
    delimiter: str = ""
    """Of a table of text."""
    encoding: str = ""
    """Of a table of text."""
    is_typed: bool = False
    """Whether all cells of a column are of one type, as in Parquet."""
    pictures: tuple[str, ...] = ()
    """Columns that hold encoded images."""
    mean_bytes: int = 0
    """Of a row, pictures included."""
    lists: tuple[str, ...] = ()
    """Columns that hold lists of encoded images, which have no one score."""

    def path_column(self, given: str | None) -> str:
        """The column of paths.

        Args:
            given: The user's word; None finds it by its usual names.

        Raises:
            ShardError: If there is none, several could be meant, or it holds lists of images.
        """
        try:
            column = find_column(self.names, PATH, given, where=str(self.path))
        except ShardError:
            if not self.lists or given is not None:
                raise
            column = self.lists[0]
        assert column is not None
        if column in self.lists:
            raise ShardError(
                f"{printable(self.path)}: its column {printable(column, 60)!r} holds a list of "
                "images in each row, and a row is one image; make a table of the first of each "
                f"list: `{_first_of_lists(self.path, self.names.index(column))}`, with this file "
                "as IN (1 in place of the last 0 is the second)",
                exit_code=3,
            )
        return column

    def number_marks(self, columns: list[str]) -> NumberMarks:
        """How numbers in some columns are written; goes through the table where it has to.

        Raises:
            ShardError: If that cannot be told.
        """
        finder = MarkFinder()
        if self.delimiter == "," and not _holds_quotes(self.path):
            return NumberMarks()
        rows = itertools.islice(self.rows(), _LOOKED_AT) if self.is_typed else self.rows()
        for number, row in rows:
            for column in columns:
                finder.add(number, row.get(column))
        return finder.marks(where=str(self.path), is_comma=self.delimiter == ";")


def open_rows(path: Path, *, wanted: frozenset[str] = PATH.keys) -> LabelTable:
    """Open a table, whatever it is written in.

    Args:
        path: The file.
        wanted: Keys of columns of which the header has one; lines of other text may stand above.

    Raises:
        ShardError: If it is no table this program reads; says what it is and the way out.
    """
    with open_regular(path, limit_bytes=1 << 62) as stream:
        head = stream.read(256)
    ending = path.suffix.lower()
    if head.startswith(b"PK\x03\x04") and _ODS not in head:
        return _open_sheet(path, wanted)
    if head.startswith((b"PAR1", b"ARROW1")) or ending in (".parquet", ".arrow", ".feather"):
        return _open_parquet(path)
    if ending in _JSON_LINES:
        return _held(path, lambda: _json_rows(path))
    if ending == ".json":
        table = _held(path, lambda: _json_array(path))
        is_object = head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")
        return replace(table, told=("one object of scores by path",)) if is_object else table
    _refuse_others(path, head)
    if ending == ".xlsx":
        return _open_sheet(path, wanted)
    if ending not in _TEXT:
        raise ShardError(f"{printable(path)}: {_KNOWN}", exit_code=2)
    return _open_text(path, wanted)


def _first_of_lists(path: Path, column: int) -> str:
    """A command that makes a table of images of one whose rows hold lists of them."""
    with open_regular(path) as stream:
        head = stream.read(6)
    how = "open_file" if head == b"ARROW1" else "open_stream"
    is_parquet = head.startswith(b"PAR1")
    read = "q.read_table('IN')" if is_parquet else f"p.ipc.{how}(p.memory_map('IN')).read_all()"
    return (
        f'python -c "import pyarrow as p, pyarrow.parquet as q, pyarrow.compute as c; t={read}; '
        f"k={column}; q.write_table(t.set_column(k,t.column_names[k],"
        "c.list_element(t.column(k),0)),'OUT.parquet')\""
    )


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table as mappings with lower-case column names, whatever the format.

    Raises:
        ShardError: As `open_rows`; if a row does not fit, or two columns have one name.
    """
    yield from (row for _, row in open_rows(path).rows())


def _refuse_others(path: Path, head: bytes) -> None:
    if _ODS in head:
        raise ShardError(
            f"{printable(path)}: is an OpenDocument spreadsheet (.ods); {_SAVE}: `soffice "
            f"--headless --convert-to csv {printable(path)}`",
            exit_code=3,
        )
    for begin, what, way_out in _OTHERS:
        if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(begin):
            raise ShardError(
                f"{printable(path)}: is {what}, not a table of text; {way_out}", exit_code=3
            )


def _holds_quotes(path: Path) -> bool:
    """Whether a cell of a CSV can hold a comma at all."""
    with open_regular(path, limit_bytes=MAX_TABLE_BYTES) as stream:
        return any(b'"' in block for block in iter(lambda: stream.read(_BLOCK), b""))


def _open_text(path: Path, wanted: frozenset[str]) -> LabelTable:
    dialect = recognise(path, known=KNOWN_KEYS | wanted, wanted=wanted)
    _, cells = next(dialect_rows(path, dialect), (0, []))
    names = one_name_each(_clean_header(cells), where=str(path))
    return LabelTable(
        path=path,
        names=tuple(names),
        rows=lambda: _text_rows(path, dialect, names),
        told=dialect.told,
        delimiter=dialect.delimiter,
        encoding=dialect.encoding,
    )


def _text_rows(path: Path, dialect: Dialect, names: list[str]) -> Iterator[Numbered]:
    rows = dialect_rows(path, dialect)
    next(rows, None)
    for number, cells in rows:
        yield number, dict(zip(names, _fitted(path, number, cells, names), strict=True))


def _fitted(path: Path, number: int, cells: list[Any], names: list[str]) -> list[Any]:
    """Cells of a row, as many as the header has: empty ones at the end do not count."""
    if len(cells) > len(names) and not all(is_missing(cell) for cell in cells[len(names) :]):
        raise ShardError(
            f"{printable(path)}: row {number} has {len(cells)} cells, the header {len(names)}; "
            'put names with commas and numbers with decimal commas in double quotes ("2,5")',
            exit_code=3,
        )
    return cells[: len(names)] + [""] * (len(names) - len(cells))


def _clean_header(cells: list[Any]) -> list[Any]:
    """Names without the mark of a comment in front, and without nameless columns at the end."""
    end = len(cells)
    while end and is_missing(cells[end - 1]):
        end -= 1
    names = cells[:end]
    if names and isinstance(names[0], str):
        names[0] = names[0].lstrip("\ufeff# ")
    return names


def _open_sheet(path: Path, wanted: frozenset[str]) -> LabelTable:
    sheets: list[str] = []
    rows = _replayable(path, lambda: read_sheet(path, on_names=sheets.extend))
    told = ["a workbook"] if path.suffix.lower() != ".xlsx" else []
    has_table = _has_table(rows(), wanted)
    first, others = sheets[0], sorted(set(sheets) - {sheets[0]})
    other = None
    if others and not has_table:
        is_empty = len(list(itertools.islice(rows(), 2))) < 2
        other = _other_sheet(path, first, others, wanted, is_empty=is_empty)
    if other is not None:
        rows = _replayable(path, lambda: read_sheet(path, other))
        told.append(f"the sheet {printable(other, 40)!r}, as the first has no table")
    elif others:
        told.append(f"the first sheet {printable(first, 40)!r} of {1 + len(others)}")
    above, names = _sheet_header(path, rows(), wanted)
    if above:
        told.append(f"{above} {'row' if above == 1 else 'rows'} above the header passed over")

    def numbered() -> Iterator[Numbered]:
        for place, (number, cells) in enumerate(rows()):
            if place > above:
                yield number, dict(zip(names, _fitted(path, number, cells, names), strict=True))

    return LabelTable(path=path, names=tuple(names), rows=numbered, told=tuple(told))


def _has_table(rows: Iterator[tuple[int, list[Any]]], wanted: frozenset[str]) -> bool:
    """Whether a sheet has a header and a row below it."""
    above = [cells for _, cells in itertools.islice(rows, _ABOVE + 1)][:-1]
    return any(column_key(cell) in wanted for cells in above for cell in cells)


def _named(sheets: list[str]) -> str:
    return ", ".join(repr(printable(name, 40)) for name in sheets[:_MOST_NAMED])


def _other_sheet(
    path: Path, first: str, others: list[str], wanted: frozenset[str], *, is_empty: bool
) -> str | None:
    """The one sheet with a table, where the first has none; None if no other has one either.

    Raises:
        ShardError: If several have one, or none and the first `is_empty`.
    """
    found = [name for name in others if _has_table(read_sheet(path, name), wanted)]
    if not found and is_empty:
        raise ShardError(
            f"{printable(path)}: its first sheet {printable(first, 40)!r} has no rows, and no "
            f"other ({_named(others)}) has a column of images that is known; move the one that is "
            "meant to the front, and name its column with `--path-column`",
            exit_code=3,
        )
    if len(found) > 1:
        raise ShardError(
            f"{printable(path)}: its first sheet {printable(first, 40)!r} has no table, and "
            f"{len(found)} others have: {_named(found)}; move the one that is meant to the front, "
            "or save it as CSV",
            exit_code=3,
        )
    return found[0] if found else None


def _sheet_header(
    path: Path, rows: Iterator[tuple[int, list[Any]]], wanted: frozenset[str]
) -> tuple[int, list[str]]:
    """How many rows stand above the header, and its names; a title has one cell."""
    first: list[Any] | None = None
    for above, (_, cells) in zip(range(_ABOVE), rows, strict=False):
        first = cells if first is None else first
        if any(column_key(cell) in wanted for cell in cells):
            return above, one_name_each(_clean_header(cells), where=str(path))
        if sum(not is_missing(cell) for cell in cells) > 1:
            break
    return 0, one_name_each(_clean_header(first or []), where=str(path))


def _open_parquet(path: Path) -> LabelTable:
    head = read_head(path)
    # A file of pictures is large and its labels may be few: building goes through them eight times.
    is_small = head.rows * len(head.names) <= _HELD_CELLS
    read = _replayable(path, lambda: enumerate(read_parquet(path), start=1), is_small=is_small)
    return LabelTable(
        path=path,
        names=head.names,
        rows=read,
        is_typed=True,
        pictures=head.pictures,
        mean_bytes=head.mean_bytes,
        lists=head.lists,
    )


def _held(path: Path, rows: Callable[[], Iterator[Numbered]]) -> LabelTable:
    """Objects may have other names each: a column is one that any of them has."""
    names: dict[str, None] = {}
    for _, row in rows():
        names |= dict.fromkeys(row)
    return LabelTable(path=path, names=tuple(names), rows=rows)


def _replayable(
    path: Path, read: Callable[[], Iterator[Any]], *, is_small: bool = False
) -> Callable[[], Iterator[Any]]:
    """Rows as often as they are wanted; what a child reads and is small is read once."""
    if not is_small and path.stat().st_size > _HELD_BYTES:
        return read
    held = list(read())
    return lambda: iter(held)


def _json_rows(path: Path) -> Iterator[Numbered]:
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip() == "":
            continue
        where = f"{printable(path)}: line {number}"
        yield number, _plain_object(_loads(line, where), where)


def _json_array(path: Path) -> Iterator[Numbered]:
    found = _loads(read_text(path, limit_bytes=_MOST_JSON), printable(path))
    if _is_path_to_score(found):
        for number, (name, score) in enumerate(found.pairs, start=1):
            yield number, {"path": name, "score": score}
        return
    if not isinstance(found, list):
        what = "one object" if isinstance(found, dict) else f"a {type(found).__name__}"
        raise ShardError(
            f"{printable(path)}: is JSON, {what} and no list of objects; write an object for each "
            'image, `[{"path": "a.jpg", "score": 3}, ...]` (pandas: `to_json(PATH, '
            "orient='records')`), or one object of scores by path, `{\"a.jpg\": 3, ...}`",
            exit_code=3,
        )
    for number, row in enumerate(found, start=1):
        yield number, _plain_object(row, f"{printable(path)}: object {number}")


def _is_path_to_score(found: Any) -> bool:
    """Whether JSON is one object of scores by path, not one row or a table by columns."""
    return (
        isinstance(found, _Pairs)
        and bool(found.pairs)
        and not any(column_key(name) in KNOWN_KEYS for name, _ in found.pairs)
        and not any(isinstance(score, list | dict) for _, score in found.pairs)
    )


def _loads(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} is not JSON ({printable(error)})", exit_code=3) from error


def _plain_object(row: Any, where: str) -> Row:
    if not isinstance(row, _Pairs):
        raise ShardError(f"{where} is not a JSON object", exit_code=3)
    names = one_name_each((name for name, _ in row.pairs), where=where)
    return dict(zip(names, (value for _, value in row.pairs), strict=True))


class _Pairs(dict[str, Any]):
    """A JSON object that remembers names which stand in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs
