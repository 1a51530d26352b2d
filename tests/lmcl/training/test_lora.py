"""LoRA: the ViT's weights stay, matrices beside its layers learn, and the model folder is plain."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lmcl
from lmcl.config import Config
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.predictions import read_csv
from lmcl.training.checkpoint import list_checkpoints
from lmcl.training.setup import fit, plan, prepare
from shards.read import open_set

pytest.importorskip("peft")

VIT = [
    *("encoder.name=vit_tiny_patch16_224", "encoder.patch=8", "encoder.width=48"),
    *("encoder.heads=3", "decoder.heads=3", "train.lora_rank=2", "train.epochs=2"),
]
Tiny = Callable[..., Config]


def test_a_run_learns_by_lora_resumes_bit_for_bit_and_leaves_a_plain_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(*VIT)
    assert "LoRA beside 2 layers" in plan(config, tmp_path / "whole")
    first = prepare(config, tmp_path / "first", resume="", progress=False)
    before = {name: value.clone() for name, value in first.core.state_dict().items()}
    first.close()
    fit(config, tmp_path / "whole", progress=False)
    middle = list_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    fit(config, tmp_path / "again", resume=str(middle), progress=False)
    one, two = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    moved = {
        name.replace(".base_layer", "")
        for name, value in before.items()
        if "lora" not in name and not torch.equal(one[name.replace(".base_layer", "")], value)
    }
    of_encoder = {name for name in moved if name.startswith("encoder.")}
    attention = {"qkv", "proj"}
    assert of_encoder == {f"encoder.vit.blocks.0.attn.{name}.weight" for name in attention}
    assert "panel.head.weight" in moved
    # Nothing of peft is needed to score, and the scores are those of the run.
    monkeypatch.setitem(sys.modules, "peft", None)
    table = read_csv(tmp_path / "whole" / "predictions" / "test.csv")
    packed = open_set(config.data.root)
    scorer = lmcl.load(tmp_path / "whole")
    images = [packed.read_bytes(id) for id in table.id.tolist()[:4]]
    np.testing.assert_allclose(scorer.score(images), table.prediction[:4], atol=1e-4)


def test_a_model_begins_as_it_was_and_the_seed_decides_the_rest(tiny: Tiny, tmp_path: Path) -> None:
    outputs, matrices = [], []
    for number, changes in enumerate([["train.lora_rank=0"], [], [], ["train.seed=5"]]):
        run = prepare(tiny(*VIT, *changes), tmp_path / str(number), resume="", progress=False)
        with torch.no_grad():
            outputs.append(run.core.eval()(torch.ones(1, 3, 32, 32)).score)
        matrices.append({n: v for n, v in run.core.state_dict().items() if "lora_A" in n})
        run.close()
    assert torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(matrices[1][name], matrices[2][name]) for name in matrices[1])
    assert not any(torch.equal(matrices[1][name], matrices[3][name]) for name in matrices[1])


def test_feed_forward_layers_learn_too_where_all_are_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    assert "LoRA beside 4 layers" in plan(tiny(*VIT, "train.lora_layers=all"), tmp_path / "run")


def test_every_matrix_of_another_family_learns(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(*VIT, "encoder.name=vit_small_patch16_dinov3")
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    run.refresh_salient_boxes(0)
    run.student.train()
    run.step(next(iter(run.loader.epoch(0, saliency=run.progress.saliency))))
    of_b = {n: v for n, v in run.core.state_dict().items() if "lora_B" in n}
    run.close()
    assert of_b
    assert all(value.abs().max() > 0 for value in of_b.values())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["encoder.name=eva02_tiny_patch14_224"], "does not call its layer .*attn.qkv"),
        (["encoder.name=conv-vit"], "for vision transformers by name"),
        (["train.backbone_lr_scale=0"], "is how it learns"),
        (["train.lora_rank=49"], r"attn\.qkv has 48\); set it to at most 48"),
    ],
    ids=["weights-taken-by-hand", "no-vit", "frozen", "rank-above-the-layers"],
)
def test_what_lora_cannot_do_is_one_sentence(
    tiny: Tiny, tmp_path: Path, changes: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tiny(*VIT, *changes), tmp_path / "run")


def test_without_peft_the_way_out_is_named(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(LmclError, match=r"pip install 'lmcl\[lora\]'") as refused:
        plan(tiny(*VIT), tmp_path / "run")
    assert refused.value.exit_code == 4
