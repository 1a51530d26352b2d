"""kill -9 of a report, of a model being saved and of a training: again it ends as undisturbed.

Scoring, with and without moves: tests/lmcl/inference/test_kill.py; building:
tests/shards/build/test_build.py.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcl.models.pretrained import load_model, save_model
from lmcl.report import write_report

BEFORE = Path(__file__).resolve().parents[1] / "data" / "before_move"


def start_report(root: Path) -> None:
    """A run with the report of other predictions."""
    run = root / "start" / "run"
    shutil.copytree(BEFORE / "finished", run)
    table = run / "predictions" / "test.csv"
    whole = table.read_text()
    table.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    write_report([run], run)
    table.write_text(whole)


def start_model(root: Path) -> None:
    """A model folder with something of the user's in it, and a newer model."""
    older = root / "start" / "model"
    shutil.copytree(BEFORE / "finished" / "model", older)
    (older / "mine.txt").write_text("mine")
    released = load_model(older)
    with torch.no_grad():
        for value in released.model.parameters():
            value.mul_(0.5)
    save_model(root / "newer", released.model, released.card)


def start_train(root: Path) -> None:
    """A run that was stopped in its second epoch."""
    start = root / "start"
    for name in ("half", "set"):
        shutil.copytree(BEFORE / name, start / name)
    shutil.copy(BEFORE / "half" / "config.toml", start / "run.toml")


STARTS = {"report": start_report, "model": start_model, "train": start_train}


@pytest.mark.parametrize(
    ("kind", "tries"),
    [
        ("report", 2),
        ("model", 3),
        *(
            pytest.param(kind, 20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])
            for kind in STARTS
        ),
    ],
)
def test_what_was_killed_anywhere_ends_as_an_undisturbed_one(
    tmp_path: Path, killed: Callable[..., dict[str, Any]], kind: str, tries: int
) -> None:
    STARTS[kind](tmp_path)
    assert killed(kind, tmp_path, tries)["failed"] == []
