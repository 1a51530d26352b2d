"""Seeing a batch in parts or with less memory changes nothing that is learned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from lmcl.cli.main import cli
from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.models.pretrained import load_model
from lmcl.models.quality_model import QualityModel
from lmcl.training.grad_cache import split_images
from lmcl.training.setup import prepare
from lmcl.training.trainer import Trainer

Tiny = Callable[..., Config]
VIT = ("encoder.name=vit_tiny_patch16_224", "encoder.depth=2")


def gradients(run: Trainer, *, double: bool = False) -> dict[str, torch.Tensor]:
    """Of the run's first batch, by the steps that `engine.step` takes before the optimiser."""
    if run.config.crops.salient:
        run.run_saliency_pass(0)
    if double:
        for model in (run.core, run.teacher.model):
            model.double()
            model.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(),))
    run.student.train()
    with run.loader:
        batch = next(iter(run.loader.epoch(0, saliency=run.progress.saliency)))
    seen = run.grad_cache.forward(batch)
    terms = run.compute_loss(batch, seen)
    run.grad_cache.backward(batch, seen, terms.loss)
    return {name: value.grad for name, value in run.core.named_parameters()}


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    """Largest difference of a gradient's elements, relative to its largest one."""
    return max(
        float((left[name] - right[name]).abs().max() / left[name].abs().max().clamp(min=1e-30))
        for name in left
    )


@pytest.mark.parametrize("images", [1, 5, 11])
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param([], id="paper"),
        pytest.param(["train.flip=true", "objective.overlap_aware=true"], id="flip-overlap"),
        pytest.param(["objective.keys=teacher"], id="teacher-keys"),
        pytest.param(["objective.contrastive_weight=0.0", "crops.salient=false"], id="plain"),
        pytest.param(["decoder.bins=5", "objective.rank_weight=1.0"], id="distribution-rank"),
    ],
)
def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    tiny: Tiny, tmp_path: Path, changes: list[str], images: int
) -> None:
    whole = prepare(tiny(*VIT, *changes), tmp_path / "whole", resume="", progress=False)
    parts = prepare(
        tiny(*VIT, *changes, f"runtime.micro_batch={images}"),
        tmp_path / "parts",
        resume="",
        progress=False,
    )
    assert distance(gradients(whole), gradients(parts)) < 1e-5


DIRECT = (
    "encoder.name=squeezenet-vit",
    "encoder.patch=32",
    "encoder.frozen=13",
    "crops.size=64",
    "saliency.view=64",
    "decoder.direct=8",
)


def test_two_readouts_learn_in_parts_as_in_the_whole(tiny: Tiny, tmp_path: Path) -> None:
    found = []
    for micro_batch in (0, 5):
        changes = (*DIRECT, f"runtime.micro_batch={micro_batch}")
        run = prepare(tiny(*changes), tmp_path / str(micro_batch), resume="", progress=False)
        found.append({name: g for name, g in gradients(run).items() if g is not None})
    assert found[0].keys() == found[1].keys()
    assert {"direct.0.weight", "panel.head.weight"} <= found[0].keys()
    assert distance(*found) < 1e-5


