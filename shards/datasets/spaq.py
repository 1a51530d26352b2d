"""SPAQ: smartphone photographs.

Quirks: labels are workbooks; images come in a split archive that often unpacks to truncated files
(every image is decoded at build time); phone photographs carry an EXIF orientation, applied
to width and height here and to the pixels when they are decoded.
"""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.excel import read_sheet
from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score
from shards.datasets.values import cell_text, is_missing, name_text, one_name_each
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.source_files import is_regular
from shards.text import printable

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
SCORE = ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)


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
    _, names = next(sheet, (0, []))
    header = one_name_each(names, where=str(labels))
    if "image name" not in header or "mos" not in header:
        raise ShardError(
            f"{printable(labels)}: the first row is {printable(header)}, without `Image name` and "
            "`MOS`",
            exit_code=3,
        )
    name_at, mos_at = header.index("image name"), header.index("mos")
    for number, row in sheet:
        where = f"{printable(labels)}: row {number}"
        row += [None] * (len(header) - len(row))
        name = name_text(row[name_at], where=where)
        if name != "":
            yield name, parse_score(row[mos_at], where=where)


def _scenes(folder: Path) -> dict[str, str]:
    """The category with the largest weight of each image, if the workbook is there."""
    path = next((folder / name for name in _SCENES if is_regular(folder / name)), None)
    if path is None:
        return {}
    sheet = read_sheet(path)
    _, names = next(sheet, (0, []))
    header = [cell_text(name, where=str(path)) for name in names]
    found: dict[str, str] = {}
    for number, row in sheet:
        where = f"{printable(path)}: row {number}"
        weights = [
            0.0 if is_missing(cell) else parse_score(cell, where=where)
            for cell in row[1 : len(header)]
        ]
        name = name_text(row[0], where=where)
        if name != "" and len(weights) > 0:
            found[name] = header[1 + weights.index(max(weights))]
    return found
