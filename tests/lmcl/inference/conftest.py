"""A released model of random weights, small enough for tests, and good and bad images."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lmcl.inference.scorer import Scorer, open_scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.pretrained import ModelCard, build_model, save_model
from lmcl.models.quality_model import DecoderConfig
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale


def card(**changes) -> ModelCard:
    values = {
        "encoder": EncoderConfig(name="conv-vit", width=48, depth=2, heads=3, patch=16),
        "decoder": DecoderConfig(queries=3, heads=3),
        "crops": CropConfig(size=64, random=3, evaluation=5),
        "saliency": SaliencyConfig(view=64, layers=2, window=2),
        "score": ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        "training_set": "demo",
        "split": "s-00",
        "split_hash": "ab" * 16,
        "decode": "torch-pillow",
    }
    return ModelCard(**(values | changes))


@pytest.fixture(scope="session")
def make_model():
    def make(folder: Path, **changes) -> Path:
        torch.manual_seed(0)
        released = card(**changes)
        model = build_model(released)
        with torch.no_grad():
            for value in model.panel.parameters():
                value.copy_(torch.randn_like(value) * 0.1)
        save_model(folder, model, released)
        return folder

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, make_model) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture(scope="session")
def scorer(model_folder) -> Scorer:
    return open_scorer(model_folder, device="cpu")


def picture(seed: int, height: int = 90, width: int = 120) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve good images in a tree: formats, sizes, odd names."""
    folder = tmp_path / "photos"
    (folder / "a b").mkdir(parents=True)
    for i in range(6):
        picture(i).save(folder / f"img.{i:02d}.jpg", quality=90)
        picture(10 + i, 70 + 13 * i, 150 - 9 * i).save(folder / "a b" / f"{i} (1).png")
    return folder


@pytest.fixture
def mixed(photos: Path) -> tuple[Path, set[str]]:
    """The photos among everything that goes wrong; the names that must fail."""
    good = picture(99)
    (photos / "zero.jpg").write_bytes(b"")
    whole = (photos / "img.00.jpg").read_bytes()
    (photos / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "notes.txt").write_text("not an image")
    (photos / "lies.png").write_bytes(b"\x89PNG\r\n\x1a\nnonsense")
    frames = [picture(i) for i in range(3)]
    frames[0].save(photos / "moving.gif", save_all=True, append_images=frames[1:])
    good.convert("CMYK").save(photos / "cmyk.jpg")
    good.convert("RGBA").save(photos / "alpha.png")
    deep = np.asarray(good.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(photos / "deep.png")
    good.convert("L").save(photos / "grey.jpg")
    good.save(photos / "still.gif")
    out = io.BytesIO()
    picture(5, 7, 3).save(out, "PNG")
    (photos / "tiny.png").write_bytes(out.getvalue())
    return photos, {"zero.jpg", "truncated.jpg", "lies.png", "moving.gif"}
