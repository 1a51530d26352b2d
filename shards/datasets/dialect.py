"""How a table of text is written: its encoding, its delimiter, what stands above its header.

`recognise(path, known=..., wanted=...) -> Dialect` and `dialect_rows(path, dialect)`.

Spreadsheets of half of Europe separate cells by semicolons, since the comma is their decimal mark;
they write `sep=;` above the header, UTF-16, or the code page of Windows. All of this can be seen in
the file itself. What cannot be told apart is refused by name.
"""

import codecs
import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shards.datasets.values import column_key
from shards.errors import ShardError
from shards.source_files import MAX_TABLE_BYTES, open_regular, text_lines
from shards.text import printable

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_NAMES = {"utf-8-sig": "UTF-8", "cp1252": "Windows-1252 (Latin-1)"}
_SEPARATOR = re.compile(r'"?sep=(.)"?[,;\t|]*\s*\Z', re.IGNORECASE)
_BLANK = re.compile(r'[\s,;|"]*\Z')
_HIGH = re.compile(rb"[\x80-\xff]+")
_BLOCK = 1 << 20
_HEAD_LINES, _ABOVE = 60, 20


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How one file is written."""

    encoding: str
    """Of Python's names."""
    delimiter: str
    """What stands between two cells."""
    above: int = 0
    """Lines above the header."""
    told: tuple[str, ...] = ()
    """What is not as in a plain CSV, in words."""


def recognise(path: Path, *, known: frozenset[str], wanted: frozenset[str]) -> Dialect:
    """How a table is written, seen in its first lines (the encoding: in all of it).

    Args:
        path: The table.
        known: Keys (`column_key`) of names that columns usually have.
        wanted: Those of which the header has one.

    Raises:
        ShardError: If it is no text, or may mean two things; names them and the way out.
    """
    encoding = _encoding_of(path)
    lines = _head(path, encoding)
    told = [] if encoding == "utf-8-sig" else [_NAMES.get(encoding, encoding.upper())]
    named = _SEPARATOR.match(lines[0]) if lines else None
    first = 1 if named else 0
    candidates = [_read_as(mark, lines, first, known, wanted) for mark in DELIMITERS]
    chosen = next((one for one in candidates if named and one.mark == named[1]), None)
    if named is not None and chosen is None:
        chosen = _read_as(named[1], lines, first, known, wanted)
    chosen = chosen or _choose(path, candidates)
    if chosen.mark != "," and not (chosen.mark == "\t" and path.suffix.lower() in (".tsv", ".tab")):
        told.append(f"cells between {DELIMITERS.get(chosen.mark, repr(chosen.mark))}")
    if chosen.above > first:
        above = chosen.above - first
        told.append(f"{above} {'line' if above == 1 else 'lines'} above the header passed over")
    return Dialect(encoding=encoding, delimiter=chosen.mark, above=chosen.above, told=tuple(told))


