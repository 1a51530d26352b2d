"""`manifest.json`: what a packed set is, and which shards it has; written last.

A folder without a manifest is an unfinished build. Everything a manifest says is checked when it is
read; an unknown format version is refused rather than guessed at.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

import msgspec

from shards.errors import ShardError
from shards.sample import Facts, Member
from shards.score_scale import ScoreScale

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
REJECTED = "rejected.jsonl"
SPLITS = "splits"


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar of the set."""

    name: str
    """File name inside the set's folder."""
    size_bytes: int
    """Length of the file."""
    sha256: str
    """Hash of the whole file, hexadecimal."""
    samples: int
    """Images inside."""
    first_id: int
    """Smallest id the shard was planned for."""
    rows: int
    """Consecutive ids it was planned for: its images and the rejected ones among them."""


@dataclass(frozen=True, kw_only=True)
class LabelStats:
    """The raw scores at a glance."""

    count: int
    """Labelled samples."""
    low: float
    """Smallest raw score."""
    high: float
    """Largest raw score."""
    mean: float
    """Mean raw score."""
    std: float
    """Population standard deviation of the raw scores."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`."""

    format_version: int
    """Version of the folder's format."""
    producer: str
    """Program and version that wrote it."""
    name: str
    """The set's short name."""
    score: ScoreScale | None
    """Scale of `mos`; None for a set without labels."""
    num_samples: int
    """Usable images, i.e. rows that were not rejected."""
    num_rejected: int
    """Rows without an image: listed in `rejected.jsonl`, kept so that no other id moves."""
    shards: tuple[ShardInfo, ...]
    """The tars, in order of their samples' ids."""
    samples_sha256: str
    """Hash of `samples.parquet`."""
    ids_sha256: str
    """Hash over the samples' names in order of their ids; a split belongs to one."""
    source_sha256: str
    """Hash over names, labels and file sizes of the source, and the options of the build."""
    facts: Facts
    """Page, licence, citation, expected counts."""
    labels: LabelStats | None = None
    """Statistics of the raw scores; None if nothing is labelled."""
    members: tuple[Member, ...] = ()
    """Where sets were merged: the originals, in order."""

    @property
    def num_rows(self) -> int:
        """Rows of the sample table, rejected ones included; ids are 0 .. num_rows - 1."""
        return self.num_samples + self.num_rejected


def encode(manifest: Manifest) -> bytes:
    """The manifest as readable JSON, the same bytes for the same contents."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode(data: bytes, *, where: str) -> Manifest:
    """Read a manifest and check it against itself.

    Raises:
        ShardError: If it is damaged, of another format version, or contradicts itself.
    """
    version = _version(data, where)
    if version != FORMAT_VERSION:
        raise ShardError(
            f"{where}: format version {version!r}, this program reads {FORMAT_VERSION}; use the "
            "version of lmcl that wrote it, or build the set again",
            exit_code=3,
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ShardError(f"{where}: not a manifest ({error}); build again", exit_code=3) from error
    _check(manifest, where)
    return manifest


def _version(data: bytes, where: str) -> Any:
    try:
        found = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ShardError(
            f"{where}: not readable as JSON ({error}); build the set again", exit_code=3
        ) from error
    return found.get("format_version") if isinstance(found, dict) else None


def _check(manifest: Manifest, where: str) -> None:
    if manifest.num_samples < 0 or manifest.num_rejected < 0:
        raise ShardError(f"{where}: negative sample counts; build again", exit_code=3)
    held = sum(shard.samples for shard in manifest.shards)
    if held != manifest.num_samples:
        raise ShardError(
            f"{where}: says {manifest.num_samples:,} samples, its shards hold {held:,}; the "
            "manifest was edited or damaged; build again",
            exit_code=3,
        )
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ShardError(f"{where}: names a shard twice; build again", exit_code=3)
    for name in names:
        if "/" in name or "\\" in name or name.startswith(".") or not name.endswith(".tar"):
            raise ShardError(
                f"{where}: {name!r} is no file name of a shard; the manifest was edited",
                exit_code=3,
            )


def ids_hash() -> "hashlib._Hash":
    """A fresh hash for `ids_sha256`: feed it each sample's name and a newline, in order of ids."""
    return hashlib.sha256(b"lmcl ids v1\n")
