"""Files of a run folder that may be a stranger's: nothing outside it is ever read.

A report is made to be passed on, so whatever it reads may be published. A link in a run folder
could lead to any file of whoever makes the report; links below the folder are not followed, neither
of files nor of folders. Only regular files are opened, and their size is limited before they are.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from lmcl.errors import LmclError
from shards.text import printable

MAX_DOCUMENT_BYTES: Final = 1 << 23
"""Of config.toml, protocol.json, environment.json, metrics.json and the scope of predictions."""
MAX_TABLE_BYTES: Final = 1 << 28
"""Of a predictions file: two million images; of log.jsonl and of embeddings.npz."""
MAX_PICTURE_BYTES: Final = 1 << 20
"""Of a thumbnail or an attention map; the longer side of ours is 192 pixels."""
_MOST_NAMES = 200_000
"""Names of a folder that are looked at."""

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RunFileError(LmclError):
    """A file of a run folder that is not read.

    Attributes:
        name: Its place in the folder.
        reason: Why it is not read.
        is_missing: Whether there is none.
    """

    def __init__(self, root: Path, name: str, reason: str, *, is_missing: bool = False) -> None:
        super().__init__(f"{printable(root / name)}: {reason}", exit_code=4 if is_missing else 3)
        self.name = name
        self.reason = reason
        self.is_missing = is_missing


def open_run_file(root: Path, name: str, *, limit_bytes: int) -> BinaryIO:
    """Open a regular file inside a run folder.

    Args:
        root: The run folder, which may itself be named by a link.
        name: Place of the file below it, e.g. `thumbs/7.jpg`.
        limit_bytes: Most bytes it may have.

    Raises:
        RunFileError: If it is missing (exit code 4), a link, no regular file, or too large (3).
    """
    *folders, last = name.split("/")
    try:
        with _folder(root, folders) as folder:
            # A device does something by being opened, so it is looked at first.
            _check(os.stat(last, dir_fd=folder, follow_symlinks=False), root, name, limit_bytes)
            handle = os.open(last, _FILE, dir_fd=folder)
    except (OSError, ValueError) as error:
        raise _refused(root, name, error) from error
    try:
        _check(os.fstat(handle), root, name, limit_bytes)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def read_run_file(root: Path, name: str, *, limit_bytes: int = MAX_DOCUMENT_BYTES) -> bytes:
    """The bytes of a regular file inside a run folder.

    Raises:
        RunFileError: As `open_run_file`.
    """
    with open_run_file(root, name, limit_bytes=limit_bytes) as stream:
        # One that grows meanwhile is cut off: half a document is no document.
        return stream.read(limit_bytes)


def list_run_files(root: Path, name: str) -> tuple[frozenset[str], int]:
    """Names of the regular files in a folder of a run, and how many links and others it holds.

    A folder that is missing, or a link, holds nothing.
    """
    regular, others = set(), 0
    try:
        with _folder(root, name.split("/")) as folder, os.scandir(folder) as entries:
            for _, entry in zip(range(_MOST_NAMES), entries, strict=False):
                if entry.is_file(follow_symlinks=False):
                    regular.add(entry.name)
                elif not entry.is_dir(follow_symlinks=False):
                    others += 1
    except OSError:
        return frozenset(), 0
    return frozenset(regular), others


@contextmanager
def _folder(root: Path, folders: list[str]) -> Iterator[int]:
    """A handle of a folder below the root that no link leads to."""
    handle = os.open(root, _FOLDER & ~os.O_NOFOLLOW)
    try:
        for name in folders:
            below = os.open(name, _FOLDER, dir_fd=handle)
            os.close(handle)
            handle = below
        yield handle
    finally:
        os.close(handle)


def _check(found: os.stat_result, root: Path, name: str, limit_bytes: int) -> None:
    if stat.S_ISLNK(found.st_mode):
        raise RunFileError(root, name, "is a link, and a report does not follow links")
    if not stat.S_ISREG(found.st_mode):
        raise RunFileError(root, name, "is no regular file")
    if found.st_size > limit_bytes:
        raise RunFileError(
            root, name, f"has {found.st_size:,} bytes, more than the {limit_bytes:,} it may have"
        )


def _refused(root: Path, name: str, error: OSError | ValueError) -> RunFileError:
    if isinstance(error, FileNotFoundError):
        return RunFileError(root, name, "is missing", is_missing=True)
    if isinstance(error, NotADirectoryError):
        return RunFileError(root, name, "lies behind a link, and a report does not follow links")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return RunFileError(root, name, f"cannot be read ({printable(reason)})")
