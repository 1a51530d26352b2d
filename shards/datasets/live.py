"""LIVE Image Quality Assessment Database, release 2.

Quirks: `img1.bmp` exists in all five folders, so a name needs its folder; 203 of the 982 rows are
undistorted references repeated inside the distortion folders (`orgs`), and are skipped; scores are
differences and leave 0..100 on both sides; two label files differ, the realigned one is taken.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards.datasets.files import FolderIndex, find_one, parse_score
from shards.datasets.matlab import load_numbers, load_strings
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale

# The order of all 982-long arrays.
BLOCKS = (("jp2k", 227), ("jpeg", 233), ("wn", 174), ("gblur", 174), ("fastfading", 174))
ROWS = 982

FACTS = Facts(
    title="LIVE Image Quality Assessment Database, release 2",
    page="https://live.ece.utexas.edu/research/quality/subjective.htm",
    licence="use, copy, modify and distribute with the copyright notice kept and citation given; "
    "obtain it from the page (form)",
    citation="H. R. Sheikh, Z. Wang, L. Cormack, A. C. Bovik: LIVE image quality assessment "
    "database release 2; Sheikh, Sabir, Bovik, IEEE TIP 15(11), 2006",
    source="dmos_realigned.mat (dmos_new)",
    expected=Expected(samples=779, groups=29, low=-2.640015, high=111.774694),
)
SCORE = ScoreScale(kind="dmos", low=-2.640015, high=111.774694, higher_is_better=False)


def open_live(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from `databaserelease2`, wherever it is nested.

    Raises:
        ShardError: If a label file is missing or its arrays have other lengths than 982.
    """
    where = "the unpacked databaserelease2 folder"
    labels = find_one(root, ["dmos_realigned.mat", "dmos.mat"], what=where)
    references = find_one(root, ["refnames_all.mat"], what=where)
    realigned = labels.name.lower() == "dmos_realigned.mat"
    if realigned:
        dmos, copies, spread = load_numbers(labels, ["dmos_new", "orgs", "dmos_std"])
    else:
        dmos, copies = load_numbers(labels, ["dmos", "orgs"])
        spread = np.full(dmos.size, np.nan)
    names = load_strings(references, "refnames_all")
    for what, size in (("dmos", dmos.size), ("orgs", copies.size), ("refnames_all", len(names))):
        if size != ROWS:
            raise ShardError(
                f"{labels}: {what} has {size} entries instead of {ROWS}; damaged copies are in "
                "circulation, take the files of the official archive",
                exit_code=3,
            )
    index = FolderIndex(images or labels.parent)

    def samples() -> Iterator[Sample]:
        paths = [f"{folder}/img{k + 1}.bmp" for folder, count in BLOCKS for k in range(count)]
        for row, path in enumerate(paths):
            if copies[row] != 0:
                continue
            place = f"{labels}: row {row + 1}"
            yield Sample(
                path=path,
                file=index.path(path),
                mos=parse_score(dmos[row], where=place),
                mos_std=float(spread[row]) if np.isfinite(spread[row]) else None,
                group=_stem(names[row]),
                distortion=path.partition("/")[0],
            )

    if realigned:
        return DataSet(name="live", score=SCORE, samples=samples, facts=FACTS)
    used = dmos[copies == 0]
    score = ScoreScale(
        kind="dmos", low=float(used.min()), high=float(used.max()), higher_is_better=False
    )
    facts = replace(FACTS, source="dmos.mat (dmos)", expected=Expected(samples=779, groups=29))
    return DataSet(name="live", score=score, samples=samples, facts=facts)


def _stem(name: str) -> str:
    stem, point, _ = name.lower().rpartition(".")
    return stem if point and stem != "" else name.lower()
