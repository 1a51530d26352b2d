"""Checks of a loader's arguments and sample ids, before anything is opened."""

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import LEAVE_OUT, PipelineError
from pipeline.shard_reader import ShardReader
from shards.read import ShardSet

_BLOCK = 1 << 20


def check_arguments(mode: str, on_error: str) -> None:
    """Refuse unknown names.

    Raises:
        ValueError: Naming the argument.
    """
    for name, value, known in (
        ("mode", mode, ("train", "eval", "global")),
        ("on_error", on_error, ("fail", "skip")),
    ):
        if value not in known:
            raise ValueError(f"{name} of a loader is {value!r}; choose one of {', '.join(known)}")


def codecs_of(shard_set: ShardSet) -> frozenset[str]:
    """Codecs of a set's images: one pass over one column, which is not kept."""
    found: set[str] = set()
    for batch in shard_set.samples.arrow(["codec"]):
        found.update(batch.column(0).unique().to_pylist())
    return frozenset(found)


def usable_ids(
    shard_set: ShardSet, reader: ShardReader, ids: NDArray[np.int64], on_error: str
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids to load, and those left out.

    Raises:
        PipelineError: If there are none, one is not of this set or listed twice, or one was
            rejected at build time and `on_error` is `fail`.
    """
    ids = np.asarray(ids, dtype=np.int64)
    if ids.size == 0:
        raise PipelineError(
            f"{shard_set.name}: a loader was asked for no sample at all; the split's part is empty",
            exit_code=3,
        )
    known = len(shard_set.samples)
    if ids.min() < 0 or ids.max() >= known:
        raise PipelineError(
            f"{shard_set.name}: sample {ids[(ids < 0) | (ids >= known)][0]} was asked for, the set "
            f"has {known}; the split belongs to another set",
            exit_code=3,
        )
    # Splits are sorted as a rule; then there is no need to sort them again to find doubles.
    if not _increases(ids) and np.unique(ids).size != ids.size:
        raise PipelineError(
            f"{shard_set.name}: an id is listed twice; make the split again", exit_code=3
        )
    usable = shard_set.samples.ok[ids]
    if on_error == "skip":
        usable = usable & reader.intact(ids)
    elif not usable.all():
        raise PipelineError(
            f"{shard_set.name}: sample {ids[~usable][0]} was rejected when the set was built "
            f"(rejected.jsonl); make the split again; {LEAVE_OUT}",
            exit_code=3,
        )
    if not usable.any():
        raise PipelineError(f"{shard_set.name}: all {ids.size} samples are damaged", exit_code=3)
    # Ids that a set or a split keeps in a shared file stay there.
    return (ids, ids[:0]) if usable.all() else (ids[usable], ids[~usable])


def _increases(ids: NDArray[np.int64]) -> bool:
    blocks = (ids[start : start + _BLOCK + 1] for start in range(0, ids.size, _BLOCK))
    return all(bool((block[1:] > block[:-1]).all()) for block in blocks)
