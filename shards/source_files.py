"""The one reader of files that somebody else names: in a table, a folder, a split, a configuration.

Only regular files are opened. A FIFO would wait for a writer for ever, a device never ends, and
opening one may already do something; all are refused by name, without being opened. Size is limited
before anything is read, so a sparse file costs nothing.
"""

import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from shards.errors import ShardError
from shards.text import printable

MAX_FILE_BYTES: Final = 1 << 30
"""A file larger than this is not read into memory."""

MAX_TABLE_BYTES: Final = 1 << 36
"""For tables that are read line by line: ten million rows are one or two gigabytes."""

MAX_LINE_BYTES: Final = 1 << 24
"""A longer line of a table is no line but a file of another kind."""

# What a read asks the system for is allocated at once; images are smaller.
_CHUNK = 1 << 24
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a FIFO (named pipe)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a character device"),
    (stat.S_ISBLK, "a block device"),
)


def open_regular(
    path: str | os.PathLike[str],
    *,
    limit_bytes: int = MAX_FILE_BYTES,
    follow_links: bool = True,
) -> BinaryIO:
    """Open a regular file for reading bytes.

    Args:
        path: The file.
        limit_bytes: Most bytes it may have.
        follow_links: Whether a symbolic link stands for what it points to.

    Raises:
        ShardError: If it is missing (exit code 4), no regular file, too large, or may not be read.
    """
    return os.fdopen(_open(path, limit_bytes, follow_links)[0], "rb")


def read_regular(
    path: str | os.PathLike[str],
    *,
    limit_bytes: int = MAX_FILE_BYTES,
    follow_links: bool = True,
    offset: int = 0,
    size: int | None = None,
) -> bytes:
    """The bytes of a regular file, or `size` of them from `offset` on.

    Args:
        path: The file.
        limit_bytes: Most bytes that are read; a larger file is refused, unless `size` is given.
        follow_links: Whether a symbolic link stands for what it points to.
        offset: First byte, for a file inside an archive.
        size: How many bytes; None for the whole file.

    Raises:
        ShardError: As `open_regular`; also if the file ends before `size` bytes.
    """
    if size is not None and size > limit_bytes:
        raise _too_large(path, size, limit_bytes)
    # Plain system calls: a buffered stream costs three times as much.
    handle, held = _open(path, limit_bytes if size is None else None, follow_links)
    try:
        if offset:
            os.lseek(handle, offset, os.SEEK_SET)
        # Files of /proc claim 0 bytes and hold more: they are read until they end.
        data = _read(handle, (held if size is None else size) or limit_bytes + 1)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        os.close(handle)
    if len(data) > limit_bytes:
        raise _too_large(path, len(data), limit_bytes)
    if size is not None and len(data) != size:
        raise ShardError(
            f"{printable(path)}: ends {size - len(data):,} bytes before the {size:,} from byte "
            f"{offset:,} on; the file is truncated",
            exit_code=3,
        )
    return data


def read_text(path: str | os.PathLike[str], *, limit_bytes: int = MAX_FILE_BYTES) -> str:
    """A text file in UTF-8, or in UTF-16 with its mark; the mark is no part of the text.

    Raises:
        ShardError: As `read_regular`; also if it is no such text.
    """
    data = read_regular(path, limit_bytes=limit_bytes)
    try:
        return data.decode(_encoding(data[:2]))
    except UnicodeError as error:
        raise _not_text(path, error) from error


def text_lines(
    path: str | os.PathLike[str],
    *,
    limit_bytes: int = MAX_TABLE_BYTES,
    encoding: str | None = None,
    errors: str = "strict",
) -> Iterator[str]:
    """The lines of a text file with their ends, one at a time.

    Args:
        path: The file.
        limit_bytes: Most bytes it may have.
        encoding: Default: UTF-8, or UTF-16 with its mark.
        errors: What is done about bytes that are no text, as `bytes.decode` takes it.

    Raises:
        ShardError: As `open_regular`; also if it is no text, or a line is longer than 16 MB.
    """
    with open_regular(path, limit_bytes=limit_bytes) as stream:
        encoding = encoding or _encoding(stream.peek(2)[:2])  # type: ignore[attr-defined]
        text = io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")
        try:
            while line := text.readline(MAX_LINE_BYTES):
                if len(line) == MAX_LINE_BYTES:
                    raise ShardError(
                        f"{printable(path)}: has a line of more than {MAX_LINE_BYTES >> 20} MB; is "
                        "it a text file?",
                        exit_code=3,
                    )
                yield line
        except UnicodeError as error:
            raise _not_text(path, error) from error
        except OSError as error:
            raise _refused(path, error) from error


def is_regular(path: str | os.PathLike[str]) -> bool:
    """Whether there is a regular file, or a link to one; never raises."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):
        return False


def need_regular(path: Path, *, what: str) -> Path:
    """The path itself, if it is a regular file.

    Args:
        path: The file.
        what: The way out, for the message.

    Raises:
        ShardError: If it is missing (exit code 4) or something else.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{printable(path)}: there is no such file; {what}", exit_code=4
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise ShardError(
            f"{printable(path)}: is {_kind(found.st_mode)}, not a file; {what}", exit_code=4
        )
    return path


def _open(
    path: str | os.PathLike[str], limit_bytes: int | None, follow_links: bool
) -> tuple[int, int]:
    """A handle and the file's size; looked at before it is opened, and again after."""
    try:
        found = os.stat(path, follow_symlinks=follow_links)
        _check(path, found, limit_bytes)
        handle = os.open(path, _FLAGS | (0 if follow_links else os.O_NOFOLLOW))
    except (OSError, ValueError) as error:
        raise _refused(path, error) from error
    try:
        found = os.fstat(handle)
        _check(path, found, limit_bytes)
    except BaseException:
        os.close(handle)
        raise
    return handle, found.st_size


def _check(path: str | os.PathLike[str], found: os.stat_result, limit_bytes: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ShardError(
            f"{printable(path)}: is {_kind(found.st_mode)}, not a regular file; name "
            "the file itself",
            exit_code=3,
        )
    if limit_bytes is not None and found.st_size > limit_bytes:
        raise _too_large(path, found.st_size, limit_bytes)


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a symbolic link, which is not followed here"
    return next((name for is_kind, name in _KINDS if is_kind(mode)), "of an unknown kind")


def _read(handle: int, wanted: int) -> bytes:
    data = os.read(handle, min(wanted, _CHUNK))
    if len(data) == wanted:
        return data
    parts, held = [data], len(data)
    while held < wanted and (data := os.read(handle, min(wanted - held, _CHUNK))):
        parts.append(data)
        held += len(data)
    return b"".join(parts)


def _encoding(begin: bytes) -> str:
    return "utf-16" if begin in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _too_large(path: str | os.PathLike[str], size: int, limit_bytes: int) -> ShardError:
    return ShardError(
        f"{printable(path)}: {size:,} bytes, more than the {limit_bytes:,} such a file may have; "
        "name another file, or leave it out",
        exit_code=3,
    )


def _not_text(path: str | os.PathLike[str], error: UnicodeError) -> ShardError:
    return ShardError(
        f"{printable(path)}: cannot be read as text ({printable(error)}); save it as UTF-8",
        exit_code=3,
    )


def _refused(path: str | os.PathLike[str], error: OSError | ValueError) -> ShardError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ShardError(f"{printable(path)}: there is no such file", exit_code=4)
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return ShardError(f"{printable(path)}: cannot be read ({printable(reason)})", exit_code=4)
