"""Early stopping, and optimisers by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.training.setup import plan, prepare
from lmcl.training.trainer import Trainer

Tiny = Callable[..., Config]


def test_a_run_ends_when_the_val_part_has_no_higher_srcc_for_long(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best epoch is the second one; two epochs later the run is over, and stays so."""
    figures = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    monkeypatch.setattr("lmcl.training.trainer.srcc", lambda *_: next(figures))
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
