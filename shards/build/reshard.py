"""Packed sets packed again: another shard size, or several sets in one.

One set keeps its ids, its scores and its splits. Several sets become one whose scores are brought
to 0..1, higher is better, each by its own scale; the manifest keeps the scales, so that every raw
score can be had back (`raw = member.score.from_unit(mos)`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from shards.build.build import build
from shards.build.executor import Engine
from shards.build.pack import PackOptions
from shards.build.plan import ShardSize
from shards.errors import ShardError
from shards.manifest import SPLITS, Manifest
from shards.read import ShardSet
from shards.sample import DataSet, Facts, Member, Sample
from shards.sample_table import NO_LEVEL, SampleRow
from shards.score_scale import ScoreScale
from shards.store import Store

UNIT = ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True)


def reshard(
    sets: Sequence[ShardSet],
    output: str | Path,
    *,
    name: str | None = None,
    size: ShardSize | None = None,
    workers: int | None = None,
    engine: Engine = "local",
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Pack finished sets again; image bytes are copied as they are.

    Args:
        sets: One set to change its shard size, several to merge them.
        output: Folder or URL of the new set.
        name: Short name of a merged set; needed for several.
        size: When a shard is full.
        workers: Shards packed at a time.
        engine: Where jobs run.
        progress: Called with (images finished since the last call, images in all).

    Raises:
        ShardError: If a merged set has no name, or two sets share one.
    """
    for one in sets:
        if str(output).rstrip("/") == one.root.rstrip("/"):
            raise ShardError(
                f"{one.root}: cannot be packed again into itself; give another `--output`",
                exit_code=2,
            )
    dataset = _again(sets[0]) if len(sets) == 1 else _merged(sets, name)
    options = PackOptions(on_error="skip" if sets[0].manifest.num_rejected else "fail")
    manifest = build(
        dataset,
        output,
        workers=workers,
        engine=engine,
        options=options,
        size=size,
        progress=progress,
    )
    if len(sets) == 1:
        target = Store(output)
        for split in sets[0].store.names(SPLITS):
            target.write(split, sets[0].store.read(split))
    return manifest


def _again(one: ShardSet) -> DataSet:
    def samples() -> Iterator[Sample]:
        for id in range(len(one.samples)):
            row = one.samples.row(id)
            yield _sample(one, row, row.path, row.group, row.subset, _plain(row.mos), row.mos_std)

    return DataSet(
        name=one.name,
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
        raise ShardError(
            f"two of the sets are called the same ({', '.join(names)}); reshard needs different "
            "names to keep their images apart",
            exit_code=2,
        )
    members, first_id = [], 0
    for one in sets:
        rows = int(one.ids().size)
        members.append(Member(name=one.name, score=one.score, first_id=first_id, rows=rows))
        first_id += rows

    def samples() -> Iterator[Sample]:
        for one in sets:
            unit = one.unit_mos()
            span = one.score.high - one.score.low if one.score else 1.0
            for id in one.ids().tolist():
                row = one.samples.row(id)
                subset = f"{one.name}/{row.subset}" if row.subset else one.name
                yield _sample(
                    one,
                    row,
                    f"{one.name}/{row.path}",
                    f"{one.name}/{row.group}",
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
