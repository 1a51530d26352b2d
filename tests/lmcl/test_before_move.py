"""Files of the commit before the move open, go on, score and judge as they did.

tests/data/before_move/README.md says how they were made. Other processors round differently, so
figures are compared to four places here; bits, on one machine, by scripts/compare_runs.py.
"""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from lmcl.cli.main import cli
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.cli import cli as shard_cli
from shards.datasets.table import open_table
from shards.read import open_set
from shards.score_scale import ScoreScale
from shards.splits.draw import make_splits
from shards.splits.split import load_split

BEFORE = Path(__file__).resolve().parents[1] / "data" / "before_move"
FIGURES = ("n", "srcc", "krcc", "plcc_raw", "rmse_raw", "mae_raw")


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that may be written to, entered as its paths are relative."""
    folder = tmp_path / "before"
    shutil.copytree(BEFORE, folder)
    monkeypatch.chdir(folder)
    return folder


def lmcl(*arguments: str) -> str:
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as lines:
        return list(csv.DictReader(lines))


def assert_same_rows(found: Path, expected: Path) -> None:
    """The same columns and rows; numbers to four places. Later versions add columns at the end."""
    ours, theirs = rows(found), rows(expected)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert list(one)[: len(other)] == list(other)
        for name, value in other.items():
            assert as_number(one[name]) == pytest.approx(as_number(value), abs=1e-4), name


def as_number(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def figures(path: Path) -> dict[str, float]:
    tree = json.loads(path.read_text())
    return {name: tree[name] for name in FIGURES}


def test_a_set_opens_whole_and_its_splits_are_drawn_again(before: Path) -> None:
    done = CliRunner().invoke(shard_cli, ["verify", "set", "--deep", "--no-progress"])
    assert done.exit_code == 0, done.output
    opened = open_set("set")
    drawn = [
        *make_splits(opened, protocol="70-10-20", repeats=1),
        *make_splits(opened, protocol="k-fold", folds=3),
    ]
    for split in drawn:
        stored = load_split(opened, split.name)
        assert split.hash == stored.hash
        for part in ("train", "val", "test"):
            np.testing.assert_array_equal(split.part(part), stored.part(part))


def test_the_same_pictures_pack_into_the_same_bytes(before: Path) -> None:
    packed = open_set("set")
    photos = before / "photos"
    photos.mkdir()
    for id in packed.ids().tolist():
        (photos / Path(packed.samples.path[id]).name).write_bytes(packed.read_bytes(id))
    score = ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)
    table = open_table(before / "labels.csv", images=photos, name="table", score=score)
    build(table, before / "again", workers=1, size=ShardSize(samples=14))
    for shard in sorted((before / "set").glob("*.tar")):
        assert (before / "again" / shard.name).read_bytes() == shard.read_bytes()


def test_a_stopped_run_goes_on_and_ends_as_the_one_that_was_not_stopped(before: Path) -> None:
    half, finished = before / "half", before / "finished"
    shutil.copy(half / "config.toml", before / "run.toml")
    lmcl("train", "--config", "run.toml", "--output", "half", "--resume", "auto", "--no-progress")
    for ours, theirs in zip(log(half), log(finished), strict=True):
        for name in ("epoch", "step", "loss", "l1", "contrastive", "lr", "val_srcc"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-4), name
    weights = [load_file(run / "model" / "model.safetensors") for run in (half, finished)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        np.testing.assert_allclose(weight, weights[1][name], atol=1e-3, err_msg=name)
    assert_same_rows(half / "predictions" / "test.csv", finished / "predictions" / "test.csv")
    assert figures(half / "metrics.json") == pytest.approx(
        figures(finished / "metrics.json"), abs=1e-3
    )


def test_a_finished_run_is_judged_and_reported_as_it_was(before: Path) -> None:
    kept = before / "kept"
    shutil.copytree(before / "finished", kept)
    lmcl("eval", "finished", "--split", "val", "--no-progress")
    assert_same_rows(before / "finished/predictions/val.csv", kept / "predictions/val.csv")
    name = "predictions/val.metrics.json"
    assert figures(before / "finished" / name) == pytest.approx(figures(kept / name), abs=1e-3)
    lmcl("report", "finished")
    assert "SRCC" in (before / "finished" / "report.html").read_text()


def test_a_model_scores_as_it_did_and_an_old_scores_file_goes_on(before: Path) -> None:
    ask = ("score", "set", "--model", "finished/model", "--boxes", "--crop-scores", "--no-progress")
    lmcl(*ask, "--output", "again.csv")
    assert_same_rows(before / "again.csv", before / "scores.csv")
    old = (before / "scores.csv").read_text().splitlines(keepends=True)
    (before / "scores.csv").write_text("".join(old[:15]))
    assert "28 rows (0 failed, 14 kept)" in lmcl(*ask, "--output", "scores.csv", "--resume")
    assert_same_rows(before / "scores.csv", BEFORE / "scores.csv")
    kept = (before / "scores.csv").read_text().splitlines()[:15]
    # Old rows stay as they were, with nothing in the columns of later versions.
    assert kept[0] == f"{old[0].rstrip()},note,width,height"
    assert kept[1:] == [f"{line.rstrip()},,," for line in old[1:15]]
