from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from lmcl.errors import ConfigError, LmclError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.quality_model import DecoderConfig, QualityModel, select_attention_impl
from lmcl.models.weights import load_weights

TINY = EncoderConfig(name="vit_tiny_patch16_224", width=48, depth=3, heads=3, patch=8)
CONV = EncoderConfig(name="conv-vit", width=48, depth=2, heads=3, patch=8)
SQUEEZE = EncoderConfig(name="squeezenet-vit", width=48, depth=2, heads=3)
REGISTERS = EncoderConfig(name="vit_small_patch14_reg4_dinov2", width=48, depth=2, heads=3, patch=8)
SIGLIP = EncoderConfig(name="vit_base_patch16_siglip_224", width=48, depth=2, heads=3, patch=8)
POOLED = EncoderConfig(name="vit_base_patch16_gap_224", width=48, depth=2, heads=3, patch=8)
ALL = pytest.mark.parametrize(
    "config", [TINY, CONV, SQUEEZE, REGISTERS, SIGLIP, POOLED], ids=lambda config: config.name
)
EVA02 = EncoderConfig(name="eva02_tiny_patch14_224", width=48, depth=2, heads=3, patch=8)
DINOV3 = EncoderConfig(name="vit_small_patch16_dinov3_qkvb", width=48, depth=2, heads=3, patch=8)
ROPE = EncoderConfig(name="vit_small_patch16_rope_224", width=48, depth=2, heads=3, patch=8)
ROTARY_TOO = pytest.mark.parametrize(
    "config",
    [TINY, CONV, REGISTERS, EVA02, DINOV3, ROPE, SIGLIP, POOLED],
    ids=lambda config: config.name,
)


def build(config: EncoderConfig, size: int = 64) -> QualityModel:
    torch.manual_seed(0)
    return QualityModel(config, DecoderConfig(heads=6), crop_size=size, view_size=size).eval()


@ALL
def test_embeddings_are_unit_length_and_every_crop_has_a_score(config: EncoderConfig) -> None:
    output = build(config)(torch.randn(3, 3, 64, 64))
    assert output.embedding.shape == (3, 48)
    assert output.score.shape == (3,)
    torch.testing.assert_close(output.embedding.norm(dim=1), torch.ones(3))


def test_a_perceptron_judges_beside_the_panel() -> None:
    torch.manual_seed(0)
    model = QualityModel(
        SQUEEZE, DecoderConfig(heads=6, direct=5), crop_size=64, view_size=64
    ).eval()
    pixels = torch.randn(3, 3, 64, 64)
    output = model(pixels)
    assert output.readouts.shape == (3, 2)
    torch.testing.assert_close(output.score, output.readouts.mean(dim=1))
    tokens, summary = model.encoder.tokens_and_summary(pixels)
    assert summary.shape == (3, model.encoder.summary)
    torch.testing.assert_close(output.readouts[:, 0], 0.5 + model.panel(tokens)[:, 0])
    assert output.readouts[:, 1].std() > 0


@pytest.mark.parametrize("direct", [0, 5])
def test_a_damage_head_takes_the_same_off_every_readout_and_never_adds(direct: int) -> None:
    torch.manual_seed(0)
    whole = DecoderConfig(heads=6, direct=direct, damage=4)
    model = QualityModel(SQUEEZE, whole, crop_size=64, view_size=64).eval()
    plain = QualityModel(SQUEEZE, replace(whole, damage=0), crop_size=64, view_size=64).eval()
    rest = {k: v for k, v in model.state_dict().items() if not k.startswith("damage.")}
    plain.load_state_dict(rest)
    pixels = torch.randn(8, 3, 64, 64)
    last = model.damage[2]
    torch.nn.init.normal_(last.weight, std=10.0)
    with torch.no_grad():
        summary = model.encoder.tokens_and_summary(pixels)[1]
        before = model.damage[1](model.damage[0](summary)) @ last.weight[0]
        torch.nn.init.constant_(last.bias, 1 - float(before.max()))
        found, without = model(pixels), plain(pixels)
        said = torch.log1p(torch.exp((before + last.bias).double())) - 0.12
    expected = said.clamp_min(0).float()
    assert (expected > 0).any()
    assert (expected == 0).any()
    torch.testing.assert_close(without.score - found.score, expected, atol=1e-5, rtol=1e-4)
    if direct:
        lost = without.readouts - found.readouts
        torch.testing.assert_close(lost, expected[:, None].expand(8, 2), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.embedding, without.embedding)


def test_a_new_damage_head_learns_from_the_first_step() -> None:
    torch.manual_seed(0)
    decoder = DecoderConfig(heads=6, damage=4)
    model = QualityModel(SQUEEZE, decoder, crop_size=64, view_size=64)
    model(torch.randn(2, 3, 64, 64)).score.sum().backward()
    assert all(bool(one.grad.abs().sum() > 0) for one in model.damage.parameters())


