"""Splits: lists of ids, disjoint by group, stratified by score, checked whenever they are loaded.

`write_split(root, split) -> name` and `load_split(shard_set, name_or_path) -> Split`

How they are drawn stands in `draw.py`.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.columns import ColumnFiles
from shards.errors import ShardError
from shards.manifest import SPLITS
from shards.read import ShardSet
from shards.source_files import read_regular
from shards.store import Store
from shards.text import looked_at

ALGORITHM = 1
"""Version of the draw; a change that moves a single image gets the next number."""

Protocol = Literal[
    "70-10-20",
    "80-20",
    "official",
    "k-fold",
    "leave-one-distortion-out",
    "fraction",
    "official-fraction",
    "imported",
]
PARTS = ("train", "val", "test")
_MOST_BYTES = 1 << 37  # ten billion ids of 11 bytes
Ids = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who trains, who selects, who is reported on."""

    name: str
    """File name below `splits/`, without ending."""
    protocol: str
    """The rule it was drawn by."""
    seed: int
    """Seed of the draw."""
    algorithm: int
    """Version of the draw."""
    index: int
    """Number among the repeats."""
    set: str
    """Short name of the set."""
    ids_sha256: str
    """The set's hash over its names; ids mean nothing in another set."""
    train: Ids
    """Ids to learn from, ascending."""
    val: Ids
    """Ids to select on; may be empty."""
    test: Ids
    """Ids to report on, once."""
    hash: str
    """Hash over everything above that decides a result."""
    note: str = ""
    """What a reader of a result should know about this split."""

    def part(self, name: str) -> Ids:
        """The ids of `train`, `val` or `test`.

        Raises:
            ShardError: If there is no such part.
        """
        if name not in PARTS:
            raise ShardError(f"no part {name!r} in a split; there are {', '.join(PARTS)}")
        return cast(Ids, getattr(self, name))


