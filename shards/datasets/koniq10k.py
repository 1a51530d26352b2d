"""KonIQ-10k.

Quirks: the column `MOS` is 1..5 in one label file and 0..100 in the other; the official parts are
called `training`, `validation` and `test`; three sizes of the same images are offered. The z-scaled
0..100 score is taken, as most papers do; the largest images are taken if several are there.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.datasets.rows import Row, read_rows
from shards.datasets.table import parse_part
from shards.datasets.values import name_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale

FILES = (
    "koniq10k_distributions_sets.csv",
    "koniq10k_scores_and_distributions.csv",
    "koniq10k_scores.csv",
)
_SIZES = ("1024x768", "512x384", "224x224")

FACTS = Facts(
    title="KonIQ-10k",
    page="https://database.mmsp-kn.de/koniq-10k-database.html",
    licence="see the page; obtain it there",
    citation="V. Hosu, H. Lin, T. Sziranyi, D. Saupe: KonIQ-10k, IEEE TIP 29, 2020",
    source="koniq10k_distributions_sets.csv (z-scaled MOS, official parts)",
    expected=Expected(
        samples=10073,
        low=3.91176,
        high=88.38889,
        parts=(("train", 7058), ("val", 1000), ("test", 2015)),
    ),
)
SCALED = ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)
RAW = ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)


def open_koniq10k(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from the folder with its images and one of its label files.

    Raises:
        ShardError: If there is no label file, or none of its columns is the score.
    """
    labels = find_one(root, FILES, what="the folder with the images and a koniq10k_*.csv")
    rows = list(read_rows(labels))
    column, score = _score_column(labels, rows)
    index = FolderIndex(images or _images_folder(root))
    bases = by_base_name(index)

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(rows, start=2):
            where = f"{labels}: row {number}"
            name = name_text(row.get("image_name"), where=where).strip('"')
            if not name:
                raise ShardError(f"{where}: names no image", exit_code=3)
            # SD is on the 1..5 scale in every file, so it belongs to the raw score only.
            spread = parse_score(row["sd"], where=where) if "sd" in row else None
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=parse_score(row[column], where=where),
                mos_std=spread if score is RAW else None,
                group=name,
                part=parse_part(row.get("set", ""), where=where),
            )

    has_parts = bool(rows) and "set" in rows[0]
    expected = FACTS.expected if score is SCALED else Expected(samples=10073)
    if not has_parts:
        expected = replace(expected, parts=())
    kind = "z-scaled MOS" if score is SCALED else "raw MOS 1..5"
    facts = replace(FACTS, source=f"{labels.name}, column {column} ({kind})", expected=expected)
    return DataSet(name="koniq10k", score=score, samples=samples, facts=facts)


def _score_column(labels: Path, table: list[Row]) -> tuple[str, ScoreScale]:
    if not table:
        raise ShardError(f"{labels}: has no rows", exit_code=3)
    if "mos_zscore" in table[0]:
        return "mos_zscore", SCALED
    if "mos" not in table[0]:
        raise ShardError(f"{labels}: has neither a column MOS nor MOS_zscore", exit_code=3)
    highest = max(parse_score(row["mos"], where=str(labels)) for row in table)
    return "mos", SCALED if highest > RAW.high else RAW


def _images_folder(root: Path) -> Path:
    """The folder of the largest copies, or the root if images lie flat or nested otherwise."""
    for size in _SIZES:
        for folder in sorted(root.rglob(size)):
            if folder.is_dir():
                return folder
    return root
