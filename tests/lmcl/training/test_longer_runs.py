"""Making a finished run longer: exactly, or not at all."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.training.setup import fit, plan, prepare

Tiny = Callable[..., Config]
WSD = ("schedule.shape=wsd", "schedule.decay_epochs=2", "runtime.keep_last=1")


def _log(run: Path) -> list[tuple[object, ...]]:
    names = ("event", "epoch", "step", "loss", "lr", "val_srcc")
    lines = (run / "log.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(name) for name in names) for line in lines]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.mark.parametrize("changes", [WSD, ("schedule.decay_epochs=1",)], ids=["wsd", "step"])
def test_a_run_made_longer_is_the_run_that_was_so_long_from_the_start(
    tiny: Tiny, tmp_path: Path, changes: tuple[str, ...]
) -> None:
    fit(tiny("train.epochs=3", *changes), tmp_path / "grown", progress=False)
    longer = tiny("train.epochs=4", *changes)
    fit(longer, tmp_path / "grown", resume="auto", progress=False)
    fit(longer, tmp_path / "straight", progress=False)
    assert _log(tmp_path / "grown") == _log(tmp_path / "straight")
    grown, straight = _weights(tmp_path / "grown"), _weights(tmp_path / "straight")
    assert all(torch.equal(grown[name], straight[name]) for name in straight)


def test_a_run_whose_rates_would_have_been_others_is_not_made_longer(
    tiny: Tiny, tmp_path: Path
) -> None:
    changes = ("schedule.shape=cosine", "evaluation.select=last")
    fit(tiny("train.epochs=1", *changes), tmp_path / "run", progress=False)
    for way in (plan, fit):
        with pytest.raises(ConfigError, match=r"train\.start_from.*'wsd'") as error:
            way(tiny("train.epochs=2", *changes), tmp_path / "run", resume="auto")
        assert error.value.exit_code == 5


def test_a_run_is_not_made_shorter_than_it_is(tiny: Tiny, tmp_path: Path) -> None:
    run = prepare(
        tiny("train.epochs=2", "evaluation.select=last"),
        tmp_path / "two",
        resume="",
        progress=False,
    )
    run.train()
    run.close()
    with pytest.raises(ConfigError, match="has 2 epochs behind it"):
        plan(tiny("train.epochs=1", "evaluation.select=last"), tmp_path / "two", resume="auto")
