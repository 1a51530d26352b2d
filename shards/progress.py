"""How far a long job is: a bar on a terminal, elsewhere one plain line a minute.

A log file full of carriage returns is no use to anybody, and neither is one that says nothing for
an hour.
"""

import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

EVERY_S = 60.0
"""Seconds between lines, and before the first: a job that ends sooner says only that it ended."""
_LINE = "{desc}: {n_fmt} / {total_fmt} {unit}, {rate_fmt}, {remaining} left{postfix}"


def progress_bar(
    iterable: Iterable[Any] | None = None, *, off: bool = False, **options: Any
) -> "tqdm[Any]":
    """A `tqdm` on the standard error output, in words where that is no terminal.

    Args:
        iterable: What is worked through; None: the caller tells by `update`.
        off: Show nothing at all (`--no-progress`, all ranks but the first).
        options: Of `tqdm`: `total`, `desc`, `unit`, `initial`, `leave`.
    """
    if off or sys.stderr is None:
        return tqdm(iterable, disable=True, **options)
    if sys.stderr.isatty():
        return tqdm(iterable, file=sys.stderr, **options)
    plain = {
        "file": _Lines(sys.stderr),
        "bar_format": _LINE,
        "mininterval": EVERY_S,
        "delay": EVERY_S,
        "miniters": 1,
        "leave": False,
    }
    return tqdm(iterable, **(options | plain))


class _Lines:
    """What `tqdm` writes, a line each: it returns to the begin of a line, which a log has not."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what is visible of `text` as a line."""
        line = text.strip()
        if line:
            self._stream.write(f"{line}\n")

    def flush(self) -> None:
        """Hand on what was written."""
        self._stream.flush()
