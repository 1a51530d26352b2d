"""What a cell of a label table means, the same for every format a table may have.

A newcomer's trap: 0, `false` and 0.0 are values. A value is missing if it is null, NaN or a blank
text; where a text belongs, the word `nan` that programs write for NaN is missing too, so that a
CSV means what the same table means in Parquet. Nothing here asks whether a value is true.
"""

import datetime
import decimal
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from shards.errors import ShardError
from shards.text import printable

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})\.0")
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
        text = str(value).strip().removeprefix("\ufeff")
        return float(text) if _NUMBER.fullmatch(text) else math.nan
    except (ValueError, OverflowError):
        return math.nan


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


def one_of(columns: Iterable[str], names: tuple[str, ...], *, where: str) -> str | None:
    """The column that plays a part: the first name if it is there, else the only one of the others.

    Args:
        columns: Names in lower case.
        names: The part's own name first, then what others call it.
        where: For the message.

    Raises:
        ShardError: If several others are there, and not the first.
    """
    there = set(columns)
    found = [name for name in names if name in there]
    if names[0] not in there and len(found) > 1:
        raise ShardError(
            f"{printable(where)}: the columns {' and '.join(map(repr, found))} could all be the "
            f"{names[0]}; rename the one that is meant to {names[0]!r}",
            exit_code=3,
        )
    return found[0] if found else None


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
