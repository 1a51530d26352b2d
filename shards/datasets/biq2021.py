"""BIQ2021: 12,000 photographs, scored in a laboratory; official train and test lists.

Quirks: names hold spaces and brackets (`ss03 (5310).jpg`), one label's case differs from its file's
ending, the train list has two empty extra columns. `ss01`, `ss02` and `ss03` are the three sources.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import (
    FolderIndex,
    by_base_name,
    csv_rows,
    find_one,
    parse_score,
    refuse_unlabelled,
)
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.text import printable

_SUBSET = re.compile(r"(ss\d+) ", re.IGNORECASE)
_LISTS = (("train", "Train (Images and MOS).csv"), ("test", "Test (Images and MOS).csv"))

FACTS = Facts(
    title="BIQ2021: a large-scale blind image quality assessment database",
    page="https://github.com/nisarahmedrana/BIQ2021",
    licence="see the page; obtain the images there",
    citation="N. Ahmed, S. Asif: BIQ2021, Journal of Electronic Imaging 31(5), 2022",
    source="Train (Images and MOS).csv, Test (Images and MOS).csv",
    expected=Expected(samples=12000, parts=(("train", 10000), ("test", 2000))),
)
SCORE = ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True)


def open_biq2021(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from its unpacked folder (`Images/` and the two lists).

    Raises:
        ShardError: If a list or the folder is missing, a score is no number, or an image has no
            label.
    """
    lists = [
        (part, find_one(root, [name], what="the unpacked BIQ2021 folder")) for part, name in _LISTS
    ]
    index = FolderIndex(images or _images_folder(lists[0][1].parent))
    bases = by_base_name(index)
    named = [bases.get(sample.path.lower(), "") for sample in _samples(lists, index, bases)]
    refuse_unlabelled(
        index, named, labels="the two lists", way_out="add rows for them, or move them away"
    )
    return DataSet(
        name="biq2021", score=SCORE, samples=lambda: _samples(lists, index, bases), facts=FACTS
    )


def _images_folder(beside: Path) -> Path:
    folder = beside / "Images"
    return folder if folder.is_dir() else beside


def _samples(
    lists: list[tuple[str, Path]], index: FolderIndex, bases: dict[str, str]
) -> Iterator[Sample]:
    for part, path in lists:
        rows = csv_rows(path)
        header = next(rows, [])
        if [cell.strip().lower() for cell in header[:2]] != ["image name", "mos"]:
            raise ShardError(
                f"{path}: the header is {printable(header)}, not `Image Name,MOS`", exit_code=3
            )
        for number, row in enumerate(rows, start=2):
            if all(cell == "" for cell in row):
                continue
            where = f"{path}: row {number}"
            if len(row) < 2:
                raise ShardError(f"{where}: has no score", exit_code=3)
            yield _sample(row[0].strip(), row[1], part, index, bases, where)


def _sample(
    label: str, score: str, part: str, index: FolderIndex, bases: dict[str, str], where: str
) -> Sample:
    on_disk = bases.get(label.lower(), label)
    base = on_disk.rpartition("/")[2]
    subset = _SUBSET.match(base)
    return Sample(
        path=base,
        file=index.folder / on_disk,
        mos=parse_score(score, where=where),
        mos_std=None,
        group=base,
        subset=subset[1].lower() if subset else "",
        part=part,
    )
