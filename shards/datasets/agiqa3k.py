"""AGIQA-3K: generated images, scored for quality and for agreement with their prompt.

Quirk: images of one prompt by several generators show the same content, so the prompt is the group.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.datasets.rows import read_rows
from shards.datasets.values import cell_text, is_missing, name_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.text import printable

FACTS = Facts(
    title="AGIQA-3K: images generated from text",
    page="https://github.com/lcysyzxdxc/AGIQA-3k-Database",
    licence="see the page; obtain it there",
    citation="C. Li et al.: AGIQA-3K, IEEE TCSVT 34(8), 2024",
    source="data.csv, column mos_quality",
    expected=Expected(samples=2982),
)
SCORE = ScoreScale(kind="mos", low=0.0, high=5.0, higher_is_better=True)


def open_agiqa3k(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from the folder with `data.csv` and its images.

    Raises:
        ShardError: If `data.csv` is missing or has other columns.
    """
    labels = find_one(root, ["data.csv"], what="the folder with data.csv and the images")
    index = FolderIndex(images or root)
    bases = by_base_name(index)
    rows = list(read_rows(labels))
    if not rows or not {"name", "prompt", "mos_quality"} <= set(rows[0]):
        raise ShardError(
            f"{labels}: needs the columns name, prompt and mos_quality, has "
            f"{printable(', '.join(rows[0]), 400) if rows else 'no rows'}",
            exit_code=3,
        )

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(rows, start=2):
            where = f"{labels}: row {number}"
            name = name_text(row["name"], where=where)
            spread = row.get("std_quality")
            prompt = cell_text(row["prompt"], where=where)
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=parse_score(row["mos_quality"], where=where),
                mos_std=None if is_missing(spread) else parse_score(spread, where=where),
                group=prompt if prompt != "" else name,
                subset=name.split("_")[0],
            )

    return DataSet(name="agiqa3k", score=SCORE, samples=samples, facts=FACTS)
