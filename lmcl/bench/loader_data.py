"""Images for the loader's benchmark, made on the spot: sizes and kinds of the field's data sets."""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build.build import build
from shards.datasets.table import open_table
from shards.read import ShardSet, open_set

_OCTAVES = ((128, 50.0), (48, 30.0), (16, 17.0), (6, 9.0), (2, 4.0))


@dataclass(frozen=True, kw_only=True)
class ImageKind:
    """One kind of image that data sets of the field consist of."""

    name: str
    height: int
    width: int
    format: str
    suffix: str


KINDS = {
    kind.name: kind
    for kind in (
        ImageKind(name="jpg", height=768, width=1024, format="JPEG", suffix="jpg"),
        ImageKind(name="png", height=384, width=512, format="PNG", suffix="png"),
        ImageKind(name="bmp", height=384, width=512, format="BMP", suffix="bmp"),
    )
}


def make_set(folder: Path, kind: ImageKind, count: int) -> ShardSet:
    """`count` textured images of a kind, packed; made once per folder.

    JPEGs are of quality 90 with halved chroma, like KonIQ-10k's; PNG and BMP are of TID2013's size.
    """
    source = folder / f"{kind.name}-{count}"
    if not (source / "set" / "manifest.json").is_file():
        (source / "images").mkdir(parents=True, exist_ok=True)
        names = [f"{index:05d}.{kind.suffix}" for index in range(count)]
        for index, name in enumerate(names):
            options = {"quality": 90} if kind.format == "JPEG" else {}
            make_image(kind, index).save(source / "images" / name, kind.format, **options)
        with (source / "labels.csv").open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "score"])
            writer.writerows([name, index % 5] for index, name in enumerate(names))
        table = open_table(source / "labels.csv", images=source / "images", name="bench")
        build(table, source / "set", workers=1)
    return open_set(source / "set")


def make_image(kind: ImageKind, index: int) -> Image.Image:
    """A 1/f texture with fine grain, the same for the same index."""
    rng = np.random.default_rng([index, kind.height])
    shape = (kind.height, kind.width)
    pixels = np.full((*shape, 3), 128, dtype=np.float32)
    for scale, amplitude in _OCTAVES:
        coarse = (kind.height // scale + 2, kind.width // scale + 2)
        grey = rng.normal(0, amplitude, coarse).astype(np.float32)
        tint = rng.normal(0, amplitude / 3, (3, *coarse)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(grey + tint[channel])
            pixels[..., channel] += np.asarray(layer.resize(shape[::-1], Image.Resampling.BICUBIC))
    pixels += rng.normal(0, 2, (*shape, 1)).astype(np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
