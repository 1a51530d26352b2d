"""The draw of splits: groups dealt into parts by a hash, inside strata of like score.

`make_splits(shard_set, *, protocol="70-10-20", seed=123, repeats=10, ...) -> list[Split]`

The draw depends on the seed and the groups' names only: neither on the order of rows, nor on the
library that shuffles. A group is never in two parts; unlabelled and rejected images are in none.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.read import ShardSet
from shards.splitmix import finalise
from shards.splits.split import ALGORITHM, PARTS, Ids, Protocol, Split, make_split

_STRATUM = 20


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
            `fraction` is 70-10-20 with only a part of train, nested from fraction to fraction, and
            `official-fraction` the same of the set's own parts, `repeats` times.
        seed: Of the draw.
        repeats: How many independent draws.
        val_fraction: Share of the official train part (`official`) to select on where the set
            has no val part; default 0.1 there. 0 makes none.
        folds: Number of folds, at least 3.
        fraction: Share of the train part that `fraction` and `official-fraction` keep.

    Raises:
        ShardError: If the set has no labels, too few groups, or not what the protocol needs.
    """
    if protocol not in get_args(Protocol) or protocol == "imported":
        raise ShardError(
            f"no protocol {protocol!r}; there are {', '.join(get_args(Protocol)[:-1])}", exit_code=2
        )
    pool = _Pool.of(shard_set)
    if protocol.startswith("official"):
        whole = _official(shard_set, pool, seed, 0.1 if val_fraction is None else val_fraction)
        if protocol == "official":
            return [whole]
        return [_official_fraction(shard_set, whole, index, fraction) for index in range(repeats)]
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
            splits.append(
                make_split(shard_set, name, protocol, seed, index, ids, note=_no_val(ids))
            )
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
    return finalise(keys.view(np.uint64) ^ salt)


def _official(shard_set: ShardSet, pool: _Pool, seed: int, val_fraction: float) -> Split:
    part = shard_set.samples.part
    ids = [pool.ids[part[pool.ids] == name] for name in PARTS]
    if ids[0].size == 0 or ids[2].size == 0:
        raise ShardError(
            f"{shard_set.root}: the set {shard_set.name!r} has no official train and test parts; "
            "use `--protocol 70-10-20`",
            exit_code=3,
        )
    ids, note = _held_out_wins(shard_set, ids)
    if ids[1].size == 0 and val_fraction > 0:
        inside = np.zeros(len(shard_set.samples), bool)
        inside[ids[0]] = True
        train = _Pool.of(shard_set, inside)
        ids[0], ids[1], _ = train.ids_of(
            train.draw((1 - val_fraction, val_fraction, 0.0), seed=seed, index=0)
        )
        drawn = f"val is {val_fraction:.0%} of the official train part, drawn with seed {seed}"
        note = "; ".join(filter(None, (drawn, note)))
    elif ids[1].size == 0:
        note = "; ".join(filter(None, (_no_val(ids), note)))
    return make_split(shard_set, "official", "official", seed, 0, ids, note=note)


def _held_out_wins(shard_set: ShardSet, ids: list[Ids]) -> tuple[list[Ids], str]:
    """Parts without the images whose group a merged set has in a part that is held out as well."""
    if not shard_set.manifest.members:
        return ids, ""
    keys = shard_set.samples.group_key
    train, val, test = ids
    kept_val = val[~np.isin(keys[val], keys[test])]
    held_out = np.concatenate([keys[kept_val], keys[test]])
    kept_train = train[~np.isin(keys[train], held_out)]
    left = train.size - kept_train.size + val.size - kept_val.size
    note = (
        f"{left:,} images are left out, since another of the merged sets holds out the same image"
        if left
        else ""
    )
    return [kept_train, kept_val, test], note


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
        splits.append(make_split(shard_set, name, "k-fold", seed, index, pool.ids_of(part_of)))
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
            make_split(
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
    train, val, test = pool.ids_of(part_of)
    kept = _part_of_train(shard_set, train, seed, index, fraction)
    name = f"fraction{round(100 * fraction):02d}-seed{seed}-{index:02d}"
    note = f"{fraction:.0%} of the groups of 70-10-20's train part; val and test are its own"
    return make_split(shard_set, name, "fraction", seed, index, [kept, val, test], note=note)


def _official_fraction(shard_set: ShardSet, whole: Split, index: int, fraction: float) -> Split:
    kept = _part_of_train(shard_set, whole.train, whole.seed, index, fraction)
    name = f"official{round(100 * fraction):02d}-seed{whole.seed}-{index:02d}"
    note = f"{fraction:.0%} of the groups of the official train part; val and test are its own"
    ids = [kept, whole.val, whole.test]
    return make_split(
        shard_set, name, "official-fraction", whole.seed, index, ids,
        note="; ".join(filter(None, (note, whole.note))),
    )  # fmt: skip


def _part_of_train(shard_set: ShardSet, train: Ids, seed: int, index: int, fraction: float) -> Ids:
    """Ids of the train part's groups that a fraction keeps."""
    if not 0 < fraction <= 1:
        raise ShardError(f"a fraction of train must be in (0, 1], got {fraction}", exit_code=2)
    keys, group_of = np.unique(shard_set.samples.group_key[train], return_inverse=True)
    kept = max(1, round(keys.size * fraction))
    # Ranked by another draw: 20 % lies inside 40 %, which lies inside 60 %.
    rank = np.argsort(_noise(keys, seed, index + 1_000_000), kind="stable")
    inside = np.zeros(keys.size, bool)
    inside[rank[:kept]] = True
    found: Ids = train[inside[group_of]]
    return found


def _no_val(ids: Sequence[Ids]) -> str:
    return "" if ids[1].size else "no val part: there is nothing to select the best epoch on"


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
