"""Files that are either whole or not there."""

from pathlib import Path

from lmcl.errors import LmclError
from shards.files import atomic_write


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it (`shards.files.atomic_write`)."""
    with atomic_write(path) as out:
        out.write(data.encode("utf-8") if isinstance(data, str) else data)


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
