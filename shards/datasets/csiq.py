"""CSIQ: 30 references, six distortions.

Quirks: file names are full of dots (`1600.AWGN.1.png`), one reference is a number and arrives as a
number cell, folder names and the token inside the file name differ in case, and images are found
in the official folders, in repacked ones, or all in one. Images without a label are left alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.datasets.excel import read_sheet
from shards.datasets.files import FolderIndex, by_base_name, find_one, parse_score, read_label_text
from shards.datasets.values import cell_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.text import printable

TOKENS = {
    "noise": "AWGN",
    "awgn": "AWGN",
    "blur": "BLUR",
    "contrast": "contrast",
    "fnoise": "fnoise",
    "jpeg": "JPEG",
    "jpeg 2000": "jpeg2000",
    "jpeg2000": "jpeg2000",
}
_HEADER = ("image", "dst_type", "dst_lev", "dmos_std", "dmos")

FACTS = Facts(
    title="CSIQ: categorical subjective image quality database",
    page="https://s2.smu.edu/~eclarson/csiq.html",
    licence="for research; obtain it from the authors",
    citation="E. C. Larson, D. M. Chandler: Most apparent distortion, Journal of Electronic "
    "Imaging 19(1), 2010",
    source="csiq.DMOS.xlsx, sheet all_by_image (or csiq_label.txt, the same rounded)",
    expected=Expected(samples=866, groups=30, low=0.0, high=1.0),
)
SCORE = ScoreScale(kind="dmos", low=0.0, high=1.0, higher_is_better=False)


def open_csiq(root: Path, *, images: Path | None = None) -> DataSet:
    """Read the set from its folder, official, repacked or flattened.

    Raises:
        ShardError: If there is no label file, or a row of it cannot be understood.
    """
    labels = find_one(
        root, ["csiq.DMOS.xlsx", "csiq_label.txt"], what="the folder with csiq.DMOS.xlsx"
    )
    index = FolderIndex(images or root, endings={".png"})
    bases = by_base_name(index)
    rows = list(_workbook(labels) if labels.suffix == ".xlsx" else _text(labels))

    def samples() -> Iterator[Sample]:
        for name, dmos, spread in rows:
            reference, token, level = name.removesuffix(".png").rsplit(".", 2)
            yield Sample(
                path=name,
                file=index.folder / bases.get(name.lower(), name),
                mos=dmos,
                mos_std=spread,
                group=reference,
                distortion=token.lower(),
                level=int(level),
            )

    return DataSet(name="csiq", score=SCORE, samples=samples, facts=FACTS)


def _workbook(path: Path) -> Iterator[tuple[str, float, float | None]]:
    columns: dict[str, int] = {}
    for number, row in read_sheet(path, "all_by_image"):
        cells = [cell_text(cell, where=str(path)).lower() for cell in row]
        if not columns:
            if {"image", "dst_type", "dst_lev", "dmos"} <= set(cells):
                columns = {name: cells.index(name) for name in _HEADER if name in cells}
            continue
        if len(row) > columns["image"] and cells[columns["image"]] != "":
            row += [None] * (max(columns.values()) + 1 - len(row))
            yield _named(path, number, row, columns)
    if not columns:
        raise ShardError(
            f"{path}: sheet all_by_image has no header row with image, dst_type, dst_lev and dmos",
            exit_code=3,
        )


def _named(
    path: Path, number: int, row: list[Any], columns: dict[str, int]
) -> tuple[str, float, float | None]:
    where = f"{path}: row {number}"
    kind = cell_text(row[columns["dst_type"]], where=where).lower()
    if kind not in TOKENS:
        raise ShardError(f"{where}: unknown distortion {printable(kind, 60)!r}", exit_code=3)
    # A number cell: the reference called 1600 may arrive as 1600 or 1600.0.
    reference = cell_text(row[columns["image"]], where=where)
    level = cell_text(row[columns["dst_lev"]], where=where)
    if not (level.isascii() and level.isdigit()):
        raise ShardError(f"{where}: level {printable(level, 60)!r} is no number", exit_code=3)
    dmos = parse_score(row[columns["dmos"]], where=where)
    spread = None
    if "dmos_std" in columns:
        spread = parse_score(row[columns["dmos_std"]], where=where)
    return f"{reference}.{TOKENS[kind]}.{level}.png", dmos, spread


def _text(path: Path) -> Iterator[tuple[str, float, float | None]]:
    for number, line in enumerate(read_label_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        name, _, score = line.strip().rpartition(" ")
        where = f"{path}: line {number}"
        if name.count(".") < 3 or not name.endswith(".png") or not name.split(".")[-2].isdecimal():
            raise ShardError(
                f"{where}: {name!r} is not <reference>.<distortion>.<level>.png", exit_code=3
            )
        yield name, parse_score(score, where=where), None
