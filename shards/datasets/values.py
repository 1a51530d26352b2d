"""What a cell of a label table means, the same for every format a table may have.

A newcomer's trap: 0, `false` and 0.0 are values. A value is missing if it is null, NaN or a blank
text; where a text belongs, the word `nan` that programs write for NaN is missing too, so that a
CSV means what the same table means in Parquet. Nothing here asks whether a value is true.
"""

import datetime
import decimal
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shards.errors import ShardError
from shards.text import printable

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})\.0")
_REMARK = re.compile(r"\s*[(\[][^()\[\]]*[)\]]")
_GROUPED = {
    ".": re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?"),
    ",": re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+(,[0-9]*)?"),
}
_SPELLINGS = (
    ("?", re.compile(r"[+-]?[1-9][0-9]{0,2},[0-9]{3}")),
    ("grouped", re.compile(r"[+-]?[1-9][0-9]{0,2}(,[0-9]{3})+(\.[0-9]*)?")),
    (",", re.compile(r"[+-]?[1-9][0-9]{0,2}(\.[0-9]{3})+,[0-9]*")),
    (".", re.compile(r"[+-]?[0-9]*\.[0-9]*([eE][+-]?[0-9]+)?")),
    (",", re.compile(r"[+-]?[0-9]*,[0-9]*([eE][+-]?[0-9]+)?")),
)
"""`1,234` is in doubt; what else proves which mark is the decimal one, first match first."""
_PLAIN = (str, int, float, decimal.Decimal, datetime.date, datetime.time)


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: null, NaN, or blank text."""
    if isinstance(value, float | decimal.Decimal):
        return math.isnan(value)
    return value is None or (isinstance(value, str) and value.strip() == "")


def cell_text(value: object, *, where: str) -> str:
    """A cell as text, empty if it is missing; a whole number has no point, whatever its type.

    Raises:
        ShardError: If it is a structure, a list or bytes.
    """
    text = "" if is_missing(value) else _text(value, where)
    if _WHOLE.fullmatch(text):
        # What programs write for whole numbers of a column that holds NaN too.
        return str(int(text.partition(".")[0]))
    return "" if text in ("nan", "NaN") else text


def name_text(value: object, *, where: str) -> str:
    """A cell that names a file, as text; a file may be called `nan`.

    Raises:
        ShardError: If it is a structure, a list or bytes.
    """
    return "" if is_missing(value) else _text(value, where)


def _typed(text: str) -> str:
    """A number's text as it is typed: word processors put the minus sign for the hyphen."""
    return text.strip().replace("\N{MINUS SIGN}", "-")


def parse_number(value: object) -> float:
    """A number as people write them, or NaN; `1_0`, true and false are none.

    Args:
        value: Of any type; text may have blanks around it, and has ASCII digits.
    """
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        if isinstance(value, int | float | decimal.Decimal):
            return float(value)
        text = _typed(str(value)).removeprefix("\ufeff")
        return float(text) if _NUMBER.fullmatch(text) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def column_key(name: object) -> str:
    """What two spellings of a column's name have in common: letters and digits, in lower case.

    `Image Path`, `image_path` and `ImagePath` are one name; what stands in brackets is a remark
    (`MOS (1-5)`).
    """
    text = unicodedata.normalize("NFKC", "" if name is None else str(name))
    text = _REMARK.sub("", text) or text
    return "".join(letter for letter in text.casefold() if letter.isalnum())


@dataclass(frozen=True, kw_only=True)
class NumberMarks:
    """How numbers are written in texts of a table."""

    decimal: str = "."
    """The decimal mark, `.` or `,`; the other one may stand between thousands."""

    def plain(self, value: Any) -> Any:
        """A cell with its number written as programs do (`1.234,5` is `1234.5`); others as is."""
        if not isinstance(value, str):
            return value
        text = _typed(value)
        other = "." if self.decimal == "," else ","
        if _GROUPED[self.decimal].fullmatch(text):
            text = text.replace(other, "")
        elif other in text:
            return value
        return text.replace(",", ".") if self.decimal == "," else text


class MarkFinder:
    """Finds the decimal mark of a table from the texts in its columns of numbers."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, str]] = {}

    def add(self, row: int, value: object) -> None:
        """Look at a cell."""
        if not isinstance(value, str) or ("," not in value and "." not in value):
            return
        text = _typed(value)
        for kind, pattern in _SPELLINGS:
            if pattern.fullmatch(text):
                self._seen.setdefault(kind, (row, text))
                return

    def marks(self, *, where: str, is_comma: bool) -> NumberMarks:
        """The marks.

        Args:
            where: The table, for the message.
            is_comma: Whether `1,234` is 1.234, where nothing else decides: semicolons between
                cells are there because the comma is the decimal mark.

        Raises:
            ShardError: If two rows contradict each other, or `1,234` may mean two numbers.
        """
        comma, point, doubtful = (self._seen.get(kind) for kind in (",", ".", "?"))
        grouped = self._seen.get("grouped")
        point = point or grouped
        if comma is not None and point is not None:
            raise ShardError(
                f"{printable(where)}: row {comma[0]} writes {comma[1]!r} with a decimal comma, row "
                f"{point[0]} {point[1]!r} with a point; write all numbers alike",
                exit_code=3,
            )
        is_settled = comma is not None or grouped is not None or (is_comma and point is None)
        if doubtful is not None and not is_settled:
            raise ShardError(
                f"{printable(where)}: row {doubtful[0]} holds {doubtful[1]!r}, which may be "
                f"{doubtful[1].replace(',', '.')} or {doubtful[1].replace(',', '')}, and no other "
                "row tells which; write numbers with a decimal point",
                exit_code=3,
            )
        is_decimal = comma is not None or (doubtful is not None and point is None)
        return NumberMarks(decimal="," if is_decimal else ".")


def one_name_each(names: Iterable[object], *, where: str) -> list[str]:
    """Names of columns in lower case; several may be empty, no other may stand twice.

    Raises:
        ShardError: Naming two columns that differ at most in upper and lower case.
    """
    lower: dict[str, str] = {}
    found = []
    for name in names:
        written = printable("" if name is None else name, 80)
        key = ("" if name is None else str(name)).strip().removeprefix("\ufeff").lower()
        if key and key in lower:
            raise ShardError(
                f"{printable(where)}: the columns {lower[key]!r} and {written!r} have one name, so "
                "which one is meant is not known; rename or remove one",
                exit_code=3,
            )
        lower[key] = written
        found.append(key)
    return found


def lower_names(row: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
    """A row with its columns' names in lower case.

    Raises:
        ShardError: As `one_name_each`.
    """
    return dict(zip(one_name_each(row, where=where), row.values(), strict=True))


def _text(value: object, where: str) -> str:
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, float | decimal.Decimal) and math.isfinite(value) and value == int(value):
        return str(int(value))
    if isinstance(value, _PLAIN):
        return str(value)
    raise ShardError(
        f"{printable(where)}: holds {_kind(value)}, where a text or a number belongs; write it as "
        "a column of its own",
        exit_code=3,
    )


def _kind(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a structure of {printable(', '.join(map(str, value)), 60)}"
    return "bytes" if isinstance(value, bytes) else f"a {type(value).__name__}"
