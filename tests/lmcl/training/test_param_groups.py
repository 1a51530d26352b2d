"""Who learns at which rate: the optimiser's groups have the values that the configuration says."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.models.quality_model import QualityModel
from lmcl.training.param_groups import freeze_backbone, parameter_groups, without_unused
from lmcl.training.setup import prepare

Tiny = Callable[..., Config]
VIT = [
    *("encoder.name=deit3_small_patch16_224", "encoder.width=48", "encoder.depth=2"),
    *("encoder.heads=3", "decoder.heads=3", "saliency.window=1"),
]


def rates(config: Config) -> dict[str, tuple[float, float]]:
    """Share of the rate, and weight decay, of every parameter that learns."""
    model = QualityModel(config.encoder, config.decoder, crop_size=32, view_size=32)
    freeze_backbone(model, config.train)
    names = {id(value): name for name, value in model.named_parameters()}
    found = {}
    for group in parameter_groups(model, config.train):
        for parameter in group["params"]:
            found[names[id(parameter)]] = (group["lr_scale"], group["weight_decay"])
    return found


def test_layers_of_a_vit_decay_from_the_last_to_the_first(tiny: Tiny) -> None:
    found = rates(tiny(*VIT, "train.layer_decay=0.5", "train.backbone_lr_scale=0.1"))
    assert found["encoder.vit.norm.weight"] == (pytest.approx(0.1), 0)
    assert found["encoder.vit.blocks.1.attn.qkv.weight"] == (pytest.approx(0.05), 0.05)
    assert found["encoder.vit.blocks.0.mlp.fc1.weight"] == (pytest.approx(0.025), 0.05)
    assert found["encoder.vit.blocks.0.mlp.fc1.bias"] == (pytest.approx(0.025), 0)
    assert found["encoder.vit.patch_embed.proj.weight"] == (pytest.approx(0.0125), 0.05)
    assert found["encoder.vit.pos_embed"] == (pytest.approx(0.0125), 0)
    assert found["panel.members"] == (1, 0)
    assert found["panel.head.weight"] == (1, 0.05)


def test_a_stem_has_a_rate_of_its_own(tiny: Tiny) -> None:
    changes = ("encoder.name=hybrid", "encoder.stem=convnext_atto", "encoder.patch=32")
    found = rates(tiny(*changes, "train.stem_lr_scale=0.5", "train.backbone_lr_scale=0.2"))
    assert {rate for name, (rate, _) in found.items() if ".stem.layers." in name} == {0.1}
    assert {rate for name, (rate, _) in found.items() if ".stem.layers." not in name} == {1}


def test_without_these_fields_the_groups_are_those_of_earlier_checkpoints(tiny: Tiny) -> None:
    config = tiny(*VIT)
    model = QualityModel(config.encoder, config.decoder, crop_size=32, view_size=32)
    groups = parameter_groups(model, config.train)
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [(1, 0.05), (1, 0)]
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_a_backbone_without_a_rate_keeps_its_weights_in_a_run(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*VIT, "train.backbone_lr_scale=0", "encoder.drop_path=0.3")
    run = prepare(config, tmp_path, resume="", progress=False)
    before = {name: value.clone() for name, value in run.core.state_dict().items()}
    run.run_saliency_pass(0)
    run.step(next(iter(run.loader.epoch(0, saliency=run.progress.saliency))))
    run.close()
    moved = {n for n, value in run.core.state_dict().items() if not torch.equal(value, before[n])}
    assert moved
    assert not any(name.startswith("encoder.") for name in moved)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["train.layer_decay=0.7"], "vision transformers by name"),
        (
            [
                *("encoder.name=hybrid", "encoder.stem=resnet10t", "encoder.patch=32"),
                "train.backbone_lr_scale=0",
            ],
            r"set encoder\.frozen to all levels",
        ),
    ],
    ids=["layer-decay", "statistics"],
)
def test_what_an_encoder_cannot_do_is_refused(tiny: Tiny, changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        rates(tiny(*changes))


@pytest.mark.parametrize(
    "wrong", ["train.layer_decay=0", "train.layer_decay=1.1", "encoder.drop_path=1"]
)
def test_shares_outside_their_range_are_refused(tiny: Tiny, wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition("=")[0].replace(".", r"\.")):
        tiny(wrong)


@pytest.mark.parametrize(
    "encoder",
    [[*VIT, "encoder.depth=3"], ["encoder.depth=3"]],
    ids=["vit", "conv-vit"],
)
def test_drop_path_grows_to_the_last_block_and_is_off_in_evaluation(
    tiny: Tiny, encoder: list[str]
) -> None:
    config = tiny(*encoder, "encoder.drop_path=0.4")
    torch.manual_seed(0)
    model = QualityModel(config.encoder, config.decoder, crop_size=32, view_size=32)
    paths = [block.drop_path1 for block in model.encoder.layers()]
    assert isinstance(paths[0], nn.Identity)
    assert [path.drop_prob for path in paths[1:]] == pytest.approx([0.2, 0.4])
    crops = torch.randn(6, 3, 32, 32)
    model.eval()
    assert torch.equal(model(crops).score, model(crops).score)


def test_a_checkpoint_whose_optimiser_knew_an_unused_pooling_is_resumed(tiny: Tiny) -> None:
    changes = ("encoder.name=vit_pe_core_tiny_patch16_384", "encoder.width=48", "encoder.heads=3")
    config = tiny(*changes, "decoder.heads=3")
    model = QualityModel(config.encoder, config.decoder, crop_size=32, view_size=32)
    ours = torch.optim.AdamW(parameter_groups(model, config.train), lr=1e-3)
    for parameter in model.encoder.vit.attn_pool.parameters():
        parameter.requires_grad_(True)
    earlier = torch.optim.AdamW(parameter_groups(model, config.train), lr=1e-3)
    output = model(torch.randn(2, 3, 32, 32))
    (output.score.sum() + output.embedding[:, 0].sum()).backward()
    earlier.step()
    assert sum(len(group["params"]) for group in earlier.param_groups) > len(earlier.state)
    ours.load_state_dict(without_unused(earlier.state_dict(), ours))
    assert len(ours.state) == len(earlier.state)
    assert all(
        torch.equal(value["exp_avg"], earlier.state[parameter]["exp_avg"])
        for parameter, value in ours.state.items()
    )
