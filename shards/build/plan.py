"""Which sample goes into which shard: decided before packing, from names and file sizes."""

import array
import collections
import hashlib
import itertools
import math
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from shards.build.pack import PackOptions, ShardJob, hashed
from shards.build.score_check import ScoreCheck
from shards.errors import MOST_PROBLEMS, ShardError
from shards.manifest import FORMAT_VERSION, ids_hash
from shards.sample import DataSet, Sample
from shards.sample_table import group_key
from shards.text import printable

_NAMED = 5
_PIECES = 16
_LEAST_SAMPLES, _MOST_SAMPLES = 100, 2000


@dataclass(frozen=True, kw_only=True)
class ShardSize:
    """When a shard is full; whichever limit comes first."""

    size_bytes: int = 256 << 20
    """Encoded bytes of its images."""
    samples: int | None = None
    """Images; None for a sixteenth of the set, at least 100 and at most 2,000: a small set has
    something for several workers to do, when it is packed and when others' loaders read it."""

    def __post_init__(self) -> None:
        if self.size_bytes < 1 or (self.samples is not None and self.samples < 1):
            raise ValueError(f"a shard needs room for one image, got {self}")

    def samples_of(self, rows: int) -> int:
        """How many images a shard of a set of `rows` images may have."""
        if self.samples is not None:
            return self.samples
        return min(_MOST_SAMPLES, max(_LEAST_SAMPLES, math.ceil(rows / _PIECES)))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a build is going to do."""

    name: str
    """The set."""
    rows: int
    """Samples in the source."""
    size_bytes: int
    """Bytes of their files."""
    labelled: int
    """Samples with a score."""
    groups: int
    """Distinct groups."""
    starts: tuple[int, ...]
    """First id of each shard."""
    missing: tuple[str, ...]
    """The first few files that labels name and that are not there."""
    num_missing: int
    """All of them."""
    problems: tuple[str, ...]
    """The first few samples that cannot be packed, and why."""
    num_problems: int
    """All of them."""
    ids_sha256: str
    """Hash over the names."""
    source_sha256: str
    """Hash over names, labels, file sizes and options."""
    parts: tuple[tuple[str, int], ...] = ()
    """Sizes of the set's own train, val and test parts, those that it has."""
    notes: tuple[str, ...] = ()
    """What the user is told about the source, a line each."""


def make_plan(
    dataset: DataSet,
    *,
    options: PackOptions,
    size: ShardSize,
    starts: tuple[int, ...] | None = None,
) -> Plan:
    """Go through the source once, without opening an image.

    Args:
        dataset: What to pack.
        options: How; part of the source's hash.
        size: When a shard is full.
        starts: First ids of the shards, to keep the borders of an earlier build.

    Raises:
        ShardError: If the set is empty, names an image twice, or has scores outside its scale.
    """
    check = ScoreCheck(dataset.score) if dataset.score and dataset.is_checked else None
    parts = collections.Counter[str]()
    names, source = (
        ids_hash(),
        hashlib.sha256(msgspec.json.encode((FORMAT_VERSION, hashed(options)))),
    )
    missing = list[str]()
    problems = list[str]()
    rows = labelled = num_missing = num_problems = 0
    groups, paths, sizes = array.array("q"), array.array("q"), array.array("q")
    for sample in dataset.samples():
        file_bytes = _file_size(sample)
        if sample.problem:
            num_problems += 1
            problems += [sample.problem] if len(problems) < MOST_PROBLEMS else []
        elif file_bytes is None:
            num_missing += 1
            missing += [str(sample.file)] if len(missing) < _NAMED else []
        names.update(sample.path.encode("utf-8", "surrogateescape") + b"\n")
        source.update(_described(sample, file_bytes))
        groups.append(group_key(sample.group))
        paths.append(group_key(sample.path))
        sizes.append(file_bytes or 0)
        rows += 1
        parts[sample.part] += 1
        if check is not None:
            check.add(sample)
        labelled += sample.mos is not None
    if rows == 0:
        raise ShardError(f"{dataset.name}: there is no image to pack in the source", exit_code=3)
    _refuse_twice(dataset, paths)
    if check is not None:
        check.refuse_outside(dataset.name)
    return Plan(
        name=dataset.name,
        rows=rows,
        size_bytes=sum(sizes),
        labelled=labelled,
        groups=int(np.unique(np.frombuffer(groups, np.int64)).size),
        starts=cut_into_shards(sizes, size) if starts is None or starts[-1] >= rows else starts,
        missing=tuple(missing),
        num_missing=num_missing,
        problems=tuple(problems),
        num_problems=num_problems,
        ids_sha256=names.hexdigest(),
        source_sha256=source.hexdigest(),
        parts=tuple((part, parts[part]) for part in ("train", "val", "test") if parts[part]),
        notes=(*dataset.notes, *(check.notes(dataset.name) if check is not None else ())),
    )


