import json
import logging
from pathlib import Path

import pytest

from lmcl.training.logger import CollapseWatch, EpochEntry, MetricsLogger, StepEntry
from lmcl.training.run_dir import RunDir
from lmcl.utils.trackers import Trackers


def entry(step: int, similarity: float) -> StepEntry:
    return StepEntry(
        epoch=0,
        step=step,
        images=4,
        loss=0.5,
        plcc_loss=None,
        rank_loss=None,
        distribution_loss=None,
        l1=0.25,
        contrastive=2.0,
        intra_share=0.1,
        intra_similarity=similarity,
        positive_similarity=0.5,
        grad_norm=None,
        lr=1e-3,
        images_per_s=10.0,
        data_wait=0.25,
        time_s=1.0,
    )


def journal(root: Path, *, limit: int, progress: bool = False) -> MetricsLogger:
    root.mkdir(exist_ok=True)
    return MetricsLogger(
        RunDir(root),
        Trackers([], root, settings={}),
        CollapseWatch(limit=limit),
        enabled=True,
        progress=progress,
    )


def test_a_collapse_is_warned_of_once_when_it_lasts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voice = journal(tmp_path / "run", limit=3)
    with caplog.at_level(logging.WARNING):
        for step, similarity in enumerate([0.99, 0.99, 0.5, 0.99, 0.985, 0.981, 0.99]):
            voice.step(entry(step, similarity), done=step + 1, steps=10)
    assert caplog.text.count("the manifold the method learns has collapsed") == 1
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["event"] == "collapse"] == [5]


@pytest.mark.parametrize("limit", [0, 3])
def test_no_warning_without_a_collapse_or_with_the_watch_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: int
) -> None:
    voice = journal(tmp_path / "run", limit=limit)
    with caplog.at_level(logging.WARNING):
        for step in range(9):
            voice.step(entry(step, 0.99 if limit == 0 else 0.98), done=step + 1, steps=10)
    assert caplog.text == ""


def test_the_bar_shows_terms_rate_wait_and_the_end_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    voice = journal(tmp_path / "run", limit=3, progress=True)
    with voice.epoch(0, epochs=2, images=8, seen=0, steps_done=0):
        for step in range(2):
            voice.step(entry(step, 0.5), done=step + 1, steps=4)
    shown = capsys.readouterr().err
    for words in ("epoch 1/2", "img/s", "l1 0.250", "contrastive 2.00", "lr 1.0e-03", "wait 25%"):
        assert words in shown
    assert "run ends in 0:00:00" in shown


def test_an_epoch_without_a_val_part_says_so_by_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    voice = journal(tmp_path / "run", limit=3)
    with caplog.at_level(logging.INFO):
        voice.epoch_end(
            EpochEntry(epoch=0, time_s=1.0, val_srcc=None, val_plcc=None), entry(3, 0.5), done=4
        )
    assert "SRCC" not in caplog.text
    assert "10.0 images/s, data wait 25%" in caplog.text
    assert json.loads((tmp_path / "run/log.jsonl").read_text()) == {
        "event": "epoch",
        "epoch": 0,
        "time_s": 1.0,
        "val_srcc": None,
        "val_plcc": None,
        "val_reason": "",
        "val_sets": None,
    }
