"""Early stopping, and optimisers by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.training.checkpoint import list_checkpoints
from lmcl.training.setup import fit, plan, prepare
from lmcl.training.trainer import Trainer

Tiny = Callable[..., Config]


def test_a_run_ends_when_the_val_part_has_no_higher_srcc_for_long(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best epoch is the second one; two epochs later the run is over, and stays so."""
    figures = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr("lmcl.evaluation.sets.srcc", lambda *_: next(figures))
    config = tiny("train.epochs=5", "train.patience=2")
    for resume in ("", "auto"):
        run = prepare(config, tmp_path / "run", resume=resume, progress=False)
        run.train()
        run.close()
        assert (run.progress.position.epoch, run.progress.best_epoch) == (4, 1)
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [e["epoch"] for e in map(json.loads, log) if e["event"] == "epoch"] == [0, 1, 2, 3]


def _stepped(config: Config, folder: Path) -> tuple[Trainer, dict[str, torch.Tensor]]:
    run = prepare(config, folder, resume="", progress=False)
    before = {name: value.clone() for name, value in run.core.state_dict().items()}
    run.refresh_salient_boxes(0)
    run.student.train()
    run.step(next(iter(run.loader.epoch(0, saliency=run.progress.saliency))))
    run.close()
    return run, before


@pytest.mark.parametrize("name", ["sgd", "lamb", "lion"])
def test_an_optimiser_of_timm_learns_by_its_name(tiny: Tiny, tmp_path: Path, name: str) -> None:
    run, before = _stepped(tiny(f"train.optimizer={name}"), tmp_path / "run")
    assert type(run.optimizer.optimizer).__name__.lower() == name
    moved = run.core.panel.head.weight - before["panel.head.weight"]
    assert torch.isfinite(moved).all()
    assert moved.abs().max() > 0
    decays = {group["weight_decay"] for group in run.optimizer.param_groups}
    assert decays == {0.0, run.config.train.weight_decay}


@pytest.mark.parametrize(
    ("name", "said"), [("adamv", "nadam"), ("adahessian", "take a gradient"), ("x", "sgd")]
)
def test_an_unknown_optimiser_is_answered_by_near_ones(
    tiny: Tiny, tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(tiny(f"train.optimizer={name}"), tmp_path / "run")


@pytest.mark.parametrize("kind", ["l2", "huber"])
def test_the_logged_loss_is_that_of_the_regression_asked_for(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    config = tiny(f"objective.regression={kind}", "objective.contrastive_weight=0.0")
    run = prepare(config, tmp_path / "run", resume="", progress=False)
    run.student.train()
    batch = next(iter(run.loader.epoch(0)))
    terms = run.compute_loss(batch, run.grad_cache.forward(batch))
    out = run.step(batch)
    run.close()
    assert out.stats.regression == pytest.approx(float(terms.loss.detach()), rel=1e-5)
    assert out.stats.l1 == pytest.approx(float(terms.l1), rel=1e-5)
    assert out.stats.regression != pytest.approx(out.stats.l1, rel=1e-2)


def test_plcc_and_rank_losses_are_learned_by_and_logged(tiny: Tiny, tmp_path: Path) -> None:
    both = ("objective.plcc_weight=0.5", "objective.rank_weight=2.0", "objective.rank_loss=margin")
    config = tiny(*both, "train.epochs=1")
    fit(config, tmp_path / "run", progress=False)
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    for entry in steps:
        regression = entry["l1"] + 0.5 * entry["plcc_loss"] + 2 * entry["rank_loss"]
        assert entry["loss"] == pytest.approx(0.9 * regression + 0.1 * entry["contrastive"])
    assert all(entry["plcc_loss"] > 0 for entry in steps)
    assert "PLCC and rank loss" in (tmp_path / "run" / "report.html").read_text()


def test_losses_over_images_need_more_than_one(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="compare the images of a step"):
        tiny("objective.plcc_weight=1", "train.batch_size=1")


def test_a_balanced_run_says_its_rule_and_resumes_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("train.balance=4", "train.epochs=2")
    assert "balanced over 4 ranges of scores, in an epoch" in plan(config, tmp_path / "whole")
    fit(config, tmp_path / "whole", progress=False)
    middle = list_checkpoints(tmp_path / "whole" / "checkpoints")[-1]
    fit(config, tmp_path / "again", resume=str(middle), progress=False)
    one, two = (
        load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "again")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    plain = prepare(tiny(), tmp_path / "plain", resume="", progress=False)
    run = prepare(config, tmp_path / "other", resume="", progress=False)
    assert run.loader.steps == plain.loader.steps
    spreads = []
    for loader in (plain.loader, run.loader):
        mos = torch.cat([batch.mos[: batch.images] for batch in loader.epoch(0)])
        counts = torch.histc(mos, 4, min=float(mos.min()), max=float(mos.max()))
        spreads.append(float(counts.max() - counts.min()))
        loader.close()
    assert spreads[1] < spreads[0]
