"""The starter is what a run learned, without the stem, in half precision."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from lmcl.config import load_config
from lmcl.models.pretrained import build_model, load_model, save_model

REPO = Path(__file__).resolve().parents[2]


def test_a_released_run_is_small_and_is_whole_again_when_opened(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("maker", REPO / "scripts" / "make_starter.py")
    assert spec is not None
    assert spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    config = load_config("starter")
    card = replace(load_model(REPO / "lmcl" / "starter").card, stem_weights="")
    assert (card.decoder, card.crops) == (config.decoder, config.crops)
    torch.manual_seed(3)
    model = build_model(card)
    save_model(tmp_path / "run", model, card)
    maker.release(tmp_path / "run", tmp_path / "starter")

    stored = load_file(tmp_path / "starter" / "model.safetensors")
    assert not any(name.startswith("encoder.stem.layers.") for name in stored)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    opened = load_model(tmp_path / "starter")
    assert opened.card.stem_weights == config.encoder.weights
    state = opened.model.state_dict()
    for name, value in stored.items():
        assert torch.equal(state[name], value.float()), name
    # Not the random ones of the run: those that the package brings.
    assert not torch.equal(
        state["encoder.stem.layers.conv_stem.weight"],
        model.state_dict()["encoder.stem.layers.conv_stem.weight"],
    )
