"""Label files that MATLAB wrote."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError


def load_mat(path: Path, name: str) -> NDArray[Any]:
    """One variable of a `.mat` file, flattened.

    Raises:
        ShardError: If the file is damaged or has no such variable.
    """
    import scipy.io  # a third of a second that only sets with .mat files need

    try:
        content = scipy.io.loadmat(str(path))
    except Exception as error:
        # A damaged file makes the reader fail in many ways (zlib.error, struct.error, ...).
        raise ShardError(
            f"{path}: cannot be read as a MATLAB file ({error}); unpack it again", exit_code=3
        ) from error
    if name not in content:
        known = ", ".join(key for key in content if not key.startswith("__"))
        raise ShardError(
            f"{path}: has no variable {name!r}, only {known or 'none'}; is it the label file?",
            exit_code=3,
        )
    return np.asarray(content[name]).ravel()


def strings(cells: NDArray[Any]) -> list[str]:
    """A cell array of strings as a list; each cell holds one string."""
    texts = []
    for cell in cells:
        value = cell
        while isinstance(value, np.ndarray):
            value = value.ravel()[0] if value.size else ""
        texts.append(str(value).strip())
    return texts
