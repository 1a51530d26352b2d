import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lmcl.encoders import EncoderConfig
from lmcl.errors import LmclError
from lmcl.export import TOLERANCE, command, export
from lmcl.model import DecoderConfig
from lmcl.release import ModelCard, ScoreScale, build_model, save_model
from lmcl.saliency import SaliencyConfig
from lmcl.scoring.scorer import Scorer, open_scorer
from pipeline.boxes import CropConfig

needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
ENCODERS = {
    "conv-vit": EncoderConfig(name="conv-vit", width=48, depth=1, heads=3, patch=16),
    "timm": EncoderConfig(name="deit3_small_patch16_224", width=48, depth=1, heads=3),
}


@pytest.fixture(scope="module", params=ENCODERS)
def folder(request, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    side = 32
    card = ModelCard(
        encoder=ENCODERS[request.param],
        decoder=DecoderConfig(queries=3, heads=3),
        crops=CropConfig(size=side, random=3, evaluation=4),
        saliency=SaliencyConfig(view=side, layers=1, window=1),
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        training_set="demo",
        split="s",
        split_hash="ab" * 16,
        decode="torch-pillow",
    )
    run = tmp_path_factory.mktemp("run")
    save_model(run / "model", build_model(card), card)
    return run


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(4):
        picture = rng.integers(0, 256, (40 + 9 * i, 60, 3), dtype=np.uint8)
        Image.fromarray(picture).save(place / f"{i}.png")
    return place


@pytest.mark.parametrize("name", ["pt2", pytest.param("onnx", marks=needs_onnx)])
def test_an_exported_model_scores_as_the_model_does_at_every_batch(folder, images, name) -> None:
    found = CliRunner().invoke(
        command, [str(folder), "--format", name, "--images", str(images)], catch_exceptions=False
    )
    assert found.exit_code == 0, found.output
    report = json.loads((folder / "export" / f"model.{name}.parity.json").read_text())
    assert report["images"] == 4
    assert report["crops"] == 1 + 2 + 7 + 4 * 4
    assert report["max_score_difference"] <= TOLERANCE
    assert (folder / "export" / f"model.{name}").stat().st_size > 10_000
    assert not list((folder / "export").glob(".*"))


def test_the_plain_format_is_a_copy_that_scores_the_same(folder, images, tmp_path) -> None:
    scorer = open_scorer(folder, device="cpu")
    export(scorer, folder / "model", tmp_path / "out", format="safetensors", images=[])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    files = sorted(images.iterdir())
    assert open_scorer(tmp_path / "out", device="cpu").score(files) == scorer.score(files)


def test_a_file_that_differs_is_not_kept(folder, tmp_path, monkeypatch) -> None:
    scorer = open_scorer(folder, device="cpu")
    other = Scorer(_shifted(scorer), device="cpu")
    export(scorer, folder, tmp_path / "good.pt2", format="pt2", images=[])
    from lmcl import export as module

    _, open_pt2 = module._FORMATS["pt2"]
    wrong = (lambda _scorer, file: file.write_bytes((tmp_path / "good.pt2").read_bytes()), open_pt2)
    monkeypatch.setitem(module._FORMATS, "pt2", wrong)
    with pytest.raises(LmclError, match="differs from PyTorch") as caught:
        export(other, folder, tmp_path / "bad.pt2", format="pt2", images=[])
    assert caught.value.exit_code == 3
    assert {p.name for p in tmp_path.iterdir()} == {"good.pt2", "good.pt2.parity.json"}


def _shifted(scorer: Scorer):
    import copy

    from lmcl.release import ReleasedModel

    model = copy.deepcopy(scorer.model)
    with torch.no_grad():
        model.panel.head.weight.mul_(1.5).add_(0.1)
    return ReleasedModel(model=model, card=scorer.card)
