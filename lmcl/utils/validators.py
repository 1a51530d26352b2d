"""Bounds of configuration fields, said in one way; nan lies in none of them."""

import math
from collections.abc import Mapping


def check_bounds(
    table: str,
    config: object,
    *,
    least: Mapping[str, int] | None = None,
    above: Mapping[str, int] | None = None,
    most: Mapping[str, int] | None = None,
) -> None:
    """Refuse numbers that are too small, too large, infinite or none; None and text pass.

    Args:
        table: The configuration table, for the message.
        config: Whose fields are looked at.
        least: Fields and the least value each may have.
        above: Fields and the value each must exceed.
        most: Fields and the largest value each may have: beyond any sensible one, and far below
            what ends in an overflow, a crash of a library or a machine without memory.

    Raises:
        ValueError: Names the first field that breaks its bound.
    """
    for name, bound in (least or {}).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not bound <= value < math.inf:
            raise ValueError(f"{table}.{name} must be a number >= {bound}, got {_short(value)}")
    for name, bound in (above or {}).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not bound < value < math.inf:
            raise ValueError(f"{table}.{name} must be a number > {bound}, got {_short(value)}")
    for name, bound in (most or {}).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not value <= bound:
            raise ValueError(f"{table}.{name} must be a number <= {bound}, got {_short(value)}")


def _short(value: int | float) -> str:
    # str() of an integer of thousands of digits is refused by Python itself.
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    return str(value)