def dialect_rows(path: Path, dialect: Dialect) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, from the header on, with the number of the line they end in.

    Raises:
        ShardError: If the file cannot be read like this.
    """
    lines = text_lines(path, encoding=dialect.encoding, errors=_errors(dialect.encoding))
    for _ in range(dialect.above):
        next(lines, "")
    reader = csv.reader(lines, delimiter=dialect.delimiter, strict=True)
    try:
        for cells in reader:
            if not all(cell.strip() == "" for cell in cells):
                yield dialect.above + reader.line_num, cells
    except csv.Error as error:
        raise ShardError(
            f"{printable(path)}: cannot be read as {path.suffix.lower() or 'CSV'} after line "
            f"{dialect.above + reader.line_num} ({printable(error)})",
            exit_code=3,
        ) from error


def raw_name(text: str, encoding: str) -> str:
    """The name of a file whose bytes on disk are those of the table, for one that is no UTF-8."""
    data = text.encode(encoding, "surrogateescape")
    return data.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """The first lines, cut at one delimiter."""

    mark: str
    above: int
    known: int
    """Names in the header that columns usually have."""
    width: int
    """Cells of the header, without empty ones at its end."""
    fits: bool
    """Whether every row has as many cells, or fewer."""

    @property
    def rank(self) -> tuple[int, bool, bool]:
        return self.known, self.width > 1 and self.fits, self.fits


def _choose(path: Path, candidates: Sequence[_Reading]) -> _Reading:
    best = max(one.rank for one in candidates)
    equal = [one for one in candidates if one.rank == best]
    wide = [one for one in equal if one.width > 1]
    if len(wide) > 1:
        names = " or by ".join(DELIMITERS[one.mark] for one in wide)
        raise ShardError(
            f"{printable(path)}: its cells may be separated by {names}; put the line `sep="
            f"{wide[0].mark}` (or the other mark) above the header",
            exit_code=3,
        )
    return (wide or equal)[0]


def _read_as(
    mark: str, lines: list[str], first: int, known: frozenset[str], wanted: frozenset[str]
) -> _Reading:
    above = _header_line(mark, lines, first, wanted)
    rows = list(_tolerant(lines[above:], mark))
    header = [column_key(name) for name in rows[0]] if rows else []
    width = len(_trimmed(rows[0])) if rows else 0
    return _Reading(
        mark=mark,
        above=above,
        known=sum(name in known for name in header),
        width=width,
        fits=all(len(_trimmed(row)) <= width for row in rows[1:]),
    )


def _header_line(mark: str, lines: list[str], first: int, wanted: frozenset[str]) -> int:
    """The line with a name that is wanted, below blank lines, comments and a title; else the first.

    A title is a line with one cell: a row of data is never passed over.
    """
    start = None
    for number in range(first, min(first + _ABOVE, len(lines))):
        line = lines[number]
        cells = _trimmed(next(_tolerant([line], mark), []))
        if any(column_key(cell) in wanted for cell in cells) and not line.startswith("#"):
            return number
        if _BLANK.match(line) or line.startswith("#"):
            continue
        start = number if start is None else start
        if len([cell for cell in cells if cell.strip() != ""]) > 1:
            break
    # `# path,score`: a header that is marked as a comment.
    for number in range(first, min(first + _ABOVE, len(lines)) if start is None else start):
        cells = next(_tolerant([lines[number].lstrip("# ")], mark), [])
        if any(column_key(cell) in wanted for cell in cells):
            return number
    return first if start is None else start


def _tolerant(lines: Sequence[str], mark: str) -> Iterator[list[str]]:
    reader = csv.reader(lines, delimiter=mark)
    while True:
        try:
            yield next(reader)
        except (StopIteration, csv.Error):
            return


def _trimmed(cells: list[str]) -> list[str]:
    end = len(cells)
    while end and cells[end - 1].strip() == "":
        end -= 1
    return cells[:end]


def _head(path: Path, encoding: str) -> list[str]:
    lines = text_lines(path, encoding=encoding, errors=_errors(encoding))
    return [line for _, line in zip(range(_HEAD_LINES), lines, strict=False)]


def _errors(encoding: str) -> str:
    # Five bytes mean nothing in the code page of Windows; a name may hold them all the same.
    return "surrogateescape" if encoding == "cp1252" else "strict"


def _encoding_of(path: Path) -> str:
    with open_regular(path, limit_bytes=MAX_TABLE_BYTES) as stream:
        head = stream.read(_BLOCK)
        for mark, name in _MARKS:
            if head.startswith(mark):
                return name
        if (wide := _without_mark(head)) is not None:
            return wide
        decoder = codecs.getincrementaldecoder("utf-8")()
        block = head
        try:
            while block:
                decoder.decode(block)
                block = stream.read(_BLOCK)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            _refuse_doubtful(path, head if _HIGH.search(head) else block)
            return "cp1252"
    return "utf-8-sig"


def _without_mark(head: bytes) -> str | None:
    """UTF-16 without its mark: every other byte of Latin text is 0."""
    if len(head) < 8:
        return None
    pairs = len(head) // 2
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if odd > 0.7 * pairs and even < 0.1 * pairs:
        return "utf-16-le"
    return "utf-16-be" if even > 0.7 * pairs and odd < 0.1 * pairs else None


def _refuse_doubtful(path: Path, data: bytes) -> None:
    """Accents stand alone among plain letters; words of nothing else are of another script."""
    runs = _HIGH.findall(data)
    total, alone = sum(map(len, runs)), sum(len(run) == 1 for run in runs)
    if total >= 4 and alone < total / 2:
        raise ShardError(
            f"{printable(path)}: is not UTF-8, and its other script may be any of several code "
            "pages (Windows-1251, GBK, Shift-JIS ...); write it as UTF-8: `iconv -f CP1251 -t "
            "UTF-8 OLD > NEW`, with its own code page",
            exit_code=3,
        )