def test_a_head_that_says_a_distribution_has_no_damage_beside_it() -> None:
    with pytest.raises(ValueError, match=r"decoder\.bins = 10 .* decoder\.damage = 4"):
        DecoderConfig(bins=10, damage=4)


@pytest.mark.parametrize("name", ["direct", "damage"])
@pytest.mark.parametrize("config", [TINY, CONV], ids=lambda config: config.name)
def test_without_a_pretrained_stem_there_is_nothing_to_judge_directly(
    config: EncoderConfig, name: str
) -> None:
    decoder = DecoderConfig(heads=6, **{name: 5})
    with pytest.raises(ConfigError, match=rf"decoder\.{name} = 5 .* encoder\.name = 'hybrid'"):
        QualityModel(config, decoder, crop_size=64, view_size=64)


@ALL
def test_attention_is_a_share_of_cls_over_the_patches(config: EncoderConfig) -> None:
    maps = build(config).encoder.cls_attention(torch.randn(2, 3, 64, 64), layers=2)
    assert maps.shape[1] == maps.shape[2]
    assert (maps >= 0).all()
    assert (maps.flatten(1).sum(dim=1) < 1 + 1e-5).all()


@pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "spelled-out"])
@ROTARY_TOO
def test_attention_is_what_the_layers_use(config: EncoderConfig, is_fused: bool) -> None:
    """CLS rows are those that reach the dropout of each layer when it is spelled out."""
    encoder = build(config).encoder
    with torch.no_grad():
        for weight in encoder.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)  # biases, which begin at zero, count too
    used: list[torch.Tensor] = []
    for attention in encoder.attentions():
        attention.attn_drop.register_forward_hook(lambda _m, inputs, _out: used.append(inputs[0]))
        attention.fused_attn = False
    images = torch.randn(2, 3, 64, 64)
    encoder.tokens(images)
    asking = slice(0, 1) if encoder.has_cls else slice(None)
    rows = torch.stack(used[-2:])[:, :, :, asking].mean(dim=(0, 2, 3))
    expected = rows[:, encoder.prefix :]
    for attention in encoder.attentions():
        attention.fused_attn = is_fused
    maps = encoder.cls_attention(images, layers=2)
    torch.testing.assert_close(maps.flatten(1), expected)
    assert {attention.fused_attn for attention in encoder.attentions()} == {is_fused}


@ALL
def test_attention_spelled_out_gives_what_the_fused_one_gives(config: EncoderConfig) -> None:
    model, crops = build(config), torch.randn(2, 3, 64, 64)
    fused = model(crops)
    select_attention_impl(model, torch.device("cpu"), torch.bfloat16)
    assert not any(attention.fused_attn for attention in model.encoder.attentions())
    spelled = model(crops)
    torch.testing.assert_close(spelled.score, fused.score, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spelled.embedding, fused.embedding, atol=1e-5, rtol=1e-4)


@ALL
def test_a_score_does_not_depend_on_the_batch(config: EncoderConfig) -> None:
    model, crops = build(config), torch.randn(5, 3, 64, 64)
    together = model(crops).score
    alone = torch.cat([model(crop[None]).score for crop in crops])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@ALL
def test_every_weight_gets_a_gradient(config: EncoderConfig) -> None:
    model = build(config).train()
    output = model(torch.randn(2, 3, 64, 64))
    (output.score.sum() + output.embedding[:, 0].sum()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_frozen_modules_keep_their_weights() -> None:
    config = EncoderConfig(name="squeezenet-vit", width=48, depth=1, heads=3, frozen=5)
    model = build(config).train()
    model(torch.randn(2, 3, 64, 64)).score.sum().backward()
    stem = model.encoder.stem.layers
    assert stem[0].weight.grad is None
    assert stem[6].squeeze.weight.grad is not None


def test_the_view_may_have_another_size_than_the_crops() -> None:
    model = QualityModel(TINY, DecoderConfig(heads=6), crop_size=32, view_size=64)
    assert model(torch.randn(1, 3, 32, 32)).score.shape == (1,)
    assert model.encoder.cls_attention(torch.randn(1, 3, 64, 64), layers=1).shape == (1, 8, 8)


def test_squeezenet_weights_come_from_a_file_and_are_used(
    shared_data: Path,
) -> None:
    path = shared_data / "weights" / "squeezenet1_1_features.npz"
    config = EncoderConfig(name="squeezenet-vit", weights=str(path))
    encoder = make_encoder(config, sizes=(64, 64))
    assert load_weights(encoder, config) == "file"
    with np.load(path) as arrays:
        expected = torch.from_numpy(arrays["3.squeeze.weight"])
    torch.testing.assert_close(encoder.stem.layers[3].squeeze.weight.detach(), expected)


def test_local_vit_weights_load_without_their_classifier(tmp_path: Path) -> None:
    donor = make_encoder(TINY, sizes=(64, 64))
    state = {name: value.contiguous() for name, value in donor.vit.state_dict().items()}
    state["head.weight"] = torch.zeros(10, 48)
    save_file(state, tmp_path / "vit.safetensors")
    config = EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "vit.safetensors")})
    encoder = make_encoder(config, sizes=(64, 64))
    assert load_weights(encoder, config) == "file"
    torch.testing.assert_close(encoder.vit.cls_token, donor.vit.cls_token)


