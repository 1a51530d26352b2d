"""Write files and folders whole: a temporary beside the target, fsync, then a rename.

`with atomic_write(path) as out:` is the one way a file comes to be in this project. Whoever reads
`path` finds the old file or the new one, never half of it; an error leaves the old one. Files get
mode 0666 & ~umask, whatever library wrote their bytes.

A temporary is named `.<target>.<host>-<process>-<start>-<number>.part`. Those of a living process
are nobody else's; those of a dead process of this machine are recognised by that exact pattern and
may be removed (`remove_stale_temporaries`).
"""

import contextlib
import ctypes
import errno
import functools
import hashlib
import itertools
import os
import re
import shutil
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, TextIO, overload

import msgspec

from shards.errors import ShardError
from shards.source_files import open_regular

Durable = Literal["nothing", "bytes", "name"]
"""What survives a power failure right after a write: nothing for certain, the bytes if the name
does, or both."""

_LONGEST_LABEL = 120
_HEAD_BYTES = 1 << 16
_NEW = ".lmcl-new"
"""In a folder of `atomic_folder` until it has its name: tells it from one that it replaced."""
_TEMPORARY = re.compile(
    r"\..{1,120}\.(?P<host>[0-9a-f]{8})(?P<boot>[0-9a-f]{8})-(?P<pid>[0-9]{1,10})"
    r"-(?P<start>[0-9]{1,20})-[0-9]{1,10}\.part",
    re.DOTALL,
)
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """Which process of which machine; two of them are equal only if they are the same process."""

    host: str
    """Name of the machine."""
    machine: str
    """Its `/etc/machine-id`, empty where there is none."""
    boot: str
    """Identity of the running kernel and of the process number's name space."""
    pid: Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
    """Process number."""
    start: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
    """When it started, in the kernel's clock ticks since boot; 0 where that is not known."""

    @property
    def is_alive(self) -> bool | None:
        """Whether it still runs; None if that cannot be seen from this process."""
        here = this_process()
        if (self.host, self.machine, self.boot) == (here.host, here.machine, here.boot):
            return _runs(self.pid, self.start)
        is_same_machine = self.host == here.host and self.machine == here.machine != ""
        has_other_kernel = self.boot.partition("/")[0] != here.boot.partition("/")[0]
        return False if is_same_machine and has_other_kernel else None


def this_process() -> ProcessId:
    """The process that asks; a fork gets its own."""
    return _identity(os.getpid())


@functools.lru_cache(maxsize=4)
def _identity(pid: int) -> ProcessId:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    return ProcessId(
        host=socket.gethostname(),
        machine=_line("/etc/machine-id"),
        boot=f"{_line('/proc/sys/kernel/random/boot_id')}/{namespace}",
        pid=pid,
        start=_start_of(pid) or 0,
    )


