"""Packed sets packed again: another shard size, or several sets in one.

One set keeps its ids, its scores and its splits. Several sets become one whose scores are brought
to 0..1, higher is better, each by its own scale (a wider one where its labels leave it); the
manifest keeps the scales, so that every raw score can be had back (`raw =
member.score.from_unit(mos)`). Images that two sets share by content are in one group.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from shards.build.build import build
from shards.build.executor import Engine
from shards.build.pack import PackOptions
from shards.build.plan import Plan, ShardSize
from shards.errors import ShardError
from shards.joined import UNIT, covering_scale, shared_groups
from shards.manifest import SPLITS, Manifest
from shards.read import ShardSet
from shards.sample import DataSet, Facts, Member, Sample
from shards.sample_table import NO_LEVEL, SampleRow
from shards.score_scale import ScoreScale
from shards.splits.split import load_split, write_split
from shards.store import Store

logger = logging.getLogger(__name__)


def reshard(
    sets: Sequence[ShardSet],
    output: str | Path,
    *,
    name: str | None = None,
    size: ShardSize | None = None,
    workers: int | None = None,
    engine: Engine = "local",
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[Plan], None] | None = None,
) -> Manifest:
    """Pack finished sets again; image bytes are copied as they are.

    Args:
        sets: One set to change its shard size, several to merge them.
        output: Folder or URL of the new set.
        name: Short name of the new set; needed for several, default for one: its own.
        size: When a shard is full.
        workers: Shards packed at a time.
        engine: Where jobs run.
        progress: Called with (images finished since the last call, images in all).
        tell: Called with the plan before anything is packed.

    Raises:
        ShardError: If a merged set has no name, or two sets share one.
    """
    for one in sets:
        if str(output).rstrip("/") == one.root.rstrip("/"):
            raise ShardError(
                f"{one.root}: cannot be packed again into itself; give another `--output`",
                exit_code=2,
            )
    dataset = _again(sets[0], name) if len(sets) == 1 else _merged(sets, name)
    options = PackOptions(on_error="skip" if _has_gaps(sets[0]) else "fail")
    manifest = build(
        dataset,
        output,
        workers=workers,
        engine=engine,
        options=options,
        size=size,
        progress=progress,
        tell=tell,
    )
    if len(sets) == 1:
        _copy_splits(sets[0], output, dataset.name)
    return manifest


def _has_gaps(one: ShardSet) -> bool:
    return one.manifest.num_rejected + one.manifest.num_withdrawn > 0


def _copy_splits(one: ShardSet, output: str | Path, name: str) -> None:
    """The same ids under the new set's name; images, and so hashes of splits, are the same."""
    target = Store(output)
    for file in one.store.names(SPLITS):
        try:
            split = load_split(one, Path(file).stem)
        except ShardError as error:
            # Of another version of the set: its ids mean nothing in this one.
            logger.warning("%s is left behind: %s", file, error)
            continue
        if name == one.name:
            target.write(file, one.store.read(file))
        else:
            write_split(output, dataclasses.replace(split, set=name))


def _again(one: ShardSet, name: str | None) -> DataSet:
    def samples() -> Iterator[Sample]:
        for id in range(len(one.samples)):
            row = one.samples.row(id)
            yield _sample(one, row, row.path, row.group, row.subset, _plain(row.mos), row.mos_std)

    return DataSet(
        name=name or one.name,
        score=one.score,
        samples=samples,
        facts=one.manifest.facts,
        members=one.manifest.members,
    )


def _merged(sets: Sequence[ShardSet], name: str | None) -> DataSet:
    names = [one.name for one in sets]
    if name is None:
        raise ShardError("several sets become one: give it a name with `--name`", exit_code=2)
    if len(set(names)) != len(names):
        last = sets[-1].store.shown.rstrip("/")
        raise ShardError(
            f"two of the sets are called the same ({', '.join(names)}), and their images could not "
            f"be told apart; give one another name first: `lmcl-shard reshard {last} --name "
            f"{names[-1]}-2 --output {last}-2`",
            exit_code=2,
        )
    members, first_id = [], 0
    scales = [covering_scale(one) for one in sets]
    for one, scale in zip(sets, scales, strict=True):
        rows = int(one.ids().size)
        members.append(Member(name=one.name, score=scale, first_id=first_id, rows=rows))
        first_id += rows
    shared = shared_groups(sets, names)

    def samples() -> Iterator[Sample]:
        for one, scale in zip(sets, scales, strict=True):
            unit = (
                np.full(len(one.samples), np.nan)
                if scale is None
                else scale.to_unit(one.samples.mos)
            )
            span = scale.high - scale.low if scale else 1.0
            for id in one.ids().tolist():
                row = one.samples.row(id)
                subset = f"{one.name}/{row.subset}" if row.subset else one.name
                yield _sample(
                    one,
                    row,
                    f"{one.name}/{row.path}",
                    shared.get(group := f"{one.name}/{row.group}", group),
                    subset,
                    _plain(float(unit[id])),
                    row.mos_std / span,
                )

    titles = ", ".join(one.manifest.facts.title for one in sets)
    licences = "; ".join(f"{one.name}: {one.manifest.facts.licence}" for one in sets)
    return DataSet(
        name=name,
        score=UNIT if any(one.score for one in sets) else None,
        samples=samples,
        facts=Facts(title=f"Merged: {titles}", licence=licences),
        members=tuple(members),
        notes=tuple(_merge_notes(sets, scales, shared)),
        is_checked=True,
    )


def _merge_notes(
    sets: Sequence[ShardSet], scales: Sequence[ScoreScale | None], shared: dict[str, str]
) -> Iterator[str]:
    for one, scale in zip(sets, scales, strict=True):
        if scale is not None and one.score is not None and scale != one.score:
            yield (
                f"{one.name}: its scores leave its scale {one.score.label}; they are brought to "
                f"0..1 by {scale.label}, which the manifest keeps"
            )
    if shared:
        yield (
            f"{len(shared):,} groups of one set hold an image of another; they are one group with "
            "it, so that a split keeps both in one part"
        )
    parts = {one.name: bool(np.any(one.samples.part[one.ids()] != "")) for one in sets}
    without = [name for name, has_parts in parts.items() if not has_parts]
    if without and len(without) < len(sets):
        yield (
            f"{', '.join(without)}: has no parts of its own, so that `--protocol official` leaves "
            "its images out"
        )


def _sample(
    one: ShardSet,
    row: SampleRow,
    path: str,
    group: str,
    subset: str,
    mos: float | None,
    mos_std: float,
) -> Sample:
    file = one.shard_path(row.shard) if row.ok else Path(one.store.shown) / "rejected" / row.path
    return Sample(
        path=path,
        file=file,
        offset=max(row.offset, 0),
        size=row.size if row.ok else None,
        mos=mos,
        mos_std=_plain(mos_std),
        group=group,
        distortion=row.distortion,
        level=None if row.level == NO_LEVEL else row.level,
        subset=subset,
        part=row.part,
    )


def _plain(value: float) -> float | None:
    return None if math.isnan(value) else value
