"""A finished set, opened: its manifest, its sample table, and the bytes of any image.

`open_set(root, *, cache=None) -> ShardSet` takes a folder or an fsspec URL. Nothing is decoded and
no shard is touched until bytes are asked for; this is the plain reference the loaders are tested
against.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.cache import DEFAULT_BYTES, Cache, cache_root, default_folder
from shards.columns import ColumnFiles
from shards.errors import ShardError
from shards.layout import STATE, key_of
from shards.manifest import MANIFEST, Manifest, decode, version_file
from shards.sample_table import SampleRow, SampleTable
from shards.score_scale import ScoreScale
from shards.store import Store
from shards.text import is_url, looked_at

_OPEN_FILES = 64
_VERSIONED = re.compile(r"(.+)@v?([0-9]{1,9})/*")


def open_set(
    root: str | Path,
    *,
    cache: Path | None = None,
    cache_bytes: int = DEFAULT_BYTES,
    share_columns: bool = True,
) -> "ShardSet":
    """Open a finished set.

    Args:
        root: Folder or fsspec URL; `ROOT@v1` for an earlier version of a set that was updated.
        cache: Where copies of remote files go, and columns that processes share; default
            `$LMCL_CACHE` or the user's cache folder. Nothing is written to the set's own folder.
        cache_bytes: Space the copies may take.
        share_columns: False reads every column from the sample table itself, into memory.

    Raises:
        ShardError: If there is no such folder (exit code 4), it is an unfinished build, or its
            manifest or sample table is damaged (exit code 3).
    """
    root, version = split_version(root)
    store = Store(root)
    if store.folder is not None and not store.folder.is_dir():
        raise ShardError(
            f"{root}: there is no such folder{looked_at(root)}; make a set with `lmcl-shard "
            f"build NAME SOURCE --output {root}`",
            exit_code=4,
        )
    manifest = _read_manifest(store, version)
    copies = None
    if not store.is_local:
        copies = Cache(store, cache or default_folder(store.root), limit_bytes=cache_bytes)
    path = _samples_path(store, copies, manifest)
    files = ColumnFiles((cache or cache_root()) / "columns", path) if share_columns else None
    table = SampleTable(path, files, shards=len(manifest.shards))
    if len(table) != manifest.num_rows:
        raise ShardError(
            f"{store.root}: {manifest.samples} has {len(table):,} rows, the manifest says "
            f"{manifest.num_rows:,}; build again",
            exit_code=3,
        )
    return ShardSet(store=store, manifest=manifest, samples=table, _copies=copies)


@dataclass(frozen=True, kw_only=True)
class ShardSet:
    """A packed set. Safe to share between threads; give each process its own."""

    store: Store
    """Its files."""
    manifest: Manifest
    """What it is."""
    samples: SampleTable
    """One row per sample; row i has id i."""
    _copies: Cache | None
    _files: "_OpenFiles" = field(default_factory=lambda: _OpenFiles(_OPEN_FILES))

    @property
    def root(self) -> str:
        """Folder or URL."""
        return self.store.root

    @property
    def name(self) -> str:
        """Short name."""
        return self.manifest.name

    @property
    def named_version(self) -> str:
        """Name, and the version of a set that was updated: `mine`, `mine version 3`."""
        version = self.manifest.version
        return self.name if version == 1 else f"{self.name} version {version}"

    @property
    def score(self) -> ScoreScale | None:
        """Scale of `samples.mos`; None for a set without labels."""
        return self.manifest.score

    def ids(self) -> NDArray[np.int64]:
        """Ids of the usable images, ascending."""
        return self.samples.ids()

    def unit_mos(self) -> NDArray[np.float64]:
        """Every row's score as "higher is better" in 0..1; NaN if unlabelled."""
        if self.score is None:
            return np.full(len(self.samples), np.nan)
        return self.score.to_unit(self.samples.mos)

    def shard_path(self, index: int) -> Path:
        """A shard as a local file; a remote one is fetched and checked first.

        Raises:
            ShardError: If the shard is missing or has another length than the manifest says.
        """
        shard = self.manifest.shards[index]
        if self._copies is not None:
            return self._copies.path(shard.name, sha256=shard.sha256, size_bytes=shard.size_bytes)
        path = self.store.local_path(shard.name)
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise ShardError(
                f"{path}: the manifest names this shard, but it is not there; restore it, or "
                "build the set again",
                exit_code=4,
            ) from error
        if size_bytes != shard.size_bytes:
            raise ShardError(
                f"{path}: {size_bytes:,} bytes, the manifest says {shard.size_bytes:,}; "
                f"`lmcl-shard verify {self.root}` names the damage, a new build repairs it",
                exit_code=3,
            )
        return path

    def member_key(self, id: int) -> str:
        """The name of a sample's member in its tar, without ending."""
        return key_of(self.name, id)

    def read_bytes(self, id: int) -> bytes:
        """The encoded image of one sample.

        Raises:
            IndexError: If there is no such id.
            ShardError: If the sample was rejected, or its shard is missing or shorter than it
                should be.
        """
        table = self.samples
        if not 0 <= id < len(table):
            raise IndexError(f"id {id} is not in 0 .. {len(table) - 1}")
        index, offset, size = int(table.shard[id]), int(table.offset[id]), int(table.size[id])
        if not table.ok[id] and index >= 0:
            raise ShardError(
                f"{self.root}: sample {id} ({table.path[id]}) was withdrawn from the set; open an "
                "earlier version of it (`ROOT@v1`)",
                exit_code=3,
            )
        if not table.ok[id]:
            raise ShardError(
                f"{self.root}: sample {id} ({table.path[id]}) was rejected when the set was built; "
                "repair the file and run the build again with `--retry-failed`",
                exit_code=3,
            )
        shards = self.manifest.shards
        if not (0 <= index < len(shards) and 0 <= offset <= shards[index].size_bytes - size):
            raise ShardError(
                f"{self.root}: sample {id} is said to lie outside its shard (shard {index}, byte "
                f"{offset:,}, {size:,} bytes); run `lmcl-shard verify {self.root}`",
                exit_code=3,
            )
        data = self._files.read(index, offset, size, self.shard_path)
        if len(data) != size:
            raise ShardError(
                f"{self.root}: sample {id} ends {size - len(data):,} bytes early in "
                f"{self.manifest.shards[index].name}; run `lmcl-shard verify {self.root} --deep`",
                exit_code=3,
            )
        return data

    def __len__(self) -> int:
        return self.manifest.num_samples

    def __iter__(self) -> Iterator[tuple[int, bytes, SampleRow]]:
        """Every usable sample in order of ids: id, encoded image, row."""
        for id in self.ids().tolist():
            yield id, self.read_bytes(id), self.samples.row(id)

    def close(self) -> None:
        """Close the shards that are open; they open again when needed."""
        self._files.close()


