"""Weights of others: unwrapped when that makes all fit, otherwise refused by name."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmcl.errors import ConfigError, LmclError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.weights import load_weights

SIZE = 32
VIT = EncoderConfig(name="vit_tiny_patch16_224", width=48, depth=2, heads=3, patch=8)
LEVELS = EncoderConfig(
    name="hybrid", stem="resnet10t", levels=("layer1",), width=48, depth=1, heads=3
)
Tensors = dict[str, Tensor]


def under(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda state: {prefix + name: value for name, value in state.items()}


def container(*names: str, **beside: Any) -> Callable[[Any], Any]:
    def wrap(state: Any) -> Any:
        for name in reversed(names):
            state = {name: state, **beside}
        return state

    return wrap


WRAPPINGS: dict[str, Callable[[Any], Any]] = {
    "bare": lambda state: state,
    "ddp": under("module."),
    "compiled": under("_orig_mod."),
    "compiled-ddp": under("module._orig_mod."),
    "backbone": under("backbone."),
    "model": under("model."),
    "open_clip": lambda state: {
        **under("visual.trunk.")(state),
        "text.token_embedding.weight": torch.zeros(3, 3),
        "logit_scale": torch.ones(()),
    },
    "dino": lambda state: {
        "teacher": {**under("backbone.")(state), "head.mlp.0.weight": torch.zeros(2, 2)},
        "student": under("module.backbone.")({n: torch.zeros_like(t) for n, t in state.items()}),
        "args": argparse.Namespace(lr=0.1),
        "epoch": 3,
    },
    "dinov2-train": lambda state: {"model": under("teacher.backbone.")(state)},
    "lightning": lambda state: {
        "state_dict": under("model.backbone.")(state),
        "pytorch-lightning_version": "2",
        "loss": np.float64(0.5),
    },
    "timm-train": container("state_dict", epoch=1, metric=0.5),
    "lightning-net": lambda state: {"state_dict": under("net.")(state)},
    "moco": lambda state: {"state_dict": under("module.encoder_q.")(state), "epoch": 1},
    "basicsr": container("params_ema"),
    "torch-tutorial": lambda state: {"model_state_dict": state, "optimizer_state_dict": {}},
    "one-network-twice": lambda state: {"net_a": state, "net_b": state},
    "classifier": lambda state: {**state, "head.weight": torch.zeros(10, 48)},
}


def donor(config: EncoderConfig) -> Tensors:
    torch.manual_seed(7)
    if config.name == "hybrid":
        return timm.create_model(config.stem, pretrained=False).state_dict()
    return make_encoder(config, sizes=(SIZE, SIZE)).vit.state_dict()


def filled(config: EncoderConfig, path: Path, size: int = SIZE) -> Tensors:
    encoder = make_encoder(
        EncoderConfig(**{**vars(config), "weights": str(path)}), sizes=(size, size)
    )
    load_weights(encoder, EncoderConfig(**{**vars(config), "weights": str(path)}))
    network = encoder.stem.layers if config.name == "hybrid" else encoder.vit
    return network.state_dict()


@pytest.mark.parametrize(
    ("config", "wrapping"),
    [*((VIT, name) for name in WRAPPINGS), (LEVELS, "ddp"), (LEVELS, "dino"), (LEVELS, "moco")],
    ids=lambda value: value if isinstance(value, str) else value.stem or value.name,
)
def test_what_trainers_wrap_around_weights_is_taken_off(
    tmp_path: Path, config: EncoderConfig, wrapping: str
) -> None:
    state = donor(config)
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "weights.pth")
    found = filled(config, tmp_path / "weights.pth")
    assert all(torch.equal(value, state[name]) for name, value in found.items())
    assert set(found) <= set(state)


@pytest.mark.parametrize("wrapping", ["ddp", "open_clip", "compiled-ddp"])
def test_safetensors_are_unwrapped_too(tmp_path: Path, wrapping: str) -> None:
    state = donor(VIT)
    wrapped = {name: one.clone() for name, one in WRAPPINGS[wrapping](state).items()}
    save_file(wrapped, tmp_path / "weights.safetensors")
    found = filled(VIT, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in found.items())


def test_what_does_not_fit_is_named_with_counts(tmp_path: Path) -> None:
    state = under("module.")(donor(VIT))
    for name in ("module.blocks.1.attn.qkv.weight", "module.blocks.1.attn.qkv.bias"):
        del state[name]
    state["module.strange.weight"] = torch.zeros(1)
    state["module.norm.weight"] = torch.zeros(24)
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError) as refused:
        filled(VIT, tmp_path / "weights.pth")
    said = str(refused.value)
    assert "of 30 tensors: 2 missing (blocks.1.attn.qkv.weight, ...)" in said
    assert "1 unexpected (strange.weight)" in said
    assert "1 of another shape (norm.weight [24] in place of [48])" in said
    assert refused.value.exit_code == 5


def test_several_networks_under_names_not_known_are_not_chosen_from(tmp_path: Path) -> None:
    state, other = donor(VIT), {name: one + 1 for name, one in donor(VIT).items()}
    torch.save({"net_a": state, "net_b": other}, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"2 networks that fit, under net_a, net_b; save the one"):
        filled(VIT, tmp_path / "weights.pth")


def test_a_deeper_model_of_the_same_kind_is_not_taken_for_the_stem(tmp_path: Path) -> None:
    deeper = {**donor(LEVELS), "layer1.7.conv1.weight": torch.zeros(1)}
    torch.save(deeper, tmp_path / "weights.pth")
    with pytest.raises(ConfigError, match=r"1 unexpected \(layer1\.7\.conv1\.weight\)"):
        filled(LEVELS, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "`git lfs pull`"),
        (b"", "is empty"),
        (b"PK\x03\x04 cut short", "it is damaged"),
        (b"no weights at all", "it is no file of torch.save"),
    ],
    ids=["html", "lfs", "empty", "cut", "text"],
)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_what_lies_in_place_of_weights_is_named(
    tmp_path: Path, content: bytes, said: str, suffix: str
) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(LmclError) as refused:
        filled(VIT, path)
    is_torchs = said == "it is no file of torch.save" and suffix == "safetensors"
    assert ("cannot be read as weights" if is_torchs else said) in str(refused.value)
    assert len(str(refused.value)) < 600
    assert refused.value.exit_code == 5


def test_a_folder_is_not_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(LmclError, match="is a folder; name the file in it"):
        filled(VIT, tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_numbers_that_are_not_finite_are_refused_at_load(
    tmp_path: Path, bad: float, suffix: str
) -> None:
    state = donor(VIT)
    state["blocks.0.mlp.fc1.weight"][3, 4] = bad
    path = tmp_path / f"weights.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    with pytest.raises(
        LmclError, match=r"in 1 of 30 tensors, blocks\.0\.mlp\.fc1\.weight"
    ) as error:
        filled(VIT, path)
    assert error.value.exit_code == 5


@pytest.mark.parametrize("is_new", [True, False], ids=["zip", "before-torch-1.6"])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.nn.Linear(2, 2), "a whole module"),
        ({"model": torch.nn.Linear(2, 2), "epoch": 3}, "holds an object, not its tensors alone"),
    ],
    ids=["bare", "in-a-checkpoint"],
)
def test_a_module_that_was_saved_whole_has_its_own_sentence(
    tmp_path: Path, content: Any, said: str, is_new: bool
) -> None:
    path = tmp_path / "module.pth"
    torch.save(content, path, _use_new_zipfile_serialization=is_new)
    with pytest.raises(LmclError, match=r"\(torch.nn.modules.linear.Linear\)") as no:
        filled(VIT, path)
    assert said in str(no.value) or not is_new
    assert no.value.exit_code == 5
    assert "torch.save(model.state_dict(), PATH)" in str(no.value)


def test_positions_are_resampled_for_another_crop_size(tmp_path: Path) -> None:
    state = donor(VIT)
    torch.save(under("backbone.")(state), tmp_path / "weights.pth")
    found = filled(VIT, tmp_path / "weights.pth", size=64)
    assert found["pos_embed"].shape == (1, 1 + 64, 48)
    assert torch.equal(found["pos_embed"][:, 0], state["pos_embed"][:, 0])
    assert torch.equal(found["norm.weight"], state["norm.weight"])
