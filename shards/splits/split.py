"""Splits: lists of ids, disjoint by group, stratified by score, checked whenever they are loaded.

`make_splits(shard_set, *, protocol="70-10-20", seed=123, repeats=10, ...) -> list[Split]`
`write_split(root, split) -> name` and `load_split(shard_set, name_or_path) -> Split`

The draw depends on the seed and the groups' names only: neither on the order of rows, nor on the
library that shuffles. A group is never in two parts; unlabelled and rejected images are in none.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.columns import ColumnFiles
from shards.errors import ShardError
from shards.manifest import SPLITS
from shards.read import ShardSet
from shards.store import Store

ALGORITHM = 1
"""Version of the draw; a change that moves a single image gets the next number."""

Protocol = Literal[
    "70-10-20", "80-20", "official", "k-fold", "leave-one-distortion-out", "fraction", "imported"
]
PARTS = ("train", "val", "test")
_STRATUM = 20
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


def make_splits(
    shard_set: ShardSet,
    *,
    protocol: Protocol = "70-10-20",
    seed: int = 123,
    repeats: int = 10,
    val_fraction: float | None = None,
    folds: int = 5,
    fraction: float = 0.2,
) -> list[Split]:
    """Draw splits.

    Args:
        shard_set: The set.
        protocol: `70-10-20` and `80-20` draw `repeats` times; `official` keeps the set's own
            parts; `k-fold` makes `folds` of them; `leave-one-distortion-out` one per family;
            `fraction` is 70-10-20 with only a part of train, nested from fraction to fraction.
        seed: Of the draw.
        repeats: How many independent draws.
        val_fraction: Share of the official train part (`official`) to select on where the set
            has no val part; default 0.1 there. 0 makes none.
        folds: Number of folds, at least 3.
        fraction: Share of the train part that `fraction` keeps.

    Raises:
        ShardError: If the set has no labels, too few groups, or not what the protocol needs.
    """
    if protocol not in get_args(Protocol) or protocol == "imported":
        raise ShardError(
            f"no protocol {protocol!r}; there are {', '.join(get_args(Protocol)[:-1])}", exit_code=2
        )
    pool = _Pool.of(shard_set)
    if protocol == "official":
        return [_official(shard_set, pool, seed, 0.1 if val_fraction is None else val_fraction)]
    if protocol == "k-fold":
        return _k_fold(shard_set, pool, seed, folds)
    shares = (0.8, 0.0, 0.2) if protocol == "80-20" else (0.7, 0.1, 0.2)
    splits = []
    for index in range(repeats):
        part_of = pool.draw(shares, seed=seed, index=index)
        if protocol == "leave-one-distortion-out":
            splits += _without_each_family(shard_set, pool, part_of, seed, index)
        elif protocol == "fraction":
            splits.append(_fraction(shard_set, pool, part_of, seed, index, fraction))
        else:
            name = f"{protocol}-seed{seed}-{index:02d}"
            ids = pool.ids_of(part_of)
            splits.append(_split(shard_set, name, protocol, seed, index, ids, note=_no_val(ids)))
    return splits


@dataclass(frozen=True, kw_only=True)
class _Pool:
    """The labelled images of a set and their groups, the groups ordered by mean score."""

    ids: Ids
    group_of: Ids
    """Index of each image's group, in order of the groups' keys."""
    keys: Ids
    """The groups' keys, ascending."""
    by_score: Ids
    """Indices of groups, from the lowest mean score to the highest; ties by key."""

    @staticmethod
    def of(shard_set: ShardSet, chosen: NDArray[np.bool_] | None = None) -> "_Pool":
        unit = shard_set.unit_mos()
        usable = shard_set.samples.ok & np.isfinite(unit)
        if chosen is not None:
            usable = usable & chosen
        ids = np.flatnonzero(usable)
        if ids.size == 0:
            raise ShardError(
                f"{shard_set.root}: no labelled image to split; scores are needed to train and to "
                "report",
                exit_code=3,
            )
        keys, group_of = np.unique(shard_set.samples.group_key[ids], return_inverse=True)
        counts = np.bincount(group_of)
        means = np.bincount(group_of, weights=unit[ids]) / counts
        order = np.argsort(means, kind="stable")
        return _Pool(ids=ids, group_of=group_of, keys=keys, by_score=order)

    def draw(self, shares: Sequence[float], *, seed: int, index: int) -> NDArray[np.int8]:
        """Part of each group: groups of like score are dealt out in the wanted proportions."""
        groups = self.keys.size
        counts = part_sizes(groups, shares)
        # Every stratum is shuffled, then the whole line is dealt, each part spread evenly.
        dealt = np.empty(groups, np.int8)
        dealt[self.shuffled(seed=seed, index=index)] = _spread(tuple(counts))
        return dealt

    def shuffled(self, *, seed: int, index: int) -> Ids:
        """Indices of groups from low scores to high, shuffled within strata of like scores."""
        noise = _noise(self.keys, seed, index)[self.by_score]
        whole = self.keys.size // _STRATUM * _STRATUM
        # A sort per row of a matrix: a tenth of the time of one sort by (stratum, noise).
        within = np.argsort(noise[:whole].reshape(-1, _STRATUM), axis=1, kind="stable")
        within += np.arange(0, whole, _STRATUM)[:, None]
        rest = whole + np.argsort(noise[whole:], kind="stable")
        line: Ids = self.by_score[np.concatenate([within.ravel(), rest])]
        return line

    def ids_of(self, part_of: NDArray[np.int8]) -> list[Ids]:
        parts = part_of[self.group_of]
        return [self.ids[parts == number] for number in range(len(PARTS))]