class _OpenFiles:
    """The shards read last, kept open; bounded, so that a large set does not use up handles."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[int, int] = OrderedDict()

    def __reduce__(self) -> tuple[type["_OpenFiles"], tuple[int]]:
        """A copy in another process opens its own files."""
        return _OpenFiles, (self._limit,)

    def read(self, index: int, offset: int, size: int, path_of: Callable[[int], Path]) -> bytes:
        with self._lock:
            handle = self._open.pop(index, None)
            if handle is None:
                handle = os.open(path_of(index), os.O_RDONLY)
            self._open[index] = handle
            if len(self._open) > self._limit:
                os.close(self._open.popitem(last=False)[1])
            return os.pread(handle, size, offset)

    def close(self) -> None:
        with self._lock:
            while self._open:
                os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()


def split_version(root: str | Path) -> tuple[str | Path, int | None]:
    """A root without the version that stands behind it (`data/mine@v2`), and that version."""
    found = _VERSIONED.fullmatch(str(root))
    if found is None or (not is_url(root) and os.path.lexists(root)):
        return root, None
    return type(root)(found[1]), int(found[2])


def _read_manifest(store: Store, version: int | None) -> Manifest:
    manifest = decode(_manifest_bytes(store), where=f"{store.root}/{MANIFEST}")
    if version is None or version == manifest.version:
        return manifest
    name = version_file(version, "json")
    if not 1 <= version < manifest.version or not store.exists(name):
        raise ShardError(
            f"{store.root}: has no version {version}; there are 1 to {manifest.version}",
            exit_code=4,
        )
    return decode(store.read(name), where=f"{store.root}/{name}")


def _manifest_bytes(store: Store) -> bytes:
    try:
        return store.read(MANIFEST)
    except ShardError as error:
        if error.exit_code != 4:
            raise
        if store.names(STATE) or any(name.endswith(".tar") for name in store.names()):
            raise ShardError(
                f"{store.root}: an unfinished build (there is no {MANIFEST}); run the same "
                "`lmcl-shard build` command again, it goes on where it stopped",
                exit_code=3,
            ) from error
        raise ShardError(
            f"{store.root}: holds no packed set (there is no {MANIFEST}); make one with "
            f"`lmcl-shard build NAME SOURCE --output {store.root}`",
            exit_code=4,
        ) from error


def _samples_path(store: Store, copies: Cache | None, manifest: Manifest) -> Path:
    if copies is not None:
        return copies.path(manifest.samples, sha256=manifest.samples_sha256)
    path = store.local_path(manifest.samples)
    if not path.is_file():
        raise ShardError(f"{path}: is missing; build the set again", exit_code=3)
    return path
