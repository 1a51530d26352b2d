"""Files that are either whole or not there."""

import os
import tempfile
from pathlib import Path

from lmcl.errors import LmclError


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode("utf-8") if isinstance(data, str) else data
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            out.write(payload)
            out.flush()
            os.fsync(out.fileno())
        # mkstemp makes the file private; the result should be as readable as any other file.
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def make_output_folder(path: Path) -> None:
    """Make the folder that `--output` names, before the work that would end there.

    Raises:
        LmclError: If a file is in its place, or it cannot be made (exit code 2).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LmclError(
            f"--output {path}: cannot be made a folder ({error.strerror}); name another one",
            exit_code=2,
        ) from error
