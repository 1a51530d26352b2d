"""A number between two ends on a command line: NaN, which compares with nothing, lies in none."""

import math
from typing import Any

import click


class NumberRange(click.FloatRange):
    """click's range of numbers, which lets NaN through; this one does not."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a usage error if it is none, or lies outside."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"nan is not in the range {self._describe_range()}.", param, ctx)
        return number
