"""`manifest.json`: what a packed set is, and which shards it has; written last.

A folder without a manifest is an unfinished build. Everything a manifest says is checked when it is
read; an unknown format version is refused rather than guessed at.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from shards.errors import ShardError
from shards.sample import Facts, Member
from shards.score_scale import MOST_SCORE, ScoreScale

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SAMPLES = "samples.parquet"
REJECTED = "rejected.jsonl"
NOTED = "noted.jsonl"
CARD = "README.md"
"""The dataset card, or what a person wrote in its place; no part of the set."""
SPLITS = "splits"
VERSIONS = "versions"
"""Folder of the manifests and tables of a set that was updated."""

Sha256 = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{64}\Z")]
"""64 hexadecimal digits; names of files are made of them."""

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
"""A number of things, or of bytes."""

SetName = Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9][a-z0-9_-]{0,40}\Z")]
"""What a set may be called; names of its files and of members begin with it."""

SampleFile = Annotated[str, msgspec.Meta(pattern=r"\A(samples|versions/v[0-9]{1,9})\.parquet\Z")]
"""Where a sample table may lie."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.tar")


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """One tar of the set."""

    name: str
    """File name inside the set's folder."""
    size_bytes: Count
    """Length of the file."""
    sha256: Sha256
    """Hash of the whole file, hexadecimal."""
    samples: Count
    """Images inside."""
    first_id: Count
    """Smallest id the shard was planned for."""
    rows: Count
    """Consecutive ids it was planned for: its images and the rejected ones among them."""


@dataclass(frozen=True, kw_only=True)
class LabelStats:
    """The raw scores at a glance."""

    count: Count
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
class Version:
    """One line of a set's history."""

    version: Count
    """1 for the set as it was built; each update counts one up."""
    date: str
    """When it was made, UTC; empty for the first one, whose bytes depend on no clock."""
    what: str
    """What was done, in words."""
    num_samples: Count
    """Usable images."""
    num_rows: Count
    """Rows of its sample table."""
    ids_sha256: Sha256
    """Its hash over the names: splits of it carry the same."""
    source_sha256: Sha256
    """Its hash over the source."""


def version_file(version: int, ending: str) -> str:
    """Where the manifest (`json`) and the sample table (`parquet`) of a version are kept."""
    return f"{VERSIONS}/v{version}.{ending}"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Contents of `manifest.json`."""

    format_version: int
    """Version of the folder's format."""
    producer: str
    """Program and version that wrote it."""
    name: SetName
    """The set's short name."""
    score: ScoreScale | None
    """Scale of `mos`; None for a set without labels."""
    num_samples: Count
    """Usable images, i.e. rows that were not rejected."""
    num_rejected: Count
    """Rows without an image: listed in `rejected.jsonl`, kept so that no other id moves."""
    shards: tuple[ShardInfo, ...]
    """The tars, in order of their samples' ids."""
    samples_sha256: Sha256
    """Hash of `samples.parquet`."""
    ids_sha256: Sha256
    """Hash over the samples' names in order of their ids; a split belongs to one."""
    source_sha256: Sha256
    """Hash over names, labels and file sizes of the source, and the options of the build."""
    facts: Facts
    """Page, licence, citation, expected counts."""
    labels: LabelStats | None = None
    """Statistics of the raw scores; None if nothing is labelled."""
    members: tuple[Member, ...] = ()
    """Where sets were merged: the originals, in order."""
    version: Count = 1
    """How often the set was updated, plus one."""
    num_withdrawn: Count = 0
    """Rows whose image no longer belongs to the set; its bytes are still in a shard."""
    samples: SampleFile = SAMPLES
    """The sample table of this version."""
    history: tuple[Version, ...] = ()
    """All versions, this one last; empty for a set that was never updated."""

    @property
    def num_rows(self) -> int:
        """Rows of the sample table, rejected ones included; ids are 0 .. num_rows - 1."""
        return self.num_samples + self.num_rejected + self.num_withdrawn


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
    held = sum(shard.samples for shard in manifest.shards)
    said = manifest.num_samples + manifest.num_withdrawn
    if held != said:
        raise ShardError(
            f"{where}: says {said:,} samples, its shards hold {held:,}; the manifest was edited or "
            "damaged; build again",
            exit_code=3,
        )
    _check_shards(manifest, where)
    numbers = [manifest.score.low, manifest.score.high] if manifest.score else []
    if manifest.labels is not None:
        labels = manifest.labels
        numbers += [labels.low, labels.high, labels.mean, labels.std]
    if not all(abs(number) <= MOST_SCORE for number in numbers):  # NaN is not either
        raise ShardError(
            f"{where}: scores of {max(numbers, key=abs):g} are beyond {MOST_SCORE:g}; the manifest "
            "was edited or damaged; build again",
            exit_code=3,
        )
    rows = sum(member.rows for member in manifest.members)
    if manifest.members and rows > manifest.num_rows:
        raise ShardError(
            f"{where}: its members have {rows:,} rows, the set {manifest.num_rows:,}; the manifest "
            "was edited",
            exit_code=3,
        )


def _check_shards(manifest: Manifest, where: str) -> None:
    names = [shard.name for shard in manifest.shards]
    if len(set(names)) != len(names):
        raise ShardError(f"{where}: names a shard twice; build again", exit_code=3)
    end = 0
    for shard in manifest.shards:
        if not _SHARD_NAME.fullmatch(shard.name):
            raise ShardError(
                f"{where}: {shard.name!r} is no file name of a shard; the manifest was edited",
                exit_code=3,
            )
        if shard.first_id < end or shard.samples > shard.rows:
            raise ShardError(
                f"{where}: {shard.name} is said to hold {shard.samples:,} of {shard.rows:,} ids "
                f"from {shard.first_id:,} on, which cannot be; the manifest was edited",
                exit_code=3,
            )
        end = shard.first_id + shard.rows
    if end > manifest.num_rows:
        raise ShardError(
            f"{where}: its shards end at id {end:,}, the set at {manifest.num_rows:,}; the "
            "manifest was edited",
            exit_code=3,
        )


def ids_hash() -> "hashlib._Hash":
    """A fresh hash for `ids_sha256`: feed it each sample's name and a newline, in order of ids."""
    return hashlib.sha256(b"lmcl ids v1\n")
