"""One job at a time in a run folder, a scores file or a set folder.

`with lock_path(path, "lmcl train"):` holds the path for this process. A second comer gets one
sentence that says who holds it (program, process, machine, since when) and exit code 2. The lock is
a file that names its holder, made in one step by a hard link, which works on network file systems
too. A lock whose holder is gone is recognised on the machine it was made on (also after a restart,
and when the process number is in use again) and taken over; that of another machine never is: the
sentence then says which file to remove.
"""

import contextlib
import errno
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from shards.errors import ShardError
from shards.files import ProcessId, temporary_beside, this_process
from shards.text import printable

LOCK_NAME = ".lmcl.lock"
"""Name of the lock inside a folder."""

_LIMIT_BYTES = 4096
_UNREADABLE_WAIT_S = 2.0
_POLL_S = 0.05
_TRIES = 100
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock; the contents of its file, as JSON."""

    process: ProcessId
    """The process that took it."""
    command: str
    """Program and command, without arguments: those may hold secrets."""
    purpose: str
    """What it is doing with the path."""
    since: str
    """When it took the lock, UTC."""


class LockedError(ShardError):
    """Another process works on the same path; exit code 2."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message, exit_code=exit_code)


def lock_file_of(path: str | Path) -> Path:
    """Where the lock of a path lies: inside a folder, beside a file or what is yet to be made."""
    path = Path(path)
    return path / LOCK_NAME if path.is_dir() else path.with_name(f".{path.name}{LOCK_NAME}")


@contextmanager
def lock_path(path: str | Path, purpose: str) -> Iterator[Holder]:
    """Hold a folder or an output file while the block runs.

    Args:
        path: An existing folder, or a file that is there or yet to be made.
        purpose: What is being done, for the sentence another process gets: `lmcl train`.

    Raises:
        LockedError: If another process holds it (exit code 2); this one does count as another.
        ShardError: If the lock cannot be written.
    """
    with lock_at(lock_file_of(path), purpose, what=str(path)) as holder:
        yield holder


@contextmanager
def lock_folder(folder: str | Path, purpose: str) -> Iterator[Holder]:
    """`lock_path` for a folder that is made if it is not there yet.

    Raises:
        LockedError: As in `lock_path`.
        ShardError: As in `lock_path`.
    """
    with lock_at(Path(folder) / LOCK_NAME, purpose, what=str(folder)) as holder:
        yield holder


