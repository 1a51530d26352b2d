"""pyiqa's `meta_info_*.csv`: one row per image, columns by position, splits as columns.

Quirks: without a reference the columns are image, score; with one they are reference, image, score.
The LIVE Challenge file keeps the seven training rows. Ranges are not in the file; for the sets
pyiqa knows they are taken from there, otherwise they are the smallest and largest score found.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shards.datasets.files import IMAGE_ENDINGS, FolderIndex, csv_rows, need_file, parse_score
from shards.datasets.table import parse_part
from shards.datasets.values import is_missing, one_name_each
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample
from shards.score_scale import ScoreScale
from shards.text import printable

_OFFICIAL = "official_split"
# Part of the file name -> scale (formats.md section 10; CSIQ and LIVE are differences).
_SCALES = (
    ("liveiqa", ScoreScale(kind="dmos", low=-2.640015, high=111.774694, higher_is_better=False)),
    ("csiq", ScoreScale(kind="dmos", low=0.0, high=1.0, higher_is_better=False)),
    ("tid2013", ScoreScale(kind="mos", low=0.0, high=9.0, higher_is_better=True)),
    ("kadid10k", ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)),
    ("livechallenge", ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)),
    ("koniq10k", ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)),
    ("spaq", ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)),
    ("flive", ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)),
)


@dataclass(frozen=True, kw_only=True)
class MetaRow:
    """One row of a meta file."""

    path: str
    """Image, relative to the images folder."""
    reference: str
    """Reference image, or empty."""
    score: str
    """Score as text."""
    columns: dict[str, str]
    """Every cell by the name of its column."""


def read_meta(path: Path) -> list[MetaRow]:
    """Rows of a meta file by its positional contract.

    Raises:
        ShardError: If it is missing, empty or too narrow.
    """
    need_file(path, what="give a meta_info_*.csv")
    cells = list(csv_rows(path))
    header = [name.strip() for name in cells[0]] if cells else []
    one_name_each(header, where=str(path))
    _refuse_missing_header(header, path)
    with_reference = bool(header) and "ref" in header[0].lower()
    needed = 3 if with_reference else 2
    if len(header) < needed:
        raise ShardError(f"{path}: needs {needed} columns, has {len(header)}", exit_code=3)
    rows = []
    for number, row in enumerate(cells[1:], start=2):
        if all(cell.strip() == "" for cell in row):
            continue
        if len(row) < needed:
            raise ShardError(f"{path}: row {number} has {len(row)} cells", exit_code=3)
        named = dict(zip(header, row, strict=False))
        image, score = (row[1], row[2]) if with_reference else (row[0], row[1])
        reference = row[0].strip() if with_reference else ""
        rows.append(MetaRow(path=image.strip(), reference=reference, score=score, columns=named))
    if not rows:
        raise ShardError(f"{path}: has no rows", exit_code=3)
    return rows


def _refuse_missing_header(header: list[str], path: Path) -> None:
    """Without it the first image would be taken for one, and every row number be off by one."""
    for name in header[:3]:
        if Path(name.lower()).suffix in IMAGE_ENDINGS:
            raise ShardError(
                f"{printable(path)}: the first line holds the image {printable(name, 80)!r}, not "
                "the columns' names; put a header line such as `img_name,mos` in front",
                exit_code=3,
            )


def open_pyiqa(meta: Path, *, images: Path | None = None, name: str | None = None) -> DataSet:
    """Read a set as pyiqa describes it.

    Args:
        meta: The `meta_info_*.csv`.
        images: Folder its paths are relative to; default: the file's own.
        name: Short name of the set; default: from the file's name.

    Raises:
        ShardError: If the file is missing, or a row of it is not usable.
    """
    rows = read_meta(meta)
    index = FolderIndex(images or meta.parent)
    short = _short_name(meta)
    skip = 7 if short == "livechallenge" and _is_training(rows[0].path) else 0

    def samples() -> Iterator[Sample]:
        for number, row in enumerate(rows[skip:], start=2 + skip):
            where = f"{meta}: row {number}"
            if row.path.startswith("/") or ".." in row.path.split("/") or "\0" in row.path:
                raise ShardError(
                    f"{where}: {printable(row.path)!r} leaves the images folder", exit_code=3
                )
            spread = row.columns.get("std")
            yield Sample(
                path=row.path,
                file=index.path(row.path),
                mos=parse_score(row.score, where=where),
                mos_std=None if is_missing(spread) else parse_score(spread, where=where),
                group=row.reference if row.reference != "" else _image_of_patch(row.path),
                part=parse_part(row.columns.get(_OFFICIAL, ""), where=where),
            )

    return DataSet(
        name=name or short,
        score=_scale(meta, rows),
        samples=samples,
        facts=Facts(title=f"pyiqa {meta.stem}", source=meta.name),
    )


def _short_name(meta: Path) -> str:
    stem = meta.stem.lower().removeprefix("meta_info_").removesuffix("dataset")
    return "".join(letter if letter.isalnum() else "-" for letter in stem) or "pyiqa"


def _is_training(path: str) -> bool:
    return "trainingimages" in path.lower() or path.rpartition("/")[2].startswith("t")


def _image_of_patch(path: str) -> str:
    """A FLIVE patch stays with its image."""
    base = path.rpartition("/")[2]
    image, found, _ = base.rpartition("_patch_")
    return image.lower() if found else base.lower()


def _scale(meta: Path, rows: list[MetaRow]) -> ScoreScale:
    for part, score in _SCALES:
        if part in meta.stem.lower():
            return score
    values = [parse_score(row.score, where=str(meta)) for row in rows]
    low, high = min(values), max(values)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return ScoreScale(kind="mos", low=low, high=high, higher_is_better=True)