def part_sizes(groups: int, shares: Sequence[float]) -> list[int]:
    """How many groups each part gets: rounded shares, at least one where a share is not zero.

    Raises:
        ShardError: If there are fewer groups than parts.
    """
    wanted = [share for share in shares if share > 0]
    if groups < len(wanted):
        raise ShardError(
            f"{groups} groups cannot be dealt into {len(wanted)} parts; a split keeps every group "
            "whole, so it needs at least one group per part",
            exit_code=3,
        )
    sizes = [max(1, round(groups * share)) if share > 0 else 0 for share in shares]
    sizes[0] = groups - sum(sizes[1:])
    if sizes[0] < 1:
        sizes = [groups - (len(wanted) - 1)] + [int(share > 0) for share in shares[1:]]
    return sizes


@functools.lru_cache(maxsize=1)
def _spread(counts: tuple[int, ...]) -> NDArray[np.int8]:
    """A line of part numbers in which each part is spread as evenly as its count allows."""
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    numbers = np.concatenate([np.full(c, n, np.int8) for n, c in enumerate(counts)])
    return cast(NDArray[np.int8], numbers[np.argsort(places, kind="stable")])


def _noise(keys: Ids, seed: int, index: int) -> NDArray[np.uint64]:
    """A random number per group: splitmix64 of its key, the seed and the repeat."""
    salt = np.frombuffer(
        hashlib.blake2b(f"{ALGORITHM}/{seed}/{index}".encode(), digest_size=8).digest(), np.uint64
    )[0]
    mixed = keys.view(np.uint64) ^ salt
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return cast(NDArray[np.uint64], mixed ^ (mixed >> np.uint64(31)))


def _official(shard_set: ShardSet, pool: _Pool, seed: int, val_fraction: float) -> Split:
    part = shard_set.samples.part
    ids = [pool.ids[part[pool.ids] == name] for name in PARTS]
    if ids[0].size == 0 or ids[2].size == 0:
        raise ShardError(
            f"{shard_set.root}: the set {shard_set.name!r} has no official train and test parts; "
            "use `--protocol 70-10-20`",
            exit_code=3,
        )
    note = ""
    if ids[1].size == 0 and val_fraction > 0:
        inside = np.zeros(len(shard_set.samples), bool)
        inside[ids[0]] = True
        train = _Pool.of(shard_set, inside)
        ids[0], ids[1], _ = train.ids_of(
            train.draw((1 - val_fraction, val_fraction, 0.0), seed=seed, index=0)
        )
        note = f"val is {val_fraction:.0%} of the official train part, drawn with seed {seed}"
    elif ids[1].size == 0:
        note = _no_val(ids)
    return _split(shard_set, "official", "official", seed, 0, ids, note=note)


