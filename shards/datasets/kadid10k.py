"""KADID-10k: 81 references, 25 distortions at 5 levels.

Quirks: references lie in the same folder as distorted images and have no label; the column `dmos`
is a MOS (higher is better), and the column `var` is a standard deviation.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.datasets.rows import read_rows
from shards.datasets.values import name_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale

TYPES = (
    "gaussian blur",
    "lens blur",
    "motion blur",
    "colour diffusion",
    "colour shift",
    "colour quantisation",
    "saturation (HSV)",
    "saturation (Lab)",
    "JPEG2000",
    "JPEG",
    "white noise",
    "white noise in colour component",
    "impulse noise",
    "multiplicative noise",
    "denoise",
    "brighten",
    "darken",
    "mean shift",
    "jitter",
    "non-eccentricity patch",
    "pixelate",
    "quantisation",
    "colour block",
    "high sharpen",
    "contrast change",
)
_NAME = re.compile(r"(i\d\d)_(\d\d)_(\d\d)\.png", re.IGNORECASE)

FACTS = Facts(
    title="KADID-10k: Konstanz artificially distorted image quality database",
    page="https://database.mmsp-kn.de/kadid-10k-database.html",
    licence="see the page; obtain it there",
    citation="H. Lin, V. Hosu, D. Saupe: KADID-10k, QoMEX 2019",
    source="dmos.csv (the column dmos is a MOS, var is a standard deviation)",
    expected=Expected(samples=10125, groups=81, low=1.0, high=4.93),
)
SCORE = ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)


def open_kadid10k(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from its unpacked folder.

    Raises:
        ShardError: If `dmos.csv` is missing, or a row of it cannot be understood.
    """
    labels = find_one(root, ["dmos.csv"], what="the unpacked kadid10k folder")
    index = FolderIndex(images or labels.parent, endings={".png"})
    bases = by_base_name(index)

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(read_rows(labels), start=2):
            where = f"{labels}: row {number}"
            name = name_text(row.get("dist_img"), where=where)
            parts = _NAME.fullmatch(name)
            if parts is None or not 1 <= int(parts[2]) <= len(TYPES):
                raise ShardError(
                    f"{where}: dist_img {name!r} is not I<ref>_<type>_<level>.png", exit_code=3
                )
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=parse_score(row.get("dmos"), where=where),
                mos_std=parse_score(row["var"], where=where) if "var" in row else None,
                group=parts[1].upper(),
                distortion=TYPES[int(parts[2]) - 1],
                level=int(parts[3]),
            )

    return DataSet(name="kadid10k", score=SCORE, samples=samples, facts=FACTS)
