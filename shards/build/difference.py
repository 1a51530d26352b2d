"""What a source has that a finished set has not: the sentence of a build that finds another set."""

import math
from collections import Counter

from shards.errors import ShardError
from shards.read import open_set
from shards.sample import DataSet, Sample
from shards.sample_table import NO_LEVEL, SampleRow
from shards.store import Store

_MOST_ROWS = 2_000_000
"""Names of larger sets are not compared: they would have to be in memory."""


def describe_difference(store: Store, dataset: DataSet) -> str:
    """How a source differs from the set in a folder, in a few words.

    `2 more images`, `the same images, 12 other scores`, `the same images and labels, other files or
    options`.
    """
    try:
        packed = open_set(store.root, share_columns=False)
    except ShardError:
        return "the set there cannot be opened"
    if len(packed.samples) > _MOST_ROWS:
        return f"it has {len(packed.samples):,} rows"
    rows = {str(path): id for id, path in enumerate(packed.samples.path)}
    changed: Counter[str] = Counter()
    more, seen = 0, 0
    for sample in dataset.samples():
        id = rows.get(sample.path)
        if id is None:
            more += 1
            continue
        seen += 1
        changed.update(_changed(sample, packed.samples.row(id)))
    fewer = len(rows) - seen
    found = [_counted(more, "more image"), _counted(fewer, "fewer image")]
    found += [_counted(count, f"other {what}") for what, count in sorted(changed.items())]
    named = ", ".join(text for text in found if text)
    if dataset.name != packed.name:
        named = f"{named}, " if named else ""
        named += f"the name {dataset.name!r} instead of {packed.name!r}"
    if more == fewer == 0:
        return f"the same images, {named}" if named else _ALIKE
    return named


_ALIKE = "the same images and labels, other options (or files of another size)"


def _changed(sample: Sample, row: SampleRow) -> list[str]:
    """Kinds of labels that are not the same."""
    level = NO_LEVEL if sample.level is None else sample.level
    pairs = (
        ("score", _same(sample.mos, row.mos)),
        ("deviation", _same(sample.mos_std, row.mos_std)),
        ("group", sample.group == row.group),
        ("distortion", (sample.distortion, level) == (row.distortion, row.level)),
        ("subset", sample.subset == row.subset),
        ("part", sample.part == row.part),
    )
    return [what for what, is_same in pairs if not is_same]


def _same(new: float | None, old: float) -> bool:
    return math.isnan(old) if new is None else new == old


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}" if count else ""
