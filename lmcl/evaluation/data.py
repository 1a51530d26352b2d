"""The data of a run as its configuration names them: one set and its split, or several together."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lmcl.config import DataConfig, SetConfig
from pipeline.loader import draw_of_sets
from shards.joined import JoinedSet, join_sets, join_splits
from shards.read import ShardSet, open_set
from shards.splits.split import Split, load_split


def open_data(data: DataConfig) -> tuple[ShardSet, Split]:
    """The set and the split of a run; of a joint one all sets as one, and their own parts together.

    Raises:
        ShardError: If a set or a split is not there, or they cannot be joined.
    """
    opened = list(open_sources(data))
    if len(opened) == 1:
        return opened[0]
    joined = join_sets([one for one, _ in opened], [source.name for source in data.sources])
    return joined, join_splits(joined, [split for _, split in opened])


def open_sources(data: DataConfig) -> Iterator[tuple[ShardSet, Split]]:
    """Each set of a run with its own split."""
    for source in data.sources:
        shard_set = open_source(data, source)
        yield shard_set, load_split(shard_set, source.split)


def open_source(data: DataConfig, source: SetConfig) -> ShardSet:
    """One set of a run."""
    return open_set(source.root, cache=Path(data.cache) if data.cache else None)


def describe_splits(data: DataConfig) -> str:
    """The run's split as it was asked for; of a joint run each set's."""
    return ", ".join(source.split for source in data.sources)


def epoch_images(data: DataConfig, shard_set: ShardSet, split: Split) -> int:
    """Images of one training epoch."""
    return sum(epoch_shares(data, shard_set, split))


def epoch_shares(data: DataConfig, shard_set: ShardSet, split: Split) -> tuple[int, ...]:
    """Images of each set in one training epoch; of a single set all of its train part."""
    train = split.part("train")
    if not isinstance(shard_set, JoinedSet):
        return (len(train),)
    return draw_of_sets(shard_set, np.unique(train), exponent=data.share_exponent, seed=0).counts
