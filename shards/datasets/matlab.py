"""Label files that MATLAB wrote."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.datasets.foreign import read_in_child
from shards.errors import ShardError
from shards.text import printable

_MOST_BYTES = 256 << 20
_MOST_ENTRIES = 10_000_000


def load_numbers(path: Path, names: Sequence[str]) -> list[NDArray[np.float64]]:
    """Variables of numbers in a `.mat` file, each flattened; NaN stays NaN.

    Raises:
        ShardError: If the file is damaged, or a variable is missing or holds no numbers.
    """
    found = []
    for name, value in zip(names, _load(path, names), strict=True):
        if not all(isinstance(number, int | float) for number in value):
            raise ShardError(f"{printable(path)}: {name} holds no numbers", exit_code=3)
        found.append(np.array(value, np.float64))
    return found


def load_strings(path: Path, name: str) -> list[str]:
    """A cell array of strings in a `.mat` file; each cell holds one string.

    Raises:
        ShardError: If the file is damaged, or has no such variable.
    """
    return [str(value) for value in _load(path, [name])[0]]


def _load(path: Path, names: Sequence[str]) -> list[list[Any]]:
    reader = "shards.datasets.matlab:variables"
    return list(read_in_child(reader, path, list(names), limit_bytes=_MOST_BYTES))


def variables(path: Path, names: Sequence[str]) -> Iterator[list[Any]]:
    """Read variables in this process: run by `read_in_child`."""
    import scipy.io  # a third of a second that only sets with .mat files need

    content = scipy.io.loadmat(str(path), variable_names=list(names))
    for name in names:
        if name not in content:
            known = ", ".join(printable(found[0], 60) for found in scipy.io.whosmat(str(path)))
            raise ShardError(
                f"{printable(path)}: has no variable {name!r}, only {known or 'none'}; is it the "
                "label file?",
                exit_code=3,
            )
        values = np.asarray(content[name]).ravel()
        if values.size > _MOST_ENTRIES:
            raise ShardError(f"{printable(path)}: {name} has {values.size:,} entries", exit_code=3)
        if values.dtype == object:
            yield [_string(cell) for cell in values]
        else:
            yield values.tolist() if values.dtype.kind in "biuf" else [str(v) for v in values]


def _string(cell: object) -> str:
    """The one string of a cell, which may lie in arrays of one element."""
    for _ in range(8):
        if not isinstance(cell, np.ndarray):
            break
        cell = cell.ravel()[0] if cell.size else ""
    return printable(cell, 1000).strip()
