"""Figures in TensorBoard; a tracker that is missing or breaks costs the run nothing."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from lmcl.config import Config
from lmcl.training.setup import fit
from lmcl.utils.trackers import Trackers, _start

tensorboard = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_tensorboard_has_the_figures_of_every_step(
    tiny: Callable[..., Config], tmp_path: Path
) -> None:
    fit(tiny("runtime.trackers=['tensorboard']"), tmp_path / "run", progress=False)
    found = tensorboard.EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"train/loss", "train/intra_similarity", "train/lr", "val/srcc"} <= tags
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, 9))
    assert [event.step for event in found.Scalars("val/srcc")] == [4, 8]


def test_curves_do_not_double_when_steps_are_taken_again(tmp_path: Path) -> None:
    """A run killed after its third step goes on from its second one."""
    for done, last in ((0, 3), (2, 5)):
        trackers = Trackers(["tensorboard"], tmp_path / "run", settings={}, done=done)
        for step in range(done + 1, last + 1):
            trackers.log({"train/loss": float(10 * last + step)}, step=step)
        trackers.close()
    found = tensorboard.EventAccumulator(str(tmp_path / "run" / "trackers" / "run"))
    found.Reload()
    events = [(event.step, event.value) for event in found.Scalars("train/loss")]
    assert events == [(1, 31.0), (2, 32.0), (3, 53.0), (4, 54.0), (5, 55.0)]


def test_a_tracker_that_is_not_installed_is_said_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(["clearml"], tmp_path / "run", settings={})
    trackers.log({"train/loss": 1.0}, step=1)
    trackers.close()
    assert "'clearml' is not installed" in caplog.text
    assert "log.jsonl has it all" in caplog.text


def test_a_tracker_that_breaks_down_is_said_once_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers(["tensorboard"], tmp_path / "run", settings={})
    tracker = trackers._open[0]
    tracker.finish()
    tracker.writer = None
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            trackers.log({"train/loss": 1.0}, step=step)
    assert caplog.text.count("stopped working") == 1


def test_a_tracker_that_cannot_be_opened_is_said_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "trackers").write_text("a file stands where its folder should be")
    with caplog.at_level(logging.WARNING):
        assert _start("tensorboard", tmp_path / "run", {}) is None
    assert "'tensorboard' could not be opened" in caplog.text
