"""Any timm model as the stem of a hybrid encoder."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from lmcl.errors import ConfigError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.timm_stem import TimmLevels
from lmcl.models.weights import load_weights

KINDS = {
    "resnet10t": {},
    "tf_efficientnet_lite0": {},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"levels": ("layers.0", "layers.1")},
    "vit_tiny_patch16_224": {"levels": ("blocks.1",)},
    "regnetx_002": {},
    "squeezenet1_1": {},
}
"""Stems whose maps are lists, hooks, channels last, of one scale, and not timm's at all."""


def config(stem: str, **changes: Any) -> EncoderConfig:
    values = {"width": 48, "depth": 1, "heads": 3, **KINDS.get(stem, {}), **changes}
    return EncoderConfig(name="hybrid", stem=stem, **values)


def build(encoder: EncoderConfig, size: int = 64) -> QualityModel:
    torch.manual_seed(0)
    return QualityModel(encoder, DecoderConfig(heads=6), crop_size=size, view_size=size)


@pytest.mark.parametrize("stem", KINDS)
def test_every_kind_of_stem_scores_looks_and_learns(stem: str) -> None:
    model = build(config(stem)).train()
    crops = torch.randn(2, 3, 64, 64)
    output = model(crops)
    (output.score.sum() + output.embedding[:, 0].sum()).backward()
    assert output.score.shape == (2,)
    assert [name for name, value in model.named_parameters() if value.grad is None] == []
    maps = copy.deepcopy(model).eval().encoder.cls_attention(crops, layers=1)
    assert maps.shape[1] == maps.shape[2]
    assert torch.isfinite(maps).all()


def test_a_cell_holds_mean_and_deviation_of_the_finer_levels_under_it() -> None:
    torch.manual_seed(0)
    stem = TimmLevels("resnet10t", levels=(), frozen=0, patch=None, sizes=(96,)).eval()
    pixels = torch.randn(1, 3, 96, 96)
    seen = stem.cells(pixels)[0, 1 * 3 + 2].double()
    at = 0
    for level, maps in zip(stem.levels, stem.layers(pixels), strict=True):
        side = 32 // level.reduction
        under = maps[0, :, side : 2 * side, 2 * side :].double().flatten(1)
        mean = seen[at : at + level.channels]
        torch.testing.assert_close(mean, under.mean(dim=1), atol=1e-5, rtol=1e-4)
        at += level.channels
        if side > 1:
            truth = under.var(dim=1, correction=0).clamp_min(1e-4).sqrt()
            deviation = seen[at : at + level.channels]
            torch.testing.assert_close(deviation, truth, atol=1e-4, rtol=1e-3)
            at += level.channels
    assert at == stem.channels == len(seen)


@pytest.mark.parametrize("frozen", [0, 2, 5])
def test_frozen_levels_keep_weights_and_statistics(frozen: int) -> None:
    model = build(config("tf_efficientnet_lite0", levels=(), frozen=frozen)).train()
    stem = model.encoder.stem
    before = copy.deepcopy(stem.layers.state_dict())
    model(torch.randn(2, 3, 64, 64)).score.sum().backward()
    assert (stem.layers.conv_stem.weight.grad is None) == (frozen > 0)
    assert (stem.layers.blocks[-1][0].conv_pw.weight.grad is None) == (frozen == 5)
    after = stem.layers.state_dict()
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"]) == (frozen > 0)
    last = "blocks.6.0.bn1.running_mean"
    assert torch.equal(before[last], after[last]) == (frozen == 5)
    assert stem.is_frozen == (frozen == 5)


def test_a_multiple_of_the_coarsest_cell_and_a_view_of_another_size() -> None:
    stem = TimmLevels("resnet10t", levels=("layer1",), frozen=0, patch=8, sizes=(64, 96))
    assert stem.cells(torch.randn(1, 3, 64, 64)).shape[1] == 64
    assert stem.cells(torch.randn(1, 3, 96, 96)).shape[1] == 144


def test_weights_of_the_whole_model_come_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    donor = timm.create_model("resnet10t", pretrained=False)
    save_file(
        {name: value.contiguous() for name, value in donor.state_dict().items()},
        tmp_path / "whole.safetensors",
    )
    asked = config("resnet10t", weights=str(tmp_path / "whole.safetensors"))
    encoder = make_encoder(asked, sizes=(64, 64))
    assert load_weights(encoder, asked) == "file"
    found = encoder.stem.layers.state_dict()
    assert torch.equal(found["layer3.0.conv1.weight"], donor.layer3[0].conv1.weight)


def test_a_file_that_leaves_some_weights_random_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    half = {name: value for name, value in state.items() if "layer3" not in name}
    save_file(half, tmp_path / "half.safetensors")
    asked = config("resnet10t", weights=str(tmp_path / "half.safetensors"))
    with pytest.raises(
        ConfigError, match=r"86 tensors: 18 missing \(layer3\.0\.conv1\.weight, \.\.\.\)"
    ) as error:
        load_weights(make_encoder(asked, sizes=(64, 64)), asked)
    assert error.value.exit_code == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stem": "resnet_of_nobody"}, "no such model; try one of"),
        ({"stem": "resnet10t", "levels": ("layer9",)}, "no level 'layer9'; they are.*layer4"),
        ({"stem": "resnet10t", "levels": ("layer2", "layer1")}, "another order"),
        ({"stem": "resnet10t", "patch": 16}, "multiple of 32"),
        ({"stem": "resnet10t", "patch": 64}, "multiples of 64"),
        ({"stem": "resnet10t", "frozen": 9}, "5 levels of resnet10t are read"),
        ({"stem": "deit_tiny_distilled_patch16_224", "patch": 7}, "multiple of 16"),
    ],
)
def test_a_stem_that_cannot_serve_is_refused_with_the_way_out(
    changes: dict[str, Any], words: str
) -> None:
    stem = changes.pop("stem")
    with pytest.raises(ConfigError, match=words):
        make_encoder(config(stem, **changes), sizes=(96, 96))


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "hybrid"},
        {"name": "conv-vit", "stem": "resnet18"},
        {"name": "conv-vit", "levels": ("layer1",)},
    ],
)
def test_stem_and_levels_belong_to_hybrid(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="hybrid"):
        EncoderConfig(**changes)


def test_squeezenet_is_the_same_model_under_both_names() -> None:
    values = {"width": 48, "depth": 1, "heads": 3, "frozen": 13}
    old = build(EncoderConfig(name="squeezenet-vit", **values))
    new = build(EncoderConfig(name="hybrid", stem="squeezenet1_1", **values))
    new.load_state_dict(old.state_dict())
    crops = torch.randn(1, 3, 64, 64)
    assert torch.equal(old.eval()(crops).score, new.eval()(crops).score)