def _line(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _start_of(pid: int) -> int | None:
    """Clock ticks between boot and the start of a process; None if it is gone or not to be seen."""
    try:
        status = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    # The second field is the program's name in brackets and may hold anything.
    fields = status.rpartition(b")")[2].split()
    is_over = fields[0] in (b"Z", b"X")
    return None if is_over else int(fields[19])


def _runs(pid: int, start: int) -> bool:
    if start:
        return _start_of(pid) == start
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@overload
def atomic_write(
    path: str | Path, mode: Literal["wb"] = "wb", *, durable: Durable = "name"
) -> contextlib.AbstractContextManager[BinaryIO]: ...
@overload
def atomic_write(
    path: str | Path, mode: Literal["w"], *, durable: Durable = "name"
) -> contextlib.AbstractContextManager[TextIO]: ...
@contextmanager
def atomic_write(
    path: str | Path, mode: Literal["wb", "w"] = "wb", *, durable: Durable = "name"
) -> Iterator[Any]:
    """A stream whose file stands under `path` only if the block ends well.

    Args:
        path: Of the file; its folder is made if need be. A link is replaced, not followed.
        mode: `wb` for bytes, `w` for UTF-8 text whose line ends are written as given.
        durable: Less than `name` is for files that are settled later, or can be made again.

    Raises:
        OSError: If it cannot be written; the temporary is gone and an old file is as it was.
    """
    with atomic_path(path, durable=durable) as temporary:
        encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
        with open(temporary, mode, encoding=encoding, newline=newline) as out:
            yield out


@contextmanager
def atomic_path(path: str | Path, *, durable: Durable = "name") -> Iterator[Path]:
    """`atomic_write` for libraries that want a path: an empty file to be written over.

    Args:
        path: As in `atomic_write`.
        durable: As in `atomic_write`.

    Raises:
        OSError: As in `atomic_write`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    # The kernel applies the umask here, so nothing has to be known about it.
    handle = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        yield temporary
        if stat.S_IMODE(temporary.stat().st_mode) != mode:
            temporary.chmod(mode)  # a library that makes its files private (safetensors)
        if durable != "nothing":
            sync(temporary)
        os.replace(temporary, target)
    except OSError as error:
        if error.filename in (None, str(temporary), temporary):
            error.filename = str(target)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if durable == "name":
        sync(target.parent)


def check_own(path: str | Path, mark: bytes) -> None:
    """Refuse to replace a file that the same command has not written.

    Outputs that are named by hand are easily mistyped: `--sheet photo.jpg`, overlays into the
    folder of the photographs.

    Args:
        path: What is to be written; nothing need be there.
        mark: Bytes that stand near the beginning of every file the command writes.

    Raises:
        ShardError: If something else is there; exit code 2.
    """
    if not os.path.lexists(path):
        return
    head = b""
    with contextlib.suppress(ShardError), open_regular(path, limit_bytes=1 << 40) as file:
        head = file.read(_HEAD_BYTES)
    if mark not in head:
        raise ShardError(
            f"{path}: is there already and was not written by this command, so it is not replaced; "
            "choose another name, or move it away",
            exit_code=2,
        )


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A new folder, filled in the block, that then stands under `path` as a whole.

    A folder that is there is replaced in one step where the file system can exchange two names
    (Linux's own can, NFS cannot: there a crash between two renames leaves the old one beside the
    target, under a temporary name). What the old one held under names that the new one does not
    have is moved into the new one: nothing but what was replaced is removed. What an earlier call
    that was killed has left half done is brought to its end first.

    Raises:
        OSError: If it cannot be written; an old folder is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _settle_folders(target)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        (temporary / _NEW).touch()
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        replaced = _swap(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            _remove_new(temporary)
        raise
    sync(target.parent)
    (target / _NEW).unlink()
    if replaced is not None:
        _retire(replaced, target)


def _settle_folders(target: Path) -> None:
    """Bring to its end what killed calls of `atomic_folder` have left beside their target.

    A new folder that was not finished is removed; from a replaced one, what the new one does not
    have is moved there; an old one whose successor never took its name gets it back.
    """
    label = _label_of(temporary_beside(target))
    stale = [path for path in _stale_temporaries(target.parent) if _label_of(path) == label]
    folders = [path for path in stale if path.is_symlink() or path.is_dir()]
    new = [path for path in folders if not path.is_symlink() and os.path.lexists(path / _NEW)]
    with contextlib.suppress(OSError):  # what cannot be settled stays, and stands in nobody's way
        for old in [path for path in folders if path not in new]:
            if os.path.lexists(target) or not os.listdir(old):
                _retire(old, target)
            else:
                os.rename(old, target)
        for folder in new:
            _remove_new(folder)
        if not target.is_symlink():
            (target / _NEW).unlink(missing_ok=True)


def _remove_new(folder: Path) -> None:
    """Remove a folder that `atomic_folder` made; its mark goes last, as what tells it."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif entry.name != _NEW:
            os.unlink(entry.path)
    (folder / _NEW).unlink(missing_ok=True)
    folder.rmdir()


def _label_of(temporary: Path) -> str:
    return temporary.name.rpartition(".part")[0].rpartition(".")[0]


def temporary_beside(target: Path) -> Path:
    """A name for a temporary of this process next to `target`, used by nobody else."""
    me = this_process()
    label = target.name
    if len(os.fsencode(label)) > _LONGEST_LABEL:
        label = _short(label) * 2
    number = next(_numbers)
    name = f".{label}.{_short(me.host + me.machine)}{_short(me.boot)}-{me.pid}-{me.start}-{number}"
    return target.with_name(f"{name}.part")


def is_temporary(name: str) -> bool:
    """Whether a file name is one that `temporary_beside` gives."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_stale_temporaries(folder: str | Path) -> int:
    """Remove what dead processes of this machine left half-written in a folder.

    Only files whose names this module gives, whose process is seen to be gone. Those of other
    machines and of living processes stay, as do folders and links.

    Returns:
        How many were removed.
    """
    removed = 0
    for path in _stale_temporaries(folder):
        if path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.unlink()
                removed += 1
    return removed


def _stale_temporaries(folder: str | Path) -> list[Path]:
    """What dead processes of this machine left in a folder under names of this module."""
    me = this_process()
    host, boot = _short(me.host + me.machine), _short(me.boot)
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(folder)
    return [
        Path(folder, name)
        for name in sorted(names)
        if (found := _TEMPORARY.fullmatch(name)) is not None
        and (found["host"], found["boot"]) == (host, boot)
        and not _runs(int(found["pid"]), int(found["start"]))
    ]


def sync(path: str | Path) -> None:
    """Wait until a file's bytes, or the names in a folder, are on disk.

    Raises:
        OSError: If a file's bytes cannot be brought to disk. Of a folder, only what says that
            the disk fails: some file systems cannot do it, and it may be unreadable.
    """
    is_folder = os.path.isdir(path)
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if not (is_folder and error.errno in _NO_SYNC):
            raise


_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _swap(temporary: Path, target: Path) -> Path | None:
    """Give `temporary` the name `target`; returns where the old `target` is now, if there was."""
    if not os.path.lexists(target):
        os.rename(temporary, target)
        return None
    if _exchange(temporary, target):
        return temporary
    aside = temporary_beside(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    return aside


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    here, both = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(rename(here, os.fsencode(first), here, os.fsencode(second), both) == 0)


def _retire(old: Path, new: Path) -> None:
    """Remove from a replaced folder what the new one has too; move the rest into the new one."""
    if old.is_symlink() or not old.is_dir():
        old.unlink()
        return
    for name in os.listdir(old):
        before, after = old / name, new / name
        if not os.path.lexists(after):
            os.rename(before, after)
        elif after.is_dir() and not after.is_symlink():
            _retire(before, after)
        else:
            _retire_under_file(before)
    old.rmdir()


def _retire_under_file(before: Path) -> None:
    if before.is_dir() and not before.is_symlink():
        # A folder where the new one has a file: its contents are not ours to remove.
        raise FileExistsError(
            errno.EEXIST, "is a folder where a file was written; it was kept", str(before)
        )
    before.unlink()
