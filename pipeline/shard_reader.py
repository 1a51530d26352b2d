"""Reader of encoded images: shards opened once, members read by offset and checked.

Samples are read with `pread` rather than through a memory map: a shard that is cut off while a map
of it is open kills the process with a signal, a short read is an error with a name. The copy costs
0.03 of 5.6 ms per image (docs/decisions/0302).
"""

import hashlib
import os
import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from pipeline.errors import PipelineError
from shards.errors import ShardError
from shards.read import ShardSet

_TAR_BLOCK = 512
_MAX_OPEN = 64
_FETCHERS = 2


@dataclass(frozen=True, kw_only=True)
class _OpenShard:
    path: Path
    descriptor: int
    identity: tuple[int, ...]
    """Device, inode, length and time of change when it was opened."""


class ShardReader:
    """The encoded bytes of a shard set's samples; safe to use from several threads."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._set = shard_set
        table = shard_set.samples
        self._shard = table.shard
        self._offset = table.offset
        self._size = table.size
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._fetching: dict[int, Future[Path]] = {}
        self._lock = threading.Lock()
        self._fetchers: ThreadPoolExecutor | None = None

    def read(
        self, ids: Int64[np.ndarray, " b"], *, into: UInt8[np.ndarray, " _bytes"] | None = None
    ) -> list[UInt8[np.ndarray, " _size"]]:
        """The encoded bytes of each sample, in order.

        Args:
            ids: Which samples.
            into: Memory of at least `buffer_bytes(ids)` bytes; using it again saves half the time.

        Raises:
            PipelineError: If a shard is missing or is not the one the manifest describes.
        """
        buffer = np.empty(self.buffer_bytes(ids), dtype=np.uint8) if into is None else into
        views, at = [], 0
        for sample in ids.tolist():
            # The member's tar header lies right before its bytes and comes with the same call.
            size = int(self._size[sample])
            block = buffer[at : at + _TAR_BLOCK + size]
            self._read_member(sample, block)
            views.append(block[_TAR_BLOCK:])
            at += len(block)
        return views

    def buffer_bytes(self, ids: Int64[np.ndarray, " b"]) -> int:
        """Bytes that `read` needs for these samples, their tar headers included."""
        return int(self._size[ids].sum()) + _TAR_BLOCK * len(ids)

    def intact(self, ids: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
        """Which samples' bytes are those that were packed, by sha256; reads all of them."""
        hashes = self._set.samples.sha256
        intact = np.ones(len(ids), dtype=bool)
        for row, sample in enumerate(ids.tolist()):
            try:
                (data,) = self.read(ids[row : row + 1])
            except PipelineError:
                intact[row] = False
                continue
            intact[row] = hashlib.sha256(data.tobytes()).digest() == bytes(hashes[sample])
        return intact

    def prefetch(self, ids: Int64[np.ndarray, " b"]) -> None:
        """Start bringing the shards of `ids` here if they lie elsewhere; returns at once."""
        if self._set.store.is_local:
            return
        for index in np.unique(self._shard[ids]).tolist():
            with self._lock:
                if index in self._open or index in self._fetching:
                    continue
                if self._fetchers is None:
                    self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="lmcl-fetch")
                self._fetching[index] = self._fetchers.submit(self._set.shard_path, index)

    def recheck(self) -> None:
        """Look whether a shard was changed since it was opened; called between epochs.

        One that is gone is forgotten (and fetched or missed at the next read); one that was
        rewritten is hashed and must still be the manifest's.

        Raises:
            PipelineError: If a rewritten shard has other contents.
        """
        with self._lock:
            for index, shard in list(self._open.items()):
                found = self._identity(shard.path) if shard.path.is_file() else None
                if found == shard.identity:
                    continue
                os.close(self._open.pop(index).descriptor)
                if found is not None:
                    self._check_hash(index, shard.path)

    def describe(self, sample: int) -> str:
        """Set, id, path, member and shard of a sample, for messages."""
        table, name = self._set.samples, self._set.name
        shard = self._set.manifest.shards[int(self._shard[sample])].name
        member = f"{self._set.member_key(sample)}.{table.codec[sample]}"
        return f"{name}: sample {sample} ({table.path[sample]}), member {member} of {shard}"

    def close(self) -> None:
        """Close every shard and stop fetching."""
        if self._fetchers is not None:
            self._fetchers.shutdown(cancel_futures=True)
            self._fetchers = None
        with self._lock:
            for shard in self._open.values():
                os.close(shard.descriptor)
            self._open.clear()
            self._fetching.clear()

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read_member(self, sample: int, block: UInt8[np.ndarray, " _size"]) -> None:
        index, start = int(self._shard[sample]), int(self._offset[sample]) - _TAR_BLOCK
        with self._lock:
            descriptor = self._descriptor(index)
            # Read under the lock: another thread must not close the descriptor in between.
            got = os.preadv(descriptor, [block.data], start)
        if got != len(block):
            raise PipelineError(
                f"{self.describe(sample)}: {max(got - _TAR_BLOCK, 0)} of its "
                f"{len(block) - _TAR_BLOCK} bytes are there, the shard was cut off; "
                f"restore it, then `lmcl-shard verify {self._set.root}`",
                exit_code=3,
                ids=(sample,),
            )
        header = block[:_TAR_BLOCK].tobytes()
        if header[257:262] != b"ustar" or _octal(header[124:136]) != len(block) - _TAR_BLOCK:
            raise PipelineError(
                f"{self.describe(sample)}: no tar member of {len(block) - _TAR_BLOCK} bytes begins "
                "there, the shard was replaced by another; restore it, then "
                f"`lmcl-shard verify {self._set.root}`",
                exit_code=3,
                ids=(sample,),
            )

    def _descriptor(self, index: int) -> int:
        if index in self._open:
            self._open.move_to_end(index)
            return self._open[index].descriptor
        path, descriptor = self._open_file(index)
        size, expected = os.fstat(descriptor).st_size, self._set.manifest.shards[index].size_bytes
        if size != expected:
            os.close(descriptor)
            raise PipelineError(
                f"{path}: the shard has {size} bytes, the manifest says {expected}; it was cut off "
                f"or replaced: restore it, then `lmcl-shard verify {self._set.root}`",
                exit_code=3,
            )
        self._open[index] = _OpenShard(
            path=path, descriptor=descriptor, identity=self._identity(path)
        )
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1].descriptor)
        return descriptor

    def _open_file(self, index: int) -> tuple[Path, int]:
        fetched = self._fetching.pop(index, None)
        try:
            path = fetched.result() if fetched is not None else self._set.shard_path(index)
            try:
                return path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                # A cache may have dropped the copy since it was fetched; once more, then.
                path = self._set.shard_path(index)
                return path, os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except ShardError as error:
            raise PipelineError(str(error), exit_code=error.exit_code) from error
        except OSError as error:
            name = self._set.manifest.shards[index].name
            raise PipelineError(
                f"{self._set.root}: shard {name} cannot be opened ({error}); restore it, then "
                f"`lmcl-shard verify {self._set.root}`",
                exit_code=4,
            ) from error

    def _identity(self, path: Path) -> tuple[int, ...]:
        status = path.stat()
        # A cache marks what it used last by the time of change; that is no sign of new contents.
        changed_ns = status.st_mtime_ns if self._set.store.is_local else 0
        return (status.st_dev, status.st_ino, status.st_size, changed_ns)

    def _check_hash(self, index: int, path: Path) -> None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        expected = self._set.manifest.shards[index].sha256
        if found != expected:
            raise PipelineError(
                f"{path}: the shard was replaced while in use (sha256 {found[:12]}, the manifest "
                f"says {expected[:12]}); restore it, then `lmcl-shard verify {self._set.root}`",
                exit_code=3,
            )


def _octal(field: bytes) -> int:
    """A tar header's number: octal digits, or base 256 for sizes beyond 8 GiB."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits.isdigit() else -1