def _k_fold(shard_set: ShardSet, pool: _Pool, seed: int, folds: int) -> list[Split]:
    if folds < 3:
        raise ShardError("k-fold needs at least 3 folds: train, val and test", exit_code=2)
    part_sizes(pool.keys.size, [1 / folds] * folds)
    fold_of = np.empty(pool.keys.size, np.int64)
    fold_of[pool.shuffled(seed=seed, index=0)] = np.arange(pool.keys.size) % folds
    splits = []
    for index in range(folds):
        part_of = np.zeros(pool.keys.size, np.int8)
        part_of[fold_of == index] = 2
        part_of[fold_of == (index + 1) % folds] = 1
        name = f"{folds}-fold-seed{seed}-{index:02d}"
        splits.append(_split(shard_set, name, "k-fold", seed, index, pool.ids_of(part_of)))
    return splits


def _without_each_family(
    shard_set: ShardSet, pool: _Pool, part_of: NDArray[np.int8], seed: int, index: int
) -> list[Split]:
    family = shard_set.samples.distortion
    names = sorted({str(name) for name in family[pool.ids]} - {""})
    if len(names) < 2:
        raise ShardError(
            f"{shard_set.root}: leave-one-distortion-out needs at least two families of "
            f"distortions, the set has {len(names)}; use `--protocol 70-10-20`",
            exit_code=3,
        )
    splits = []
    for name in names:
        train, val, test = pool.ids_of(part_of)
        ids = [train[family[train] != name], val[family[val] != name], test[family[test] == name]]
        splits.append(
            _split(
                shard_set,
                f"without-{_slug(name)}-seed{seed}-{index:02d}",
                "leave-one-distortion-out",
                seed,
                index,
                ids,
                note=f"{name!r} is only in test, on contents that are not in train",
            )
        )
    return splits


def _fraction(
    shard_set: ShardSet,
    pool: _Pool,
    part_of: NDArray[np.int8],
    seed: int,
    index: int,
    fraction: float,
) -> Split:
    if not 0 < fraction <= 1:
        raise ShardError(f"a fraction of train must be in (0, 1], got {fraction}", exit_code=2)
    train, val, test = pool.ids_of(part_of)
    groups = np.flatnonzero(part_of == 0)
    kept = max(1, round(groups.size * fraction))
    # Ranked by another draw: 20 % lies inside 40 %, which lies inside 60 %.
    rank = np.argsort(_noise(pool.keys[groups], seed, index + 1_000_000), kind="stable")
    inside = np.zeros(pool.keys.size, bool)
    inside[groups[rank[:kept]]] = True
    chosen = inside[pool.group_of]
    ids = [np.intersect1d(train, pool.ids[chosen]), val, test]
    name = f"fraction{round(100 * fraction):02d}-seed{seed}-{index:02d}"
    note = f"{fraction:.0%} of the groups of 70-10-20's train part; val and test are its own"
    return _split(shard_set, name, "fraction", seed, index, ids, note=note)


def _no_val(ids: Sequence[Ids]) -> str:
    return "" if ids[1].size else "no val part: there is nothing to select the best epoch on"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())


def _split(
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
    return _split(shard_set, name, protocol, seed, index, ids, note=note)


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
            f"{shard_set.root} holds; draw it again with `lmcl-shard split {shard_set.root}`",
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
            f"{where}: sample {rejected[0]} was rejected when the set was built; draw it again",
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
    if text.endswith(".json") and Path(text).is_file():
        return text, Path(text).read_bytes()
    inside = text if text.startswith(f"{SPLITS}/") else f"{SPLITS}/{text}"
    inside = inside if inside.endswith(".json") else f"{inside}.json"
    if shard_set.store.exists(inside):
        return f"{shard_set.root}/{inside}", shard_set.store.read(inside)
    known = [Path(file).stem for file in shard_set.store.names(SPLITS)]
    raise ShardError(
        f"{shard_set.root}: no split {text!r}; there are {', '.join(known) or 'none yet'}; draw "
        f"one with `lmcl-shard split {shard_set.root}`",
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
