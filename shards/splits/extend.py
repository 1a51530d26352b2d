"""A split of an earlier version of a set, taken over by a later one: no old image changes its part.

`extend_split(shard_set, old) -> Split`. Images that were withdrawn leave; new ones follow their
group, and new groups are dealt by a hash of their name and the split's seed, in the old shares.
"""

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.manifest import Version
from shards.read import ShardSet
from shards.splits.split import PARTS, Ids, Split, check_split, make_split, read_split


def extend_split(shard_set: ShardSet, old: str | Path) -> Split:
    """The next version of a split.

    Args:
        shard_set: The set as it is now.
        old: Name of a split of an earlier version, or its file.

    Raises:
        ShardError: If the split belongs to no version of this set, or a part would be empty.
    """
    split, where = read_split(shard_set, old)
    versions = _versions_of(shard_set, split, where)
    ok = shard_set.samples.ok
    kept = [ids[ok[ids]] for ids in (split.train, split.val, split.test)]
    gone = sum(part.size for part in (split.train, split.val, split.test)) - sum(map(len, kept))
    new = shard_set.ids()[shard_set.ids() >= versions[-1].num_rows]
    new = new[np.isfinite(shard_set.samples.mos[new])]
    part_of = _parts_of(shard_set, new, kept, split)
    ids = [np.concatenate([kept[k], new[part_of == k]]) for k in range(len(PARTS))]
    if ids[0].size == 0 or ids[2].size == 0:
        raise ShardError(f"{where}: would leave train or test empty; draw another", exit_code=3)
    note = (
        f"extends {split.name} of {_named(versions)}: {new.size:,} new images, {gone:,} "
        "withdrawn; no other image changes its part"
    )
    name = f"{split.name.partition('@')[0]}@v{shard_set.manifest.version}"
    found = make_split(shard_set, name, split.protocol, split.seed, split.index, ids, note=note)
    return check_split(shard_set, found, where=where)


def _named(versions: list[Version]) -> str:
    """A split does not say at which of them it was made."""
    if len(versions) == 1:
        return f"version {versions[0].version}"
    numbers = " or ".join(str(version.version) for version in versions)
    return f"version {numbers} (with the same images)"


def _versions_of(shard_set: ShardSet, split: Split, where: str) -> list[Version]:
    """The versions a split fits: an update of labels alone keeps names."""
    history = shard_set.manifest.history
    found = [version for version in history if version.ids_sha256 == split.ids_sha256]
    if found:
        return found
    raise ShardError(
        f"{where}: is a split of no earlier version of {shard_set.root}; `--extend` takes over "
        "splits of a set that `lmcl-shard update` has changed since",
        exit_code=3,
    )


def _parts_of(shard_set: ShardSet, new: Ids, kept: list[Ids], split: Split) -> NDArray[np.int64]:
    """0, 1 or 2 for each new image: its group's part, or one that is drawn for its group."""
    keys = shard_set.samples.group_key
    part_of = {int(key): k for k, ids in enumerate(kept) for key in np.unique(keys[ids])}
    sizes = np.array([split.train.size, split.val.size, split.test.size], np.float64)
    ends = np.cumsum(sizes / sizes.sum())

    def drawn(key: int) -> int:
        digest = hashlib.blake2b(f"{key}/{split.seed}/{split.index}".encode(), digest_size=8)
        share = int.from_bytes(digest.digest(), "little") / 2.0**64
        return int(np.searchsorted(ends, share, side="right").clip(0, 2))

    found = [part_of.get(int(key), -1) for key in keys[new]]
    return np.array(
        [
            part if part >= 0 else drawn(int(key))
            for part, key in zip(found, keys[new], strict=True)
        ],
        np.int64,
    )
