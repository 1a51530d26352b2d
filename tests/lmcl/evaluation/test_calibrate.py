"""Calibrating a run: training leaves a calibration, `lmcl calibrate` makes the same one."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.config import Config
from lmcl.errors import LmclError
from lmcl.evaluation import calibrate, conformal
from lmcl.evaluation.calibrate import sample_ids
from lmcl.evaluation.calibration import prediction_interval, read_meaning
from lmcl.evaluation.predictions import read_csv
from lmcl.training.setup import fit
from shards.read import open_set
from shards.splits.split import load_split

SPLIT = "70-10-20-seed123-00"


@pytest.fixture(scope="module")
def finished(tiny: Callable[..., Config], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "one"
    fit(tiny("train.epochs=1"), folder, progress=False)
    return folder


def test_training_leaves_a_calibration_of_val_and_of_the_training_images(
    finished: Path, demo_set: Path
) -> None:
    split = load_split(open_set(demo_set), SPLIT)
    found = read_meaning(finished / "model")
    assert found is not None
    assert found.calibration.intervals is not None
    assert found.calibration.intervals.n == len(split.val)
    assert len(found.calibration.population) == len(split.train) == len(found.neighbours)
    val = read_csv(finished / "predictions" / "val.csv")
    error = np.abs(val.prediction_unit - open_set(demo_set).score.to_unit(val.mos))
    scaled = np.concatenate(found.calibration.intervals.residuals)
    assert np.max(np.abs(scaled)) <= np.max(error) / found.calibration.intervals.floor


def test_predictions_carry_the_intervals_of_the_calibration(finished: Path, demo_set: Path) -> None:
    table = read_csv(finished / "predictions" / "test.csv")
    calibration = read_meaning(finished / "model").calibration
    assert np.all(table.lower <= table.upper)
    scale = open_set(demo_set).score
    least, most = prediction_interval(
        calibration, scale, table.prediction_unit, np.zeros(len(table)), confidence=0.9
    )
    # An image's own crops disagree, so its interval is wider than that of one whose do not.
    assert np.all(table.upper - table.lower >= most - least - 1e-9)


def test_the_command_makes_what_training_made(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    before = read_meaning(root / "model")
    for name in ("calibration.json", "neighbours.safetensors"):
        (root / "model" / name).unlink()
    done = CliRunner().invoke(cli, ["calibrate", str(root), "--no-progress"])
    assert done.exit_code == 0, done.output
    after = read_meaning(root / "model")
    assert after.calibration.population == pytest.approx(before.calibration.population, abs=1e-6)
    assert np.allclose(after.neighbours, before.neighbours, atol=1e-3)
    assert "training images of demo; intervals from" in done.output


def test_the_command_shares_misses_out_among_the_subsets_of_the_val_part(
    finished: Path, demo_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The val part of the tests' set is small: every group and class has a say here."""
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    ids = np.sort(load_split(open_set(demo_set), SPLIT).part("val"))
    named = np.where(np.arange(len(ids)) % 2, "a", "b")
    asked = []

    def recorded(*arguments: object, **options: object) -> conformal.Conformal:
        asked.append(options["groups"])
        return conformal.fit_conformal(*arguments, **(options | {"groups": named}))

    monkeypatch.setattr(calibrate, "fit_conformal", recorded)
    for name in ("LEAST_IN_GROUP", "LEAST_IN_CLASS"):
        monkeypatch.setattr(conformal, name, 1)
    monkeypatch.setattr(conformal, "SHARES", (0.2,))
    done = CliRunner().invoke(cli, ["calibrate", str(root), "--no-progress"])
    assert done.exit_code == 0, done.output
    assert asked[0].tolist() == open_set(demo_set).samples.subset[ids].tolist()
    found = read_meaning(root / "model").calibration.intervals
    assert (found.below, found.is_signed) == (0.2, True)


def test_a_run_whose_split_is_another_one_now_is_refused(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    card = root / "model" / "config.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"split_hash": "00"}))
    done = CliRunner().invoke(cli, ["calibrate", str(root), "--no-progress"])
    assert isinstance(done.exception, LmclError)
    assert done.exception.exit_code == 3


@pytest.mark.parametrize(("n", "most"), [(0, 5), (1, 5), (5, 5), (1000, 512)])
def test_a_sample_of_ids_is_even_and_complete_where_it_can_be(n: int, most: int) -> None:
    found = sample_ids(np.arange(n, dtype=np.int64) * 3, most)
    assert len(found) == min(n, most) == len(set(found.tolist()))
    assert n == 0 or (found[0], found[-1]) == (0, 3 * (n - 1))