@contextmanager
def lock_at(file: Path, purpose: str, *, what: str) -> Iterator[Holder]:
    """`lock_path` with the lock at a place of the caller's choice, e.g. for a remote folder.

    Raises:
        LockedError: As in `lock_path`.
        ShardError: As in `lock_path`.
    """
    holder = Holder(
        process=this_process(),
        command=_command(),
        purpose=purpose,
        since=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _take(file, holder, what)
    except OSError as error:
        place = next((one for one in (file.parent, *file.parents) if one.exists()), None)
        if place is not None and not place.is_dir():
            raise ShardError(
                f"{what}: {place} is a file, and no folder can be made there; choose another output"
            ) from error
        raise ShardError(
            f"{file}: the lock of {what} cannot be written ({error.strerror or error}); make the "
            "folder writable, or choose another output"
        ) from error
    try:
        yield holder
    finally:
        _release(file, handle)


def _take(file: Path, holder: Holder, what: str) -> int:
    """Make the lock file, or say who has it; returns its open handle, itself locked."""
    for _ in range(_TRIES):
        handle = _create(file, holder)
        if handle is not None:
            return handle
        _remove_if_stale(file, what)
    raise LockedError(f"{what}: its lock {file} changes hands too fast; run the command again")


def _create(file: Path, holder: Holder) -> int | None:
    """A lock file with its contents, in one step; None if there is one already."""
    temporary = temporary_beside(file)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    handle = os.open(temporary, flags, 0o666)
    try:
        os.write(handle, msgspec.json.encode(holder))
        # For a look from another name space of process numbers on this machine (a container).
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _link(temporary, file, handle):
            return handle
    except BaseException:
        os.close(handle)
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    os.close(handle)
    return None


def _link(temporary: Path, file: Path, handle: int) -> bool:
    try:
        os.link(temporary, file)
    except FileExistsError:
        # Over NFS the answer to a link that was made may be lost, and the second try fails.
        return os.fstat(handle).st_nlink == 2
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: the rename below is not looked at by anyone before
        # the exclusive open has succeeded.
        try:
            os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        except FileExistsError:
            return False
        os.replace(temporary, file)
    return True


def _remove_if_stale(file: Path, what: str) -> None:
    """Remove a lock whose holder is gone.

    Raises:
        LockedError: If the holder lives, or it cannot be seen whether it does.
    """
    give_up = time.monotonic() + _UNREADABLE_WAIT_S
    while True:
        try:
            handle = _open(file)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _unreadable(file, what) from error
        try:
            holder = _read(handle)
            if holder is not None:
                _take_over(file, handle, holder, what)
                return
            is_being_written = os.fstat(handle).st_size == 0
        finally:
            os.close(handle)
        if not is_being_written or time.monotonic() > give_up:
            raise _unreadable(file, what)
        time.sleep(_POLL_S)


def _open(file: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(file, os.O_RDWR | flags)  # NFS locks only what may be written
    except PermissionError:
        return os.open(file, os.O_RDONLY | flags)


def _read(handle: int) -> Holder | None:
    """What a lock file says; None if nothing yet, or nothing that this program wrote."""
    try:
        return msgspec.json.decode(os.read(handle, _LIMIT_BYTES), type=Holder)
    except (msgspec.DecodeError, ValueError, RecursionError, OSError):
        return None


def _take_over(file: Path, handle: int, holder: Holder, what: str) -> None:
    if holder.process == this_process():
        raise LockedError(
            f"{what}: this very process works on it already ("
            f"{printable(holder.purpose)}); let that end first"
        )
    is_alive = holder.process.is_alive
    if is_alive or not _alone(handle, is_alive):
        raise LockedError(_sentence(file, holder, what, is_here=is_alive is True))
    # Of several that came here one at a time is let in, and the others find another file.
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle)):
            os.unlink(file)


def _alone(handle: int, is_alive: bool | None) -> bool:
    """Whether nobody has the lock file itself locked.

    Where that cannot be asked, or says nothing: whether the holder is seen to be dead.
    """
    give_up = time.monotonic() + (_UNREADABLE_WAIT_S if is_alive is False else 0.0)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > give_up:
                return False
            time.sleep(_POLL_S)
        except OSError:
            return is_alive is False
        else:
            return True if is_alive is False else _shares_kernel(handle)


def _shares_kernel(handle: int) -> bool:
    """Whether a lock on the file says anything about its holder: it does on one machine only."""
    os.lseek(handle, 0, os.SEEK_SET)
    holder = _read(handle)
    boot = this_process().boot.partition("/")[0]
    return holder is not None and boot != "" and holder.process.boot.partition("/")[0] == boot


def _release(file: Path, handle: int) -> None:
    with contextlib.suppress(OSError):
        # Not a lock that somebody put there after removing this one by hand.
        if os.path.samestat(os.stat(file, follow_symlinks=False), os.fstat(handle)):
            os.unlink(file)
    os.close(handle)


def _sentence(file: Path, holder: Holder, what: str, *, is_here: bool) -> str:
    process = holder.process
    where = "" if is_here else f" on {printable(process.host)}"
    who = (
        f"{what}: in use by `{printable(holder.command)}` (process {process.pid}{where}, "
        f"{printable(holder.purpose)} since {printable(holder.since)} UTC); "
    )
    if is_here:
        return who + "wait until it ends, or choose another output"
    return who + f"if nothing runs there any more, remove {file} and run the command again"


def _unreadable(file: Path, what: str) -> LockedError:
    return LockedError(
        f"{what}: {file} says that it is in use, but not by whom; if no other command works on "
        "it, remove that file and run the command again"
    )


def _command() -> str:
    program = Path(sys.argv[0]).name if sys.argv else ""
    if program in ("__main__.py", "-c", "-m", ""):
        program = "python"
    words = [word for word in sys.argv[1:2] if word.replace("-", "").isalpha()]
    return " ".join([program, *(word for word in words if not word.startswith("-"))])
