"""FLIVE (LIVE-FB, PaQ-2-PiQ).

Quirks: names keep their folder; patches have two endings (`x.jpg_patch_1.jpg`); three images are in
no official list; the test part is exactly the images with a side above 640 pixels, so it is not a
random sample. Images are collected by the user from their sources.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from shards.datasets.files import FolderIndex, find_one, parse_score
from shards.datasets.rows import Row, read_rows
from shards.datasets.values import cell_text, name_text
from shards.errors import ShardError
from shards.sample import DataSet, Expected, Facts, Sample
from shards.score_scale import ScoreScale
from shards.source_files import is_regular

_TEST = ("labels640.csv", "labels>640.csv")
_PADDED = ("labels=640_padded.csv", "labels<=640_padded.csv")
_PATCH = re.compile(r"(.+?)(\.jpe?g)?_patch_(\d)\.jpe?g", re.IGNORECASE)

FACTS = Facts(
    title="FLIVE (LIVE-FB large-scale social picture quality, PaQ-2-PiQ)",
    page="https://github.com/niu-haoran/FLIVE_Database",
    licence="labels CC BY-NC-SA 4.0 (readme); the images keep the terms of their four sources",
    citation="Z. Ying et al.: From patches to pictures (PaQ-2-PiQ), CVPR 2020",
    source="labels_image.csv; parts from labels640.csv and labels=640_padded.csv",
    expected=Expected(
        samples=39810,
        low=0.0,
        high=94.3332,
        parts=(("train", 30253), ("val", 7727), ("test", 1827)),
    ),
)
SCORE = ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True)


def open_flive(root: Path, *, images: Path | None = None, patches: bool = False) -> DataSet:
    """Read the set from a folder with its label files and its images.

    Args:
        root: Folder with `labels_image.csv` at most three folders below it.
        images: Folder below which `voc_emotic_ava/`, `blur_dataset/`, `EE371R/` lie.
        patches: Read `labels_patch.csv` too; a patch is grouped with its image.

    Raises:
        ShardError: If a label file is missing, or a row of it cannot be understood.
    """
    what = "the folder with labels_image.csv"
    labels = find_one(root, ["labels_image.csv"], what=what)
    index = _by_two_components(FolderIndex(images or root))
    parts = _parts(labels.parent)
    patch_labels = find_one(root, ["labels_patch.csv"], what=what) if patches else None

    def samples() -> Iterator[Sample]:
        by_base: dict[str, str] = {}
        for number, row in enumerate(read_rows(labels), start=2):
            name, mos = _name_and_score(labels, number, row)
            by_base[name.rpartition("/")[2].rpartition(".")[0].lower()] = name
            yield _sample(name, name, mos, parts, index, folder=images or root)
        if patch_labels is None:
            return
        for number, row in enumerate(read_rows(patch_labels), start=2):
            name, mos = _name_and_score(patch_labels, number, row)
            cut = _PATCH.fullmatch(name.rpartition("/")[2])
            image = by_base.get(cut[1].lower()) if cut else None
            if image is None:
                raise ShardError(
                    f"{patch_labels}: row {number}: {name!r} is no patch of a labelled image",
                    exit_code=3,
                )
            yield _sample(name, image, mos, parts, index, folder=images or root)

    facts = FACTS
    if patches:
        facts = replace(FACTS, expected=Expected(samples=39810 + 119430))
    return DataSet(name="flive", score=SCORE, samples=samples, facts=facts)


def _sample(
    name: str,
    image: str,
    mos: float,
    parts: dict[str, str],
    index: dict[str, Path],
    *,
    folder: Path,
) -> Sample:
    return Sample(
        path=name,
        file=index.get(_two(name), folder / name),
        mos=mos,
        mos_std=None,
        group=image,
        subset="patch" if name != image else image.partition("/")[0],
        part=parts.get(image.lower(), ""),
    )


def _name_and_score(labels: Path, number: int, row: Row) -> tuple[str, float]:
    where = f"{labels}: row {number}"
    name = name_text(row.get("name"), where=where)
    if name == "":
        raise ShardError(f"{where}: no column `name`, or it is empty", exit_code=3)
    return name, parse_score(row.get("mos"), where=where)


def _parts(folder: Path) -> dict[str, str]:
    """Official part by lower-case name of the image; empty if the lists are not there."""
    parts: dict[str, str] = {}
    padded = next((folder / name for name in _PADDED if is_regular(folder / name)), None)
    if padded is not None:
        for row in read_rows(padded):
            is_val = cell_text(row.get("is_valid"), where=str(padded)).lower() in {"true", "1"}
            parts[_image_name(row, padded)] = "val" if is_val else "train"
    tests = next((folder / name for name in _TEST if is_regular(folder / name)), None)
    if tests is not None:
        for row in read_rows(tests):
            parts[_image_name(row, tests)] = "test"
    return parts


def _image_name(row: Row, labels: Path) -> str:
    return name_text(row.get("name_image"), where=str(labels)).lower()


def _by_two_components(index: FolderIndex) -> dict[str, Path]:
    """Files by their folder and name, wherever the folders are nested.

    Raises:
        ShardError: If two nested copies are there.
    """
    found: dict[str, Path] = {}
    for name in index.names():
        key = _two(name)
        if key in found:
            raise ShardError(
                f"{index.folder}: {name!r} and {found[key]} are two copies of one image; keep one",
                exit_code=3,
            )
        found[key] = index.folder / name
    return found


def _two(name: str) -> str:
    return "/".join(name.replace("\\", "/").split("/")[-2:]).lower()
