"""Photograph-like files for the step's benchmark: packed for this project, loose for the other."""

import csv
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmcl.bench.loader_data import KINDS, ImageKind, make_image
from shards.build.build import build
from shards.datasets.table import open_table
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import write_split

_DISTINCT = 12
_JUDGED = 2


@dataclass(frozen=True, kw_only=True)
class StepData:
    """The same training images twice: as a packed set and as files."""

    root: Path
    """The packed set."""
    split: str
    """Name of its split; `train` holds the files below."""
    files: tuple[Path, ...]
    labels: tuple[float, ...]
    """In [0, 1], one a file."""


def make_step_data(folder: Path, codec: str, count: int) -> StepData:
    """`count` training images of a kind (jpg: 1024 x 768, png and bmp: 512 x 384) in `folder`.

    A dozen pictures are made and copied: what is decoded is what matters, not what is seen.
    """
    images, root = folder / "images", folder / "set"
    images.mkdir(parents=True, exist_ok=True)
    rows = list(_write_images(images, KINDS[codec], count))
    with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "score", "split"])
        writer.writerows(rows)
    build(open_table(folder / "labels.csv", images=images, name="bench"), root, workers=1)
    (split,) = make_splits(open_set(root), protocol="official", val_fraction=0.0)
    write_split(root, split)
    trained = [row for row in rows if row[2] == "train"]
    return StepData(
        root=root,
        split=split.name,
        files=tuple(images / name for name, _, _ in trained),
        labels=tuple(score / 4 for _, score, _ in trained),
    )


def _write_images(folder: Path, kind: ImageKind, count: int) -> Iterator[tuple[str, int, str]]:
    """File name, score from 0 to 4 and part of every image."""
    options = {"quality": 90} if kind.format == "JPEG" else {}
    for index in range(count + _JUDGED):
        name = f"{index:05d}.{kind.suffix}"
        judged = index >= count
        if judged or index < _DISTINCT:
            make_image(kind, index).save(folder / name, kind.format, **options)
        else:
            shutil.copyfile(folder / f"{index % _DISTINCT:05d}.{kind.suffix}", folder / name)
        yield name, index % 5, "test" if judged else "train"
