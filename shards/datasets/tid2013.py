"""TID2013: 25 references, 24 distortions at 5 levels.

Quirks: the label file spells names in three ways (`I01_01_1.bmp`, `I01_11_1.BMP`, `i01_02_1.bmp`)
and what lies on disk depends on the unpacker, so case is ignored. Levels of types 15 to 17 are not
ordered by quality.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score, read_label_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.source_files import is_regular

TYPES = (
    "additive Gaussian noise",
    "colour noise",
    "spatially correlated noise",
    "masked noise",
    "high-frequency noise",
    "impulse noise",
    "quantisation noise",
    "Gaussian blur",
    "denoising",
    "JPEG",
    "JPEG2000",
    "JPEG transmission errors",
    "JPEG2000 transmission errors",
    "non-eccentricity pattern noise",
    "local block-wise distortions",
    "mean shift",
    "contrast change",
    "colour saturation",
    "multiplicative Gaussian noise",
    "comfort noise",
    "lossy compression of noisy images",
    "colour quantisation with dither",
    "chromatic aberrations",
    "sparse sampling and reconstruction",
)
_NAME = re.compile(r"(i\d\d)_(\d\d)_(\d)\.bmp")

FACTS = Facts(
    title="TID2013: Tampere image database",
    page="https://www.ponomarenko.info/tid2013.htm",
    licence="education and research only; do not redistribute modified",
    citation="N. Ponomarenko et al.: Image database TID2013, Signal Processing: Image "
    "Communication 30, 2015",
    source="mos_with_names.txt",
    expected=Expected(samples=3000, groups=25, low=0.24242, high=7.21429),
)
SCORE = ScoreScale(kind="mos", low=0.0, high=9.0, higher_is_better=True)


def open_tid2013(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from its unpacked folder.

    Raises:
        ShardError: If the label file is missing, or a line of it cannot be understood.
    """
    labels = find_one(root, ["mos_with_names.txt"], what="the unpacked tid2013 folder")
    index = FolderIndex(images or _images_folder(labels.parent), endings={".bmp"})
    bases = by_base_name(index)
    lines = _lines(labels)
    spread = _spread(labels.with_name("mos_std.txt"), len(lines))

    def samples() -> Iterator[Sample]:
        for number, line in enumerate(lines, start=1):
            where = f"{labels}: line {number}"
            score, _, name = line.partition(" ")
            lower = name.strip().lower()
            parts = _NAME.fullmatch(lower)
            if parts is None or not 1 <= int(parts[2]) <= len(TYPES):
                raise ShardError(f"{where}: {name!r} is not I<ref>_<type>_<level>.bmp", exit_code=3)
            yield Sample(
                path=lower,
                file=index.folder / bases.get(lower, name.strip()),
                mos=parse_score(score, where=where),
                mos_std=spread[number - 1] if spread else None,
                group=parts[1],
                distortion=TYPES[int(parts[2]) - 1],
                level=int(parts[3]),
            )

    return DataSet(name="tid2013", score=SCORE, samples=samples, facts=FACTS)


def _images_folder(beside: Path) -> Path:
    """`distorted_images` in any case, or the folder of the labels if images lie flat in it."""
    for entry in sorted(beside.iterdir()):
        if entry.is_dir() and entry.name.lower() == "distorted_images":
            return entry
    return beside


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in read_label_text(path).splitlines() if line.strip()]


def _spread(path: Path, rows: int) -> list[float]:
    if not is_regular(path):
        return []
    values = _lines(path)
    if len(values) != rows:
        raise ShardError(
            f"{path}: {len(values)} lines, mos_with_names.txt has {rows}; they belong together",
            exit_code=3,
        )
    return [parse_score(value, where=f"{path}: line {n}") for n, value in enumerate(values, 1)]
