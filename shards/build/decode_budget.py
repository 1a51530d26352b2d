"""How many pixels all processes that pack a set on one machine decode at once.

A decoded picture takes about four bytes a pixel, so memory is bounded by pixels and not by workers:
ten pictures of 10 megapixels may be open together, and one of 200 goes alone. The count is kept in
locks on the bytes of an empty file, one byte per megapixel: processes that know nothing of each
other but the path share it (Ray's workers on a machine do), and the kernel gives back what a
process held when it dies.
"""

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from shards.errors import ShardError

_SLOT = 1_000_000
_GATE = 0

Decoding = Callable[[int], AbstractContextManager[None]]
"""Given a number of pixels: waits until they may be decoded, and holds them while it is entered."""


class PixelBudget:
    """A share of the machine's memory for decoded pictures, as one process sees it.

    One picture at a time per process: the locks are the process's own, whatever the thread.
    """

    def __init__(self, path: Path, *, pixels: int) -> None:
        """Nothing is opened before a picture is decoded.

        Args:
            path: The file whose bytes are locked; the same for all that share the budget.
            pixels: Decoded at once by all of them together, in whole megapixels, at least one.
        """
        self._path = path
        self._slots = max(1, pixels // _SLOT)
        self._handle: int | None = None

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Wait until `pixels` more may be decoded; they count until the block ends.

        A picture larger than the whole budget waits for all others and then goes alone.

        Raises:
            ShardError: If the file cannot be locked.
        """
        wanted = min(self._slots, max(1, -(-pixels // _SLOT)))
        handle = self._open()
        try:
            taken = self._take(handle, wanted)
        except OSError as error:
            raise ShardError(
                f"{self._path}: cannot be locked ({error}), so nothing would bound the memory of "
                "pictures decoded at once; set TMPDIR to a folder on a local disk"
            ) from error
        try:
            yield
        finally:
            for slot in taken:
                fcntl.lockf(handle, fcntl.LOCK_UN, 1, slot)

    def close(self) -> None:
        """Close the file, which gives back whatever is held; may be called twice."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _take(self, handle: int, wanted: int) -> list[int]:
        # One at a time collects slots: two that each held half of what they want would wait for
        # ever, and a large picture would never see enough of them free.
        fcntl.lockf(handle, fcntl.LOCK_EX, 1, _GATE)
        try:
            taken: list[int] = []
            while len(taken) < wanted:
                busy = self._take_free(handle, wanted, taken)
                if len(taken) < wanted:
                    fcntl.lockf(handle, fcntl.LOCK_EX, 1, busy)
                    taken.append(busy)
            return taken
        finally:
            fcntl.lockf(handle, fcntl.LOCK_UN, 1, _GATE)

    def _take_free(self, handle: int, wanted: int, taken: list[int]) -> int:
        """Add free slots to `taken`, as many as wanted; returns one that was not free."""
        busy = 0
        for slot in range(1, self._slots + 1):
            if len(taken) == wanted:
                break
            if slot in taken:
                continue
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, slot)
            except (BlockingIOError, PermissionError):
                busy = slot
            else:
                taken.append(slot)
        return busy

    def _open(self) -> int:
        if self._handle is None:
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            try:
                self._handle = os.open(self._path, flags, 0o600)
            except OSError as error:
                raise ShardError(
                    f"{self._path}: cannot be opened ({error}); set TMPDIR to a folder that can be "
                    "written to"
                ) from error
        return self._handle


@contextlib.contextmanager
def unbounded(pixels: int) -> Iterator[None]:
    """For whoever decodes one picture at a time."""
    yield


def new_token() -> str:
    """A name for the budget of one build, which nobody else on the machine can guess."""
    return secrets.token_hex(16)


def lock_file(token: str) -> Path:
    """The file that all workers of a build on this machine lock, whatever started them."""
    return Path(tempfile.gettempdir()) / f"lmcl-decode-{token}"