def test_train_gives_a_model_of_two_readouts(tiny: Tiny, tmp_path: Path) -> None:
    changes = tiny.overrides("saliency.layers=1", "train.epochs=1", *DIRECT)  # type: ignore[attr-defined]
    settings = [part for change in changes for part in ("--set", change)]
    words = ["train", "--config", "smoke", "--no-progress", "--output", str(tmp_path / "run")]
    done = CliRunner().invoke(cli, [*words, *settings], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    released = load_model(tmp_path / "run" / "model")
    assert released.card.decoder.direct == 8
    weight = released.model.state_dict()["direct.2.weight"]
    torch.manual_seed(0)
    fresh = QualityModel(
        released.card.encoder, released.card.decoder, crop_size=64, view_size=64
    ).state_dict()["direct.2.weight"]
    assert not torch.equal(weight, fresh)
    output = released.model(torch.rand(2, 3, 64, 64))
    torch.testing.assert_close(output.score, output.readouts.mean(dim=1))


def test_parts_in_float64_agree_to_rounding(tiny: Tiny, tmp_path: Path) -> None:
    changes = ("objective.backend=dense", "train.flip=true")
    whole = prepare(tiny(*VIT, *changes), tmp_path / "whole", resume="", progress=False)
    parts = prepare(
        tiny(*VIT, *changes, "runtime.micro_batch=5"),
        tmp_path / "parts",
        resume="",
        progress=False,
    )
    assert distance(gradients(whole, double=True), gradients(parts, double=True)) < 1e-12


def test_layers_that_draw_random_numbers_draw_the_same_ones_again(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(*VIT, "runtime.micro_batch=5")
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    drawn = []

    class Noise(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            drawn.append(torch.rand(3))
            return tokens

    run.core.encoder.vit.norm_pre = Noise()
    gradients(run)
    first, again = drawn[-6:-3], drawn[-3:]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])


def test_batch_norms_and_parts_do_not_go_together_and_it_is_said(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.stem.*BatchNorm2d.*micro_batch = 0") as error:
        prepare(tiny("runtime.micro_batch=4"), tmp_path / "run", resume="", progress=False)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("encoder", ["vit_tiny_patch16_224", "conv-vit", "squeezenet-vit"])
def test_gradient_checkpointing_computes_the_blocks_again_and_gets_the_same_gradient(
    tiny: Tiny, tmp_path: Path, encoder: str
) -> None:
    patch = 16 if encoder == "squeezenet-vit" else 8
    changes = (f"encoder.name={encoder}", f"encoder.patch={patch}", "saliency.window=1")
    plain = prepare(tiny(*changes), tmp_path / "plain", resume="", progress=False)
    saving = prepare(
        tiny(*changes, "runtime.gradient_checkpointing=true"),
        tmp_path / "saving",
        resume="",
        progress=False,
    )
    calls = {"plain": 0, "saving": 0}
    for which, run in (("plain", plain), ("saving", saving)):
        run.core.encoder.layers()[0].norm1.register_forward_hook(
            lambda *_inputs, which=which: calls.update({which: calls[which] + 1})
        )
    assert distance(gradients(plain), gradients(saving)) == 0
    assert calls == {"plain": 1, "saving": 2}


@pytest.mark.parametrize(
    ("images", "most", "expected"),
    [(12, 0, [12]), (12, 5, [5, 5, 2]), (4, 9, [4]), (3, 1, [1, 1, 1])],
)
def test_parts_cover_the_batch_in_order(images: int, most: int, expected: list[int]) -> None:
    parts = split_images(images, most)
    assert [part.stop - part.start for part in parts] == expected
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(images))


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_head_embedding_and_loss_are_float32_under_autocast(
    tiny: Tiny, tmp_path: Path, precision: str
) -> None:
    config = tiny(*VIT, f"runtime.precision={precision}")
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    seen: dict[str, torch.dtype] = {}
    run.core.panel.head.register_forward_hook(
        lambda _module, inputs, out: seen.update(head_in=inputs[0].dtype, head_out=out.dtype)
    )
    run.core.encoder.layers()[0].mlp.fc1.register_forward_hook(
        lambda _module, _inputs, out: seen.update(block=out.dtype)
    )
    with run.loader:
        batch = next(iter(run.loader.epoch(0)))
    batch = replace(batch, crops=batch.crops[:, [0, 1, 2, 0]], boxes=batch.boxes[:, [0, 1, 2, 0]])
    output = run.grad_cache.forward(batch)
    terms = run.compute_loss(batch, output)
    assert seen["block"] == (torch.bfloat16 if precision == "bf16" else torch.float32)
    assert seen["head_in"] == seen["head_out"] == torch.float32
    assert output.output.embedding.dtype == output.output.score.dtype == torch.float32
    assert terms.loss.dtype == terms.contrastive.dtype == terms.l1.dtype == torch.float32
