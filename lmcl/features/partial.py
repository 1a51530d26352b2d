"""Feature file in the making: an array on disk that a later process fills further.

Features take minutes to an hour; a run that was stopped while it made them leaves what it has under
`.NAME.partial`, with the number of finished batches beside it, and the next run goes on from there.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from pipeline.batch import CropBatch
from pipeline.loader import Loader
from shards.errors import ShardError
from shards.files import atomic_write
from shards.lock import LockedError, lock_path
from shards.progress import progress_bar
from shards.source_files import read_regular
from shards.text import printable

logger = logging.getLogger(__name__)

_POLL_S = 2.0
_MOST_NOTE_BYTES = 4096
_SETTLE = 25
"""Batches between two places to go on from."""


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """How far a partial file is; JSON beside it."""

    batches: int
    shape: tuple[int, ...]
    dtype: str


class PartialFeatures:
    """The array of a feature file that is being made.

    Args:
        path: The file it becomes.
        shape: Of the array.
        dtype: Of its numbers.

    Raises:
        LmclError: If the disk has no room for it; nothing is left then.
    """

    def __init__(self, path: Path, *, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self.path, self._shape, self._dtype = path, shape, dtype
        self._file = path.with_name(f".{path.name}.partial")
        self._note = path.with_name(f".{path.name}.partial.json")
        self.batches = self._read_note() if self._file.is_file() else 0
        """Finished ones; those of an earlier process count."""
        self.values = self._open()

    def save(self, batches: int) -> None:
        """Settle what is written so far: a later process goes on after `batches`."""
        self.values.flush()
        self.batches = batches
        note = _Note(batches=batches, shape=self._shape, dtype=str(self._dtype))
        with atomic_write(self._note) as out:
            out.write(msgspec.json.encode(note))

    def finish(self) -> None:
        """Give the whole array its name."""
        self.values.flush()
        with self._file.open("rb") as file:
            os.fsync(file.fileno())
        self._file.rename(self.path)
        self._note.unlink(missing_ok=True)

    def _open(self) -> np.memmap:
        if self.batches:
            return np.load(self._file, mmap_mode="r+")  # type: ignore[no-any-return]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._note.unlink(missing_ok=True)
        values = np.lib.format.open_memmap(
            self._file, mode="w+", dtype=self._dtype, shape=self._shape
        )
        try:
            _preallocate(self._file)
        except OSError as error:
            self._file.unlink()
            raise LmclError(
                f"{self.path}: the features take {values.nbytes / 1e9:.1f} GB, and there is no "
                f"room for them ({error}); set runtime.cells to a folder on a larger disk, or to "
                "'' to see pixels"
            ) from error
        return values

    def _read_note(self) -> int:
        """Finished batches of an earlier process; 0 if its file is of no use."""
        try:
            data = read_regular(self._note, limit_bytes=_MOST_NOTE_BYTES)
            note = msgspec.json.decode(data, type=_Note)
            found = np.load(self._file, mmap_mode="r")
        except (ShardError, OSError, ValueError, EOFError, msgspec.DecodeError):
            return 0
        is_same = (found.shape, str(found.dtype)) == (self._shape, str(self._dtype))
        return note.batches if is_same and note.shape == self._shape else 0


@contextmanager
def hold_file(path: Path, purpose: str) -> Iterator[None]:
    """Hold a feature file while it is made; another run that makes it is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_told = False
    while True:
        try:
            with lock_path(path, purpose):
                yield
            return
        except LockedError as error:
            if not is_told:
                logger.info("waiting for another run that makes these features (%s)", error)
            is_told = True
            time.sleep(_POLL_S)


def tell_cost(folder: Path, size_bytes: int, what: str) -> None:
    """Say what features will take before they are made.

    Raises:
        LmclError: If the disk has less room than that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    logger.info(
        "%s: %s will take %.2f GB (%.1f GB are free)", folder, what, size_bytes / 1e9, free / 1e9
    )
    if size_bytes > free:
        raise LmclError(
            f"{printable(folder)}: {what} would take {size_bytes / 1e9:.2f} GB, and "
            f"{free / 1e9:.2f} GB are free; set runtime.cells to a folder on a larger disk, lower "
            "crops.pool, or set runtime.cells = '' to see pixels"
        )


def _preallocate(file: Path) -> None:
    """Take the disk space now: a full disk in a mapped file is a fatal signal (SIGBUS)."""
    size = file.stat().st_size
    with file.open("rb+") as opened:
        os.posix_fallocate(opened.fileno(), 0, size)


def fill_by_batches(
    partial: PartialFeatures,
    loader: Loader,
    ids: NDArray[np.int64],
    features: Callable[[CropBatch], NDArray[np.generic]],
    *,
    title: str,
    progress: bool,
) -> None:
    """Fill a partial file from where it is and finish it; a stopped process is gone on with.

    Args:
        partial: The file.
        loader: Over `ids`; it is closed.
        ids: Images in the order of the file's rows, rising.
        features: Rows `[n, ...]` of a batch's valid images, in the file's type.
        title: Of the progress bar.
        progress: Whether to show it.
    """
    with loader:
        start = partial.batches
        steps = progress_bar(
            loader.epoch(0, start=start),
            initial=start,
            total=loader.steps,
            desc=title,
            unit="batch",
            leave=False,
            off=not progress,
        )
        for done, batch in enumerate(steps, start=start + 1):
            rows = np.searchsorted(ids, batch.ids.cpu()[batch.valid.cpu()].numpy())
            partial.values[rows] = features(batch)
            if done % _SETTLE == 0:
                partial.save(done)
    partial.finish()
