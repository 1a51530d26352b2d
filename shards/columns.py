"""Columns of a large sample table as files that all processes of a machine map.

A column read from Parquet is memory of the process that read it, once per rank. The same numbers in
a file that is mapped lie in the page cache, once per machine, and can be dropped when memory is
short. One column is one Arrow IPC file with one record batch. The files lie in the user's cache and
never in the set's folder: whoever packed a set cannot bring them. They stand below the sha256 of
the sample table, computed here. They are made on first use and never changed: they appear by
rename, complete. Whatever is missing, damaged or cannot be written costs memory, never an answer
(docs/decisions/0307, 0207).
"""

import contextlib
import fcntl
import functools
import hashlib
import logging
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.files import atomic_write

_log = logging.getLogger(__name__)

SHARED_FROM_ROWS = 131_072
"""Smaller tables are read into memory: at most 12 MB, and no files for every small set."""

Pieces = Callable[[], Iterable[NDArray[Any]]]

_WAIT_S = 120.0
_POLL_S = 0.05
_LOCK = "lock"
_OURS = re.compile(r"[a-z0-9_]{1,20}\.arrow|split-[0-9a-f]{16,64}-(train|val|test)\.arrow|lock")


class _Hashed(msgspec.Struct, kw_only=True):
    """What is remembered of a sample table, so that it is not hashed at every opening."""

    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int
    sha256: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]


class ColumnFiles:
    """The arrays that were made from one sample table, by name."""

    def __init__(self, cache: Path, table: Path) -> None:
        """Nothing is looked at or made before an array is asked for.

        Args:
            cache: Folder of the files of all tables, in the user's own cache.
            table: The sample table. Its bytes decide which files are seen; files made from earlier
                bytes at the same place are removed.
        """
        self._cache = cache
        self._table = table

    def get(self, name: str, dtype: Any, shape: tuple[int, ...]) -> NDArray[Any] | None:
        """The array of this name, mapped and read-only; None if there is no sound file of it."""
        with contextlib.suppress(OSError):
            return _mapped(self._folder / f"{name}.arrow", np.dtype(dtype), shape)
        return None

    def make(
        self, name: str, dtype: Any, shape: tuple[int, ...], pieces: Pieces
    ) -> NDArray[Any] | None:
        """The array of this name, made from its pieces if need be; None if it cannot be kept.

        Of several processes that ask at the same time one makes the file, the others wait for it.

        Raises:
            ValueError: If the pieces are of another type than `dtype`, or not `shape` in all.
        """
        found = self.get(name, dtype, shape)
        if found is not None:
            return found
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with _alone(self._folder / _LOCK):
                target = self._folder / f"{name}.arrow"
                if _mapped(target, np.dtype(dtype), shape) is None:
                    _write(target, _filled(name, np.dtype(dtype), shape, pieces()))
        except OSError as error:
            _log.warning(
                "%s of the sample table is kept in this process's own memory, because %s cannot be "
                "written to (%s); set LMCL_CACHE to a folder that can",
                name,
                self._cache,
                error.strerror or error,
            )
            return None
        return _mapped(target, np.dtype(dtype), shape)

    def drop(self, name: str) -> None:
        """Remove an array whose contents turned out to be wrong; it is made anew when needed."""
        with contextlib.suppress(OSError):
            (self._folder / f"{name}.arrow").unlink(missing_ok=True)

    @functools.cached_property
    def _folder(self) -> Path:
        return self._cache / _digest(self._cache, self._table)


def _digest(cache: Path, table: Path) -> str:
    """The sha256 of a sample table; remembered by the file's number, length and times."""
    place = hashlib.sha256(os.fsencode(table.resolve())).hexdigest()[:32]
    note = cache / f"{place}.json"
    before, known = _identity(table), _read_note(note)
    if known is not None and msgspec.structs.replace(before, sha256=known.sha256) == known:
        return known.sha256
    with table.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if _identity(table) == before:
        with contextlib.suppress(OSError), atomic_write(note, durable="nothing") as out:
            out.write(msgspec.json.encode(msgspec.structs.replace(before, sha256=digest)))
        if known is not None and known.sha256 != digest:
            _forget(cache / known.sha256)
    return digest


def _identity(table: Path) -> _Hashed:
    status = table.stat()
    return _Hashed(
        inode=status.st_ino,
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        # Set by the system at every change: no archive and no program can bring an old one.
        changed_ns=status.st_ctime_ns,
        sha256="",
    )


def _read_note(note: Path) -> _Hashed | None:
    try:
        return msgspec.json.decode(note.read_bytes(), type=_Hashed)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None


def _forget(folder: Path) -> None:
    """Remove what was made from an earlier table; whoever has it mapped keeps the pages.

    Only names that this module gives, and the folder if nothing else is in it.
    """
    with contextlib.suppress(OSError):
        if folder.is_symlink():
            return
        for name in os.listdir(folder):
            if _OURS.fullmatch(name):
                os.unlink(folder / name)
        folder.rmdir()


def _mapped(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any] | None:
    try:
        with pa.memory_map(os.fspath(path)) as source:
            reader = pa.ipc.open_file(source)
            if reader.schema != _schema(dtype, shape) or reader.num_record_batches != 1:
                raise ValueError("holds another type")
            batch = reader.get_batch(0)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, ValueError) as error:
        _log.debug("%s: is not %s of %s (%s); made anew", path, shape, dtype, error)
        return None
    values, size = batch.column(0), math.prod(shape) * dtype.itemsize
    data = values.buffers()[1]
    if len(values) != shape[0] or values.null_count or (data.size if data else 0) < size:
        _log.debug("%s: is not %s of %s; made anew", path, shape, dtype)
        return None
    if size == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, count=math.prod(shape)).reshape(shape)


def _schema(dtype: np.dtype[Any], shape: tuple[int, ...]) -> pa.Schema:
    # Arrow packs truth values into bits, which numpy cannot map: they lie as bytes.
    if len(shape) > 1:
        kind = pa.binary(math.prod(shape[1:]) * dtype.itemsize)
    else:
        kind = pa.uint8() if dtype == np.bool_ else pa.from_numpy_dtype(dtype)
    return pa.schema([pa.field(dtype.str, kind, nullable=False)])


def _filled(
    name: str, dtype: np.dtype[Any], shape: tuple[int, ...], pieces: Iterable[NDArray[Any]]
) -> NDArray[Any]:
    values, rows = np.empty(shape, dtype), 0
    for piece in pieces:
        if piece.dtype != dtype or piece.shape[1:] != shape[1:]:
            raise ValueError(f"{name} holds {piece.dtype}, it should be {dtype}")
        if rows + len(piece) > shape[0]:
            raise ValueError(f"{name} has more values than the {shape[0]} it should have")
        values[rows : rows + len(piece)] = piece
        rows += len(piece)
    if rows != shape[0]:
        raise ValueError(f"{name} has {rows} values, it should have {shape[0]}")
    return values


def _write(target: Path, values: NDArray[Any]) -> None:
    # Written rather than filled through a map: a full disk is then an error and not a signal.
    schema = _schema(values.dtype, values.shape)
    buffers = [None, pa.py_buffer(values)]
    column = pa.Array.from_buffers(schema.field(0).type, values.shape[0], buffers)
    with (
        atomic_write(target, durable="bytes") as out,
        pa.ipc.new_file(out, schema) as writer,
    ):
        writer.write_batch(pa.record_batch([column], schema=schema))


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
