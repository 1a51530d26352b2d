"""SPAQ: smartphone photographs.

Quirks: labels are workbooks; images come in a split archive that often unpacks to truncated files
(every image is decoded at build time); phone photographs carry an EXIF orientation, applied
to width and height here and to the pixels when they are decoded.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.excel import read_sheet
from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample, Score

_LABELS = ("MOS and Image attribute scores.xlsx", "MOS_and_Image_attribute_scores.xlsx")
_SCENES = ("Scene category labels.xlsx", "Scene_category_labels.xlsx")

FACTS = Facts(
    title="SPAQ: smartphone photography attribute and quality",
    page="https://github.com/h4nwei/SPAQ",
    licence="see the page; obtain it there",
    citation="Y. Fang et al.: Perceptual quality assessment of smartphone photography, CVPR 2020",
    source="Annotations/MOS and Image attribute scores.xlsx, column MOS",
    expected=Expected(samples=11125, low=2.0, high=96.0),
)
SCORE = Score(kind="mos", low=0.0, high=100.0, higher_is_better=True)


def open_spaq(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from the folder with `TestImage/` and `Annotations/`.

    Raises:
        ShardError: If the workbook is missing or a row of it cannot be understood.
    """
    labels = find_one(root, _LABELS, what="the folder with TestImage/ and Annotations/")
    rows = list(_rows(labels))
    scenes = _scenes(labels.parent)
    index = FolderIndex(images or root)
    bases = by_base_name(index)

    def samples() -> Iterator[Sample]:
        for name, mos in rows:
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=mos,
                mos_std=None,
                group=name,
                subset=scenes.get(name, ""),
            )

    return DataSet(name="spaq", score=SCORE, samples=samples, facts=FACTS)


def _rows(labels: Path) -> Iterator[tuple[str, float]]:
    sheet = read_sheet(labels)
    header = [str(cell or "").strip().lower() for cell in next(sheet, ())]
    if "image name" not in header or "mos" not in header:
        raise ShardError(
            f"{labels}: the first row is {header!r}, without `Image name` and `MOS`", exit_code=3
        )
    name_at, mos_at = header.index("image name"), header.index("mos")
    for number, row in enumerate(sheet, start=2):
        name = str(row[name_at] or "").strip() if len(row) > name_at else ""
        if name:
            score = row[mos_at] if len(row) > mos_at else None
            yield name, parse_score(score, where=f"{labels}: row {number}")


def _scenes(folder: Path) -> dict[str, str]:
    """The category with the largest weight of each image, if the workbook is there."""
    path = next((folder / name for name in _SCENES if (folder / name).is_file()), None)
    if path is None:
        return {}
    sheet = read_sheet(path)
    header = [str(cell or "").strip() for cell in next(sheet, ())]
    found: dict[str, str] = {}
    for row in sheet:
        where = f"{path}: {row[0] if row else 'a row'}"
        weights = [parse_score(cell or 0, where=where) for cell in row[1 : len(header)]]
        if row[0] and weights:
            found[str(row[0]).strip()] = header[1 + weights.index(max(weights))]
    return found
