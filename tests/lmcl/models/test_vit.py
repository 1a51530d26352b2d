"""Every family of timm's vision transformers that is accepted can do all that a run asks of it."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from lmcl.errors import ConfigError
from lmcl.inference.export import NO_IMAGES, TOLERANCE, export
from lmcl.inference.scorer import Scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.pretrained import ModelCard, ReleasedModel, load_model, save_model
from lmcl.models.quality_model import DecoderConfig, QualityModel
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale

KINDS = {
    "vit_tiny_patch16_224": "CLS",
    "vit_base_patch16_siglip_224": "no CLS, attention pooling",
    "vit_medium_patch16_reg4_gap_256": "no CLS, registers, norm behind the pooling",
    "deit_tiny_distilled_patch16_224": "two CLS",
    "eva02_tiny_patch14_224": "CLS, norm behind the pooling, rotary positions",
    "vit_pe_core_tiny_patch16_384": "CLS and attention pooling",
    "vit_small_patch16_dinov3": "CLS, registers, rotary positions",
    "vit_tiny_r_s16_p8_224": "patches from convolutions",
}
"""One of each kind, for what takes seconds."""
FAMILIES = [
    *KINDS,
    *("vit_base_patch16_224_miil", "vit_base_patch8_224", "vit_base_patch32_plus_256"),
    *(
        "vit_base_patch16_gap_224",
        "vit_base_patch16_siglip_gap_224",
        "vit_so400m_patch14_siglip_224",
    ),
    *("vit_giantopt_patch16_siglip_256", "vit_base_patch16_clip_224", "vit_large_patch14_clip_224"),
    *("vit_base_patch16_clip_quickgelu_224", "vit_base_patch16_plus_clip_240"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2", "vit_giant_patch14_dinov2"),
    *("vit_base_patch16_rpn_224", "vit_medium_patch16_gap_240", "vit_small_patch16_36x1_224"),
    *(
        "vit_wee_patch16_reg1_gap_256",
        "vit_so150m_patch16_reg4_map_256",
        "vit_intern300m_patch14_448",
    ),
    *("vit_so150m_patch16_reg4_gap_256", "aimv2_large_patch14_224", "flexivit_small", "test_vit4"),
    *("vit_base_patch14_reg1_tipsv2", "vit_base_patch16_radio_v3", "beit3_base_patch16_224"),
    *("deit_tiny_patch16_224", "deit3_small_patch16_224", "eva_giant_patch14_224"),
    *("eva02_base_patch14_224", "eva02_base_patch16_clip_224", "eva02_enormous_patch14_clip_224"),
    *("vit_medium_patch16_rope_reg1_gap_256", "vit_pe_core_gigantic_patch14_448"),
    *("vit_pe_lang_large_patch14_448", "vit_pe_spatial_tiny_patch16_512"),
    *("vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_224"),
    *("vit_small_patch16_rope_ape_224", "vit_small_patch16_rope_mixed_ape_224"),
    *("vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"),
    *("vit_small_patch16_lingbot",),
]
SIDE = 32


def small(name: str, **changes: object) -> EncoderConfig:
    return EncoderConfig(name=name, **{"width": 48, "depth": 2, "heads": 3, "patch": 8, **changes})


def build(config: EncoderConfig) -> QualityModel:
    torch.manual_seed(0)
    return QualityModel(config, DecoderConfig(heads=3), crop_size=SIDE, view_size=SIDE)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_scores_looks_and_learns_with_every_parameter(name: str) -> None:
    model = build(small(name))
    crops = torch.randn(2, 3, SIDE, SIDE)
    output = model(crops)
    (output.score.sum() + output.embedding[:, 0].sum()).backward()
    learning = {n: value for n, value in model.named_parameters() if value.requires_grad}
    assert [n for n, value in learning.items() if value.grad is None] == []
    assert all(torch.isfinite(value.grad).all() for value in learning.values())
    maps = model.eval().encoder.cls_attention(crops, layers=2)
    assert maps.shape[0] == 2
    assert maps.shape[1] == maps.shape[2]
    assert (maps >= 0).all()
    assert (maps.flatten(1).sum(dim=1) < 1 + 1e-5).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_pass_the_last_norm_wherever_timm_puts_it(name: str) -> None:
    encoder = build(small(name)).eval().encoder
    last = [norm for norm in (encoder.vit.norm, getattr(encoder.vit, "fc_norm", None)) if norm]
    norms = [norm for norm in last if not isinstance(norm, nn.Identity)]
    assert len(norms) <= 1
    if not norms:
        return  # trained to end without one: RADIO, PE's lang and spatial, InternViT
    seen: list[torch.Tensor] = []
    norms[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out))
    tokens = encoder.tokens(torch.randn(2, 3, SIDE, SIDE))
    (out,) = seen
    assert torch.equal(tokens[:, 1:], out[:, encoder.prefix :])
    if encoder.has_cls:
        assert torch.equal(tokens[:, 0], out[:, 0])


def test_a_model_of_a_version_without_final_norm_keeps_its_scores(tmp_path: Path) -> None:
    old = small("eva02_tiny_patch14_224", final_norm=False)
    card, model = _card(old), build(old).eval()
    save_model(tmp_path / "model", model, card)
    path = tmp_path / "model" / "config.json"
    text = re.sub(r'\n *"final_norm": false,', "", path.read_text())
    assert "final_norm" not in text
    path.write_text(text)
    again = load_model(tmp_path / "model")
    crops = torch.randn(2, 3, SIDE, SIDE)
    assert torch.equal(again.model(crops).score, model(crops).score)
    assert not torch.equal(build(small(old.name)).eval()(crops).score, model(crops).score)
    learning = {n for n, value in build(old).named_parameters() if value.requires_grad}
    assert not any("fc_norm" in name for name in learning)


@pytest.mark.parametrize("name", ["vit_tiny_patch16", "eva02_small", "dinov9_small", "swin2"])
def test_names_that_a_message_recommends_are_accepted(name: str) -> None:
    with pytest.raises(ConfigError, match="try one of") as refused:
        make_encoder(EncoderConfig(name=name), sizes=(224, 224))
    names = re.search(r"try one of (.*), or squeezenet-vit", str(refused.value))
    for one in names[1].split(", "):
        make_encoder(EncoderConfig(name=one, width=48, depth=1, heads=3), sizes=(224, 224))


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(p) for p in ("onnx", "onnxscript", "onnxruntime")),
    reason="onnx, onnxscript and onnxruntime are not installed",
)
@pytest.mark.parametrize("name", KINDS)
def test_one_of_each_kind_is_exported_with_its_scores(name: str, tmp_path: Path) -> None:
    config = small(name)
    card = _card(config)
    save_model(tmp_path / "model", build(config), card)
    scorer = Scorer(ReleasedModel(model=build(config), card=card), device="cpu")
    file = tmp_path / "model.onnx"
    parity = export(scorer, tmp_path / "model", file, format="onnx", compared=NO_IMAGES)
    assert parity.max_crop_difference <= TOLERANCE


def _card(encoder: EncoderConfig) -> ModelCard:
    return ModelCard(
        encoder=encoder,
        decoder=DecoderConfig(heads=3),
        crops=CropConfig(size=SIDE, random=3, evaluation=4),
        saliency=SaliencyConfig(view=SIDE, layers=1, window=1),
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        training_set="demo",
        split="s",
        split_hash="ab" * 16,
        decode="torch-pillow",
    )
