"""The model folder: readable by those who may read, replaced as a whole."""

import os
import stat
from pathlib import Path

import pytest
import torch

from lmcl.models.encoder import EncoderConfig
from lmcl.models.pretrained import ModelCard, build_model, load_model, save_model
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale

CARD = ModelCard(
    encoder=EncoderConfig(name="conv-vit", width=48, depth=2, heads=3, patch=16),
    decoder=DecoderConfig(queries=3, heads=3),
    crops=CropConfig(size=64, random=3, evaluation=5),
    saliency=SaliencyConfig(view=64, layers=2, window=2),
    score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
    training_set="demo",
    split="s-00",
    split_hash="ab" * 16,
    decode="torch-pillow",
)


def _model(seed: int) -> QualityModel:
    torch.manual_seed(seed)
    return build_model(CARD)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_every_file_of_a_model_has_the_mode_the_umask_allows(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        save_model(tmp_path / "model", _model(0), CARD)
    finally:
        os.umask(old)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(("README.md", "config.json", "model.safetensors"), 0o666 & ~umask)


def test_a_model_saved_over_another_replaces_it_and_leaves_what_others_put_there(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "model"
    save_model(folder, _model(0), CARD)
    (folder / "notes.txt").write_text("mine")
    newer = _model(1)
    save_model(folder, newer, CARD)
    saved = load_model(folder).model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in newer.state_dict().items())
    assert (folder / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]
