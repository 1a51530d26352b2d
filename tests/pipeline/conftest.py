"""Small images of every kind, packed by the real shard writer."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.table import open_table
from shards.read import ShardSet, open_set

Pack = Callable[..., ShardSet]

_SIZES = [(120, 160), (160, 120), (97, 131), (50, 40), (64, 200), (301, 200)]
_FORMATS = ["JPEG", "PNG", "BMP", "WEBP"]


@pytest.fixture(scope="session")
def photograph() -> Callable[..., Image.Image]:
    """A smooth random picture with some noise, so that chroma and edges matter."""

    def make(height: int, width: int, *, seed: int = 0) -> Image.Image:
        rng = np.random.default_rng([seed, height, width])
        coarse = rng.integers(0, 256, (height // 12 + 2, width // 12 + 2, 3), dtype=np.uint8)
        smooth = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        noisy = smooth.astype(np.int64) + rng.integers(-9, 10, smooth.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def encode() -> Callable[..., bytes]:
    """An image as the bytes of a file."""

    def make(image: Image.Image, kind: str, **options: object) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    return make


@pytest.fixture(scope="session")
def mixed_images(
    photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> list[tuple[str, bytes]]:
    """37 images: JPEG, PNG, BMP, WebP; six sizes, some of them smaller than a crop of 64."""
    return [
        (
            f"image {index}.{_FORMATS[index % 4].lower()}",
            encode(photograph(*_SIZES[index % 6], seed=index), _FORMATS[index % 4]),
        )
        for index in range(37)
    ]


@pytest.fixture(scope="session")
def pack_into() -> Pack:
    """Pack (name, bytes) pairs into a folder and open the set."""

    def make(
        folder: Path, images: Sequence[tuple[str, bytes]], *, samples_per_shard: int = 10
    ) -> ShardSet:
        source = folder / "source"
        source.mkdir(parents=True)
        with (folder / "labels.csv").open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "score"])
            for index, (name, data) in enumerate(images):
                (source / name).write_bytes(data)
                writer.writerow([name, index])
        build(
            open_table(folder / "labels.csv", images=source, name="toy"),
            folder / "set",
            workers=1,
            size=ShardSize(samples=samples_per_shard),
        )
        return open_set(folder / "set")

    return make


@pytest.fixture
def pack(pack_into: Pack, tmp_path: Path) -> Pack:
    """Pack (name, bytes) pairs into a folder of this test."""
    return lambda images, **options: pack_into(tmp_path / "packed", images, **options)


@pytest.fixture(scope="session")
def mixed_set(
    pack_into: Pack,
    mixed_images: list[tuple[str, bytes]],
    tmp_path_factory: pytest.TempPathFactory,
) -> ShardSet:
    """The mixed images, packed once; tests must not change its files."""
    return pack_into(tmp_path_factory.mktemp("mixed"), mixed_images)