def cut_into_shards(sizes: Sequence[int], limit: ShardSize) -> tuple[int, ...]:
    """First ids of the shards."""
    cuts, in_shard, held = [0], 0, 0
    most = limit.samples_of(len(sizes))
    for id, size in enumerate(sizes):
        if in_shard and (in_shard == most or held + size > limit.size_bytes):
            cuts.append(id)
            in_shard = held = 0
        in_shard, held = in_shard + 1, held + size
    return tuple(cuts)


def jobs_of(
    dataset: DataSet,
    plan: Plan,
    *,
    root: str,
    options: PackOptions,
    pixels_at_once: int,
    budget: str,
) -> Iterator[ShardJob]:
    """The jobs of a plan, made one at a time."""
    samples = dataset.samples()
    ends = (*plan.starts[1:], plan.rows)
    for index, (start, end) in enumerate(zip(plan.starts, ends, strict=True)):
        taken = tuple(sample for _, sample in zip(range(start, end), samples, strict=False))
        if len(taken) != end - start:
            raise ShardError(
                f"{dataset.name}: the source changed while it was packed; run the command again"
            )
        yield ShardJob(
            root=root,
            set_name=dataset.name,
            index=index,
            first_id=start,
            samples=taken,
            options=options,
            fingerprint=fingerprint(taken, start, options),
            pixels_at_once=pixels_at_once,
            budget=budget,
        )


def fingerprint(samples: tuple[Sample, ...], first_id: int, options: PackOptions) -> str:
    """Hash of what a shard is made from: samples, file sizes and times, options."""
    found = hashlib.sha256(msgspec.json.encode((FORMAT_VERSION, first_id, hashed(options))))
    for sample in samples:
        try:
            status = os.stat(sample.file)
        except (OSError, ValueError):
            found.update(_described(sample, None))
        else:
            found.update(_described(sample, sample.size or status.st_size))
            found.update(str(status.st_mtime_ns).encode())
    return found.hexdigest()


def _described(sample: Sample, file_bytes: int | None) -> bytes:
    fields = (
        sample.path,
        sample.mos,
        sample.mos_std,
        sample.group,
        sample.distortion,
        sample.level,
        sample.subset,
        sample.part,
        sample.offset,
        file_bytes,
        # Not there for most, so that sets of earlier versions keep their hash.
        *((sample.problem,) if sample.problem else ()),
        *((sample.embedded,) if sample.embedded is not None else ()),
    )
    return repr(fields).encode("utf-8", "surrogateescape")


def _file_size(sample: Sample) -> int | None:
    try:
        status = os.stat(sample.file)
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return status.st_size if sample.size is None else sample.size


def _refuse_twice(dataset: DataSet, paths: "array.array[int]") -> None:
    keys = np.frombuffer(paths, np.int64)
    if np.unique(keys).size == keys.size:
        return
    values, counts = np.unique(keys, return_counts=True)
    doubled = set(values[counts > 1].tolist())
    first = next(s.path for s in dataset.samples() if group_key(s.path) in doubled)
    same = itertools.islice((s for s in dataset.samples() if s.path == first), _NAMED)
    scores = ", ".join(f"{sample.mos:g}" for sample in same if sample.mos is not None)
    others = len(doubled) - 1
    raise ShardError(
        f"{dataset.name}: {printable(first)!r} is listed more than once"
        f"{f', with the scores {scores}' if scores else ''}"
        f"{f', and {others:,} more are listed so' if others else ''}; "
        "keep one row for each image",
        exit_code=3,
    )
