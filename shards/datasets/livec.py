"""LIVE In the Wild Image Quality Challenge.

Quirks: the first seven rows are training images in a folder of their own, and are dropped; half of
the files end in `.JPG`; the archive is often nested twice.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.datasets.matlab import load_numbers, load_strings
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.text import printable

ROWS = 1169
TRAINING = 7

FACTS = Facts(
    title="LIVE In the Wild Image Quality Challenge (LIVEC, CLIVE)",
    page="https://live.ece.utexas.edu/research/ChallengeDB/index.html",
    licence="copy, modify and distribute with notice and citation (its README)",
    citation="D. Ghadiyaram, A. C. Bovik: Massive online crowdsourced study, IEEE TIP 25(1), 2016",
    source="Data/AllMOS_release.mat",
    expected=Expected(samples=1162, low=3.42, high=92.43195),
)
SCORE = ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)


def open_livec(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from `ChallengeDB_release`, nested or not.

    Raises:
        ShardError: If a label file is missing, or they do not belong together.
    """
    where = "the unpacked ChallengeDB_release folder"
    names_file = find_one(root, ["AllImages_release.mat"], what=where)
    scores_file = find_one(root, ["AllMOS_release.mat"], what=where)
    spread_file = find_one(root, ["AllStdDev_release.mat"], what=where)
    names = load_strings(names_file, "AllImages_release")
    (scores,) = load_numbers(scores_file, ["AllMOS_release"])
    (spread,) = load_numbers(spread_file, ["AllStdDev_release"])
    if not len(names) == scores.size == spread.size == ROWS:
        raise ShardError(
            f"{names_file.parent}: {len(names)} names, {scores.size} scores and {spread.size} "
            f"deviations instead of {ROWS} each; take the files of the official archive",
            exit_code=3,
        )
    if not all(name.startswith("t") for name in names[:TRAINING]):
        raise ShardError(
            f"{names_file}: the first {TRAINING} rows are not the training images t1 .. t7, but "
            f"{printable(', '.join(names[:TRAINING]))}",
            exit_code=3,
        )
    index = FolderIndex(images or root)
    bases = by_base_name(index)

    def samples() -> Iterator[Sample]:
        for row in range(TRAINING, ROWS):
            name = names[row]
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=parse_score(scores[row], where=f"{scores_file}: row {row + 1}"),
                mos_std=parse_score(spread[row], where=f"{spread_file}: row {row + 1}"),
                group=name,
            )

    return DataSet(name="livec", score=SCORE, samples=samples, facts=FACTS)
