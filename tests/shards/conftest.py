"""Small pictures and sets for the tests of this package."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.build.build import build
from shards.datasets.table import open_table
from shards.read import ShardSet, open_set
from shards.sample import DataSet

Picture = Callable[..., bytes]
Table = Callable[..., DataSet]


def _picture(seed: int = 0, *, codec: str = "png", height: int = 12, width: int = 16) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, {"jpg": "JPEG"}.get(codec, codec.upper()))
    return out.getvalue()


@pytest.fixture(scope="session")
def picture() -> Picture:
    """A random picture as encoded bytes."""
    return _picture


@pytest.fixture
def table(tmp_path: Path) -> Table:
    """A folder of pictures with a CSV; endings, sizes, groups and parts vary."""

    def make(count: int = 12, *, name: str = "mine", groups: int = 4) -> DataSet:
        folder = tmp_path / name
        folder.mkdir()
        lines = ["path,score,std,group,distortion,level,split"]
        for k in range(count):
            codec = ("png", "jpg", "bmp")[k % 3]
            file = folder / f"Photo {k}.v1.{codec}"
            file.write_bytes(_picture(k, codec=codec, height=10 + k % 5, width=14))
            part = ("train", "train", "val", "test")[k % groups % 4]
            lines.append(
                f"{file.name},{k * 0.5},{0.1 + k},ref{k % groups},{'ab'[k % 2]},{k % 5},{part}"
            )
        labels = tmp_path / f"{name}.csv"
        labels.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return open_table(labels, images=folder, name=name)

    return make


@pytest.fixture
def packed(tmp_path: Path, table: Table) -> ShardSet:
    """Twelve images in three shards."""
    from shards.build.plan import ShardSize

    build(table(), tmp_path / "packed", workers=1, size=ShardSize(samples=5))
    return open_set(tmp_path / "packed")
