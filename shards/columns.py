"""Columns of a large sample table as files that all processes of a machine map.

A column read from Parquet is memory of the process that read it, once per rank. The same numbers in
a file that is mapped lie in the page cache, once per machine, and can be dropped when memory is
short. Files are made on first use and never changed: they appear by rename, complete, below a name
that says which sample table they were made from. Whatever is missing, damaged or cannot be written
costs memory, never an answer (docs/decisions/0307).
"""

import contextlib
import fcntl
import io
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

_log = logging.getLogger(__name__)

COLUMNS = ".columns"
"""Folder of the files, in the set's own folder or, where that is read-only or remote, the cache."""

SHARED_FROM_ROWS = 131_072
"""Smaller tables are read into memory: at most 12 MB, and no files beside every small set."""

Pieces = Callable[[], Iterable[NDArray[Any]]]

_WAIT_S = 120.0
_POLL_S = 0.05


class ColumnFiles:
    """The arrays that were made from one sample table, by name."""

    def __init__(self, folders: Sequence[Path], key: str) -> None:
        """Nothing is looked at or made before an array is asked for.

        Args:
            folders: Where the files may lie; the first that can be written to gets new ones.
            key: Names the sample table; files of another key are not seen, and removed.
        """
        self._folders = [folder / key for folder in folders]

    def get(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """The array of this name, mapped and read-only; None if there is no sound file of it."""
        for folder in self._folders:
            array = _mapped(folder / f"{name}.npy", np.dtype(dtype), shape)
            if array is not None:
                return array
        return None

    def make(
        self, name: str, dtype: Any, shape: tuple[int, ...], pieces: Pieces
    ) -> NDArray[Any] | None:
        """The array of this name, made from its pieces if need be; None if no folder takes it.

        Of several processes that ask at the same time one makes the file, the others wait for it.

        Raises:
            ValueError: If the pieces are of another type than `dtype`, or not `shape` in all.
        """
        found = self.get(name, dtype, shape)
        if found is not None:
            return found
        for folder in self._folders:
            try:
                _prepare(folder)
                with _alone(folder / "lock"):
                    target = folder / f"{name}.npy"
                    if _mapped(target, np.dtype(dtype), shape) is None:
                        _write(target, np.dtype(dtype), shape, pieces())
            except OSError as error:
                _log.debug("%s: cannot keep %s there (%s)", folder, name, error)
            else:
                return _mapped(target, np.dtype(dtype), shape)
        _log.warning(
            "%s of the sample table is kept in this process's own memory, because none of %s can "
            "be written to; set LMCL_CACHE to a folder that can",
            name,
            ", ".join(str(folder.parent) for folder in self._folders),
        )
        return None

    def drop(self, name: str) -> None:
        """Remove an array whose contents turned out to be wrong; it is made anew when needed."""
        for folder in self._folders:
            with contextlib.suppress(OSError):
                (folder / f"{name}.npy").unlink(missing_ok=True)


def table_key(path: Path, sha256: str) -> str:
    """A name for a sample table: the manifest's hash, and length and time of change of the file."""
    status = path.stat()
    return f"v1-{sha256[:16]}-{status.st_size}-{status.st_mtime_ns}"


def _prepare(folder: Path) -> None:
    if folder.is_dir():
        return
    folder.mkdir(parents=True, exist_ok=True)
    # What was made from an earlier table of this set; whoever has it mapped keeps the pages.
    for other in folder.parent.iterdir():
        if other.name != folder.name and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    # What the file must begin with and how long it must be is known, so nothing in it is believed.
    header = _header(dtype, shape)
    expected = len(header) + math.prod(shape) * dtype.itemsize
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != expected:
                _log.debug("%s: is not %s of %s; made anew", path, shape, dtype)
                return None
            if expected == len(header):
                return np.empty(shape, dtype)  # nothing cannot be mapped
            array = np.memmap(file, dtype, mode="r", offset=len(header), shape=shape)
    except OSError:
        return None
    # A plain view: numpy's memmap class costs microseconds at every slice.
    return array.view(np.ndarray)


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    out = io.BytesIO()
    npy.write_array_header_1_0(out, {"descr": dtype.str, "fortran_order": False, "shape": shape})
    return out.getvalue()


def _write(
    target: Path, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]
) -> None:
    # Written rather than filled through a map: a full disk is then an error and not a signal.
    temporary = target.with_name(f".{target.name}.{os.getpid()}.part")
    rows = 0
    try:
        with temporary.open("wb") as out:
            out.write(_header(dtype, shape))
            for piece in pieces:
                if piece.dtype != dtype or piece.shape[1:] != shape[1:]:
                    raise ValueError(f"{target.stem} holds {piece.dtype}, it should be {dtype}")
                out.write(np.ascontiguousarray(piece).data)
                rows += len(piece)
            if rows != shape[0]:
                raise ValueError(f"{target.stem} has {rows} values, it should have {shape[0]}")
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Let one process of those that start together make a file, the others wait for it.

    Only to spare work: a file system without locks, or an owner that is stuck, ends in the same
    file being written twice, which does no harm.
    """
    with path.open("ab") as lock:
        give_up = time.monotonic() + _WAIT_S
        while time.monotonic() < give_up:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_POLL_S)
            except OSError:
                break
            else:
                break
        yield
