"""Bounds of configuration fields, said in one way; nan lies in none of them."""

import math
from collections.abc import Mapping


def check_bounds(
    table: str,
    config: object,
    *,
    least: Mapping[str, int] | None = None,
    above: Mapping[str, int] | None = None,
) -> None:
    """Refuse numbers that are too small, infinite or none; fields that are None or text pass.

    Args:
        table: The configuration table, for the message.
        config: Whose fields are looked at.
        least: Fields and the least value each may have.
        above: Fields and the value each must exceed.

    Raises:
        ValueError: Names the first field that breaks its bound.
    """
    for name, bound in (least or {}).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not bound <= value < math.inf:
            raise ValueError(f"{table}.{name} must be a number >= {bound}, got {value}")
    for name, bound in (above or {}).items():
        value = getattr(config, name)
        if isinstance(value, int | float) and not bound < value < math.inf:
            raise ValueError(f"{table}.{name} must be a number > {bound}, got {value}")