class _File(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A split as it lies on disk."""

    format_version: int
    name: str
    protocol: str
    seed: int
    algorithm: int
    index: int
    set: str
    ids_sha256: str
    hash: str
    note: str
    counts: dict[str, int]
    train: msgspec.Raw
    val: msgspec.Raw
    test: msgspec.Raw


def make_split(
    shard_set: ShardSet,
    name: str,
    protocol: str,
    seed: int,
    index: int,
    ids: Sequence[Ids],
    *,
    note: str = "",
    algorithm: int = ALGORITHM,
) -> Split:
    """A split with its hash; ids are sorted.

    Args:
        shard_set: The set.
        name: File name below `splits/`, without ending.
        protocol: The rule the ids were drawn by.
        seed: Of the draw.
        index: Number among the repeats.
        ids: Train, val, test.
        note: What a reader of a result should know.
        algorithm: Version of the draw.
    """
    train, val, test = (np.sort(np.asarray(part, np.int64)) for part in ids)
    identity = shard_set.manifest.ids_sha256
    return Split(
        name=name,
        protocol=protocol,
        seed=seed,
        algorithm=algorithm,
        index=index,
        set=shard_set.name,
        ids_sha256=identity,
        train=train,
        val=val,
        test=test,
        hash=split_hash(identity, protocol, seed, algorithm, index, (train, val, test)),
        note=note,
    )


def split_from_ids(
    shard_set: ShardSet,
    name: str,
    index: int,
    ids: Sequence[Ids],
    *,
    note: str,
    protocol: str = "imported",
    seed: int = 0,
) -> Split:
    """A split from lists of ids that were not drawn here.

    Args:
        shard_set: The set.
        name: File name below `splits/`, without ending.
        index: Number among the repeats.
        ids: Train, val, test.
        note: What a reader of a result should know.
        protocol: The rule they were drawn by.
        seed: Its seed, where it is known.
    """
    return make_split(shard_set, name, protocol, seed, index, ids, note=note)


def split_hash(
    identity: str, protocol: str, seed: int, algorithm: int, index: int, ids: Sequence[Ids]
) -> str:
    """sha256 over the set, the rule and the ids."""
    found = hashlib.sha256(f"{identity}/{protocol}/{seed}/{algorithm}/{index}".encode())
    for name, part in zip(PARTS, ids, strict=True):
        found.update(f"/{name}/{part.size}/".encode())
        found.update(np.ascontiguousarray(part, "<i8").data)
    return found.hexdigest()


def write_split(root: str | Path, split: Split) -> str:
    """Write `splits/<name>.json` below a set's root; returns that relative name."""
    content = _File(
        format_version=1,
        name=split.name,
        protocol=split.protocol,
        seed=split.seed,
        algorithm=split.algorithm,
        index=split.index,
        set=split.set,
        ids_sha256=split.ids_sha256,
        hash=split.hash,
        note=split.note,
        counts={name: int(split.part(name).size) for name in PARTS},
        train=msgspec.Raw(msgspec.json.encode(split.train.tolist())),
        val=msgspec.Raw(msgspec.json.encode(split.val.tolist())),
        test=msgspec.Raw(msgspec.json.encode(split.test.tolist())),
    )
    name = f"{SPLITS}/{split.name}.json"
    Store(root).write(name, msgspec.json.encode(content) + b"\n")
    return name


def load_split(shard_set: ShardSet, name: str | Path) -> Split:
    """Read a split and check it: format, hash, the set it belongs to, and that nothing leaks.

    Args:
        shard_set: The opened set.
        name: `70-10-20-seed123-00` for one below the set's `splits/`, or the path of a file.

    Raises:
        ShardError: If there is no such split (exit code 4), or it fails a check (exit code 3).
    """
    where, data = _split_bytes(shard_set, name)
    try:
        content = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _no_split_file(where, error) from error
    files = shard_set.samples.files
    if files is None:
        return check_split(shard_set, _from_file(content, where), where=where)
    # The parts of a large split are mapped from files like the columns of its sample table. They
    # are named by this table and the split file's bytes, and made only after all checks.
    digest = hashlib.sha256(data).hexdigest()[:32]
    kept = _kept(files, digest, content)
    if kept is not None and _same_ids(kept) and kept.ids_sha256 == shard_set.manifest.ids_sha256:
        return kept
    split = check_split(shard_set, _from_file(content, where), where=where)
    for part in PARTS:
        if kept is not None:
            files.drop(_file_name(digest, part))
        _keep(files, _file_name(digest, part), split.part(part))
    return _kept(files, digest, content) or split


def read_split(shard_set: ShardSet, name: str | Path) -> tuple[Split, str]:
    """A split that may be of an earlier version of the set, and where it lies; only its hash holds.

    Raises:
        ShardError: If there is no such split (exit code 4), or it was edited (exit code 3).
    """
    where, data = _split_bytes(shard_set, name)
    try:
        split = _from_file(msgspec.json.decode(data, type=_File), where)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise _no_split_file(where, error) from error
    if not _same_ids(split):
        raise ShardError(
            f"{where}: its ids do not match its hash, so it was edited; draw it again", exit_code=3
        )
    rows = len(shard_set.samples)
    if any(ids.size and not 0 <= ids.min() <= ids.max() < rows for ids in _parts(split)):
        raise ShardError(f"{where}: ids outside 0 .. {rows - 1}", exit_code=3)
    return split, where


def _parts(split: Split) -> tuple[Ids, Ids, Ids]:
    return split.train, split.val, split.test


def _keep(files: ColumnFiles, name: str, ids: Ids) -> None:
    files.make(name, np.int64, ids.shape, lambda: (ids,))


def _kept(files: ColumnFiles, digest: str, content: _File) -> Split | None:
    train, val, test = (
        files.get(_file_name(digest, part), np.int64, (content.counts.get(part, 0),))
        for part in PARTS
    )
    if train is None or val is None or test is None:
        return None
    return Split(**_facts(content), train=train, val=val, test=test)


def _file_name(digest: str, part: str) -> str:
    return f"split-{digest}-{part}"


def _same_ids(split: Split) -> bool:
    parts = (split.train, split.val, split.test)
    return split.hash == split_hash(
        split.ids_sha256, split.protocol, split.seed, split.algorithm, split.index, parts
    )


def _no_split_file(where: str, error: Exception) -> ShardError:
    return ShardError(f"{where}: not a split file ({error}); draw it again", exit_code=3)


def check_split(shard_set: ShardSet, split: Split, *, where: str) -> Split:
    """The split itself, if it belongs to the set and leaks nothing.

    Raises:
        ShardError: Naming what is wrong (exit code 3).
    """
    if split.ids_sha256 != shard_set.manifest.ids_sha256:
        raise ShardError(
            f"{where}: was drawn for the set {split.set!r} with other images than "
            f"{shard_set.root} holds; draw it again with `lmcl-shard split {shard_set.root}`"
            + _of_earlier_version(shard_set, split),
            exit_code=3,
        )
    if not _same_ids(split):
        raise ShardError(
            f"{where}: its ids do not match its hash, so it was edited; draw it again, or import "
            "your own lists with `lmcl-shard split --from`",
            exit_code=3,
        )
    _check_ids(shard_set, split, where)
    _check_groups(shard_set, split, where)
    return split


def _of_earlier_version(shard_set: ShardSet, split: Split) -> str:
    for version in shard_set.manifest.history[:-1]:
        if version.ids_sha256 == split.ids_sha256:
            return (
                f"; it is of version {version.version}: take it over with `--extend {split.name}`, "
                f"or open {shard_set.store.shown}@v{version.version}"
            )
    return ""


def _check_ids(shard_set: ShardSet, split: Split, where: str) -> None:
    every = np.concatenate([split.train, split.val, split.test])
    if every.size and (every.min() < 0 or every.max() >= len(shard_set.samples)):
        raise ShardError(f"{where}: ids outside 0 .. {len(shard_set.samples) - 1}", exit_code=3)
    # A mark per row: numpy's sets of ten million numbers take ten times as long.
    seen = np.zeros(len(shard_set.samples), bool)
    seen[every] = True
    if np.count_nonzero(seen) != every.size:
        raise ShardError(f"{where}: an id is in it twice; draw it again", exit_code=3)
    rejected = every[~shard_set.samples.ok[every]]
    if rejected.size:
        raise ShardError(
            f"{where}: sample {rejected[0]} was rejected when the set was built, or withdrawn "
            f"since; draw it again, or take it over with `--extend {split.name}`",
            exit_code=3,
        )


def _check_groups(shard_set: ShardSet, split: Split, where: str) -> None:
    keys = shard_set.samples.group_key
    if _are_apart([keys[split.part(name)] for name in PARTS]):
        return
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = np.intersect1d(keys[split.part(first)], keys[split.part(second)])
        if shared.size:
            id = int(np.flatnonzero(keys == shared[0])[0])
            raise ShardError(
                f"{where}: leaks: {shared.size:,} groups are in both {first} and {second}, e.g. "
                f"{shard_set.samples.group[id]!r}; draw it again with `lmcl-shard split`",
                exit_code=3,
            )


def _are_apart(parts: Sequence[Ids]) -> bool:
    """Whether no two parts have a value in common: each has its own values once, then all do.

    Sorted, not hashed: at ten million keys numpy's hash sets are an order slower than its sort.
    """
    own = [_distinct(part) for part in parts]
    return _distinct(np.concatenate(own)).size == sum(one.size for one in own)


def _distinct(values: Ids) -> Ids:
    ordered = np.sort(values)
    first = np.ones(ordered.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return ordered[first]


def _split_bytes(shard_set: ShardSet, name: str | Path) -> tuple[str, bytes]:
    text = str(name)
    if text.endswith(".json") and os.path.lexists(text) and not Path(text).is_dir():
        return text, read_regular(text, limit_bytes=_MOST_BYTES)
    inside = text if text.startswith(f"{SPLITS}/") else f"{SPLITS}/{text}"
    inside = inside if inside.endswith(".json") else f"{inside}.json"
    if shard_set.store.exists(inside):
        return f"{shard_set.root}/{inside}", shard_set.store.read(inside)
    known = [Path(file).stem for file in shard_set.store.names(SPLITS)]
    is_file = text.endswith(".json")
    where = f", nor a file of that name{looked_at(text)}" if is_file else ""
    raise ShardError(
        f"{shard_set.root}: no split {text!r}{where}; there are {', '.join(known) or 'none yet'}; "
        f"draw one with `lmcl-shard split {shard_set.root}`",
        exit_code=4,
    )


def _facts(content: _File) -> dict[str, Any]:
    names = ("name", "protocol", "seed", "algorithm", "index", "set", "ids_sha256", "hash", "note")
    return {name: getattr(content, name) for name in names}


def _from_file(content: _File, where: str) -> Split:
    def ids(values: msgspec.Raw) -> Ids:
        try:
            return np.array(msgspec.json.decode(values, type=list[int]), np.int64)
        except OverflowError as error:
            raise ShardError(f"{where}: an id is no 64-bit number", exit_code=3) from error
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise _no_split_file(where, error) from error

    return Split(
        **_facts(content),
        train=ids(content.train),
        val=ids(content.val),
        test=ids(content.test),
    )