def test_no_constructor_touches_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_more: object) -> None:
        raise AssertionError("a constructor went to the network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torchvision._internally_replaced_utils, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refuse)
    for config in (TINY, SQUEEZE):
        make_encoder(config, sizes=(64, 64))


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        pytest.param({"name": "vit_gigantic_none"}, "vit_", id="unknown"),
        pytest.param(
            {"name": "resnet18"}, "'hybrid' and encoder.stem = 'resnet18'", id="no-transformer"
        ),
        pytest.param({"name": "convnext_atto"}, "'hybrid'", id="convolutions"),
        pytest.param({"name": "beit_base_patch16_224"}, "none of timm's plain", id="beit"),
        pytest.param({"name": "cait_s24_224"}, "none of timm's plain", id="cait"),
        pytest.param(
            {"name": "vit_dpwee_patch16_reg1_gap_256"}, "CLS attention", id="two-attentions"
        ),
        pytest.param(
            {"name": "vit_tiny_patch16_224", "width": 50}, "multiple of the heads", id="odd-heads"
        ),
        pytest.param(
            {"name": "eva02_tiny_patch14_224", "width": 50, "patch": 8},
            "multiple of encoder.heads",
            id="odd-heads-eva",
        ),
        pytest.param({"name": "conv-vit", "patch": 12}, "patch", id="odd-patch"),
        pytest.param({"name": "squeezenet-vit", "frozen": 99}, "frozen", id="frozen-too-many"),
        pytest.param({"name": "conv-vit", "frozen": 1}, "frozen", id="frozen-elsewhere"),
    ],
)
def test_an_encoder_that_cannot_serve_is_refused(changes: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_encoder(EncoderConfig(**changes), sizes=(64, 64))


def test_decoder_heads_that_do_not_divide_a_timm_models_own_width_are_refused() -> None:
    encoder = EncoderConfig(name="vit_tiny_patch16_224", depth=1)
    with pytest.raises(ConfigError, match=r"decoder\.heads is 5.*divisor of 192"):
        QualityModel(encoder, DecoderConfig(heads=5), crop_size=32, view_size=32)


def test_more_saliency_layers_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"saliency\.layers is 9"):
        build(TINY).encoder.cls_attention(torch.randn(1, 3, 64, 64), layers=9)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    config = EncoderConfig(name="squeezenet-vit", weights=str(tmp_path / "none.npz"))
    with pytest.raises(LmclError, match="no such file") as error:
        load_weights(make_encoder(config, sizes=(64, 64)), config)
    assert error.value.exit_code == 4
    save_file({"strange": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    foreign = EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "foreign.safetensors")})
    with pytest.raises(ConfigError, match="does not fit") as error:
        load_weights(make_encoder(foreign, sizes=(64, 64)), foreign)
    assert error.value.exit_code == 5


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("junk.safetensors", b"junk" * 40),
        ("junk.pth", b"junk" * 40),
        ("half.pth", b"PK\x03\x04" + b"junk" * 40),
        ("empty.pth", b""),
        ("junk.npz", b"junk" * 40),
        ("half.npz", b"PK\x03\x04" + b"junk" * 40),
        ("empty.npz", b""),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_damaged_weights_are_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    base = SQUEEZE if path.suffix == ".npz" else TINY
    config = EncoderConfig(**{**vars(base), "weights": str(path)})
    said = "cannot be read as weights" if content else "is empty; copy it again"
    with pytest.raises(LmclError, match=said) as error:
        load_weights(make_encoder(config, sizes=(64, 64)), config)
    assert error.value.exit_code == 5


def test_a_file_of_something_else_than_named_tensors_is_one_sentence(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    config = EncoderConfig(**{**vars(TINY), "weights": str(tmp_path / "list.pth")})
    with pytest.raises(LmclError, match="cannot be read as weights") as error:
        load_weights(make_encoder(config, sizes=(64, 64)), config)
    assert error.value.exit_code == 5
