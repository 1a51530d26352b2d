"""Ratings as distributions: soft labels, a head that says a deviation, and what becomes of it."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from scipy import stats

import lmcl
from lmcl.cli.main import cli
from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.evaluation.calibration import read_meaning
from lmcl.evaluation.predictions import read_csv
from lmcl.training.checkpoint import list_checkpoints
from lmcl.training.setup import fit, plan
from lmcl.training.soft_labels import distribution
from shards.build.build import build
from shards.datasets.table import open_table
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split

BINS = 8
Tiny = Callable[..., Config]


@pytest.fixture(scope="module")
def run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distribution") / "run"
    fit(tiny(f"decoder.bins={BINS}", "train.epochs=2"), folder, progress=False)
    return folder


def test_a_soft_label_is_a_normal_integrated_over_ranges() -> None:
    found = distribution(np.array([0.3, 0.98]), np.array([0.2, 0.0]), 5)
    edges = [-np.inf, 0.2, 0.4, 0.6, 0.8, np.inf]
    truth = np.diff(stats.norm.cdf(edges, 0.3, 0.2))
    np.testing.assert_allclose(found[0], truth, rtol=1e-12)
    np.testing.assert_allclose(found.sum(axis=1), 1)
    assert found[1].argmax() == 4


def test_predictions_and_scores_have_the_same_deviation_in_the_sets_scale(
    run: Path, tiny: Tiny, tmp_path: Path
) -> None:
    table = read_csv(run / "predictions" / "test.csv")
    assert np.isfinite(table.deviation).all()
    assert table.deviation.min() > 0
    config = tiny()
    packed = open_set(config.data.root)
    for id in table.id.tolist()[:3]:
        (tmp_path / f"{id}.{packed.samples.codec[id]}").write_bytes(packed.read_bytes(id))
    words = ["score", str(tmp_path), "--model", str(run), "--output", str(tmp_path / "s.csv")]
    done = CliRunner().invoke(cli, [*words, "--no-progress"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    with (tmp_path / "s.csv").open(newline="") as lines:
        rows = {int(Path(row["path"]).stem): row for row in csv.DictReader(lines)}
    for id, row in rows.items():
        place = table.id.tolist().index(id)
        assert float(row["deviation"]) == pytest.approx(table.deviation[place], abs=1e-3)
        assert float(row["score"]) == pytest.approx(table.prediction[place], abs=1e-3)
        assert float(row["lower"]) == pytest.approx(table.lower[place], abs=1e-3)
    again = CliRunner().invoke(cli, [*words, "--no-progress", "--resume"], catch_exceptions=False)
    assert again.exit_code == 0, again.output


def test_intervals_are_normalised_by_the_predicted_deviation(run: Path) -> None:
    meaning, table = read_meaning(run / "model"), read_csv(run / "predictions" / "test.csv")
    assert meaning is not None
    assert meaning.calibration.intervals is not None
    below, above = meaning.calibration.intervals.reach(
        table.prediction_unit, table.deviation / 4.0, confidence=0.9
    )
    inside = (table.lower > 1.001) & (table.upper < 4.999)
    np.testing.assert_allclose(
        (table.upper - table.lower)[inside], 4 * (below + above)[inside], rtol=1e-6
    )


def test_the_loss_is_logged_with_its_weight(run: Path) -> None:
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "loss" in entry]
    for entry in steps:
        regression = entry["l1"] + entry["distribution_loss"]
        assert entry["loss"] == pytest.approx(0.9 * regression + 0.1 * entry["contrastive"])
    assert all(entry["distribution_loss"] > 0 for entry in steps)
    assert "Divergence from the ratings" in (run / "report.html").read_text()


def test_a_run_in_parts_or_resumed_is_the_same_run(run: Path, tiny: Tiny, tmp_path: Path) -> None:
    middle = list_checkpoints(run / "checkpoints")[-1]
    config = tiny(f"decoder.bins={BINS}", "train.epochs=2")
    fit(config, tmp_path / "again", resume=str(middle), progress=False)
    one, two = (load_file(r / "model" / "model.safetensors") for r in (run, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert one["panel.head.weight"].shape[0] == BINS


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_an_export_gives_the_deviation_too(run: Path, tmp_path: Path, format: str) -> None:
    pytest.importorskip("onnx")
    output = tmp_path / f"model.{format}"
    words = ["export", str(run), "--format", format, "--output", str(output), "--no-progress"]
    done = CliRunner().invoke(cli, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if format == "pt2":
        crops = torch.zeros(2, 32, 32, 3, dtype=torch.uint8)
        assert len(torch.export.load(output).module()(crops)) == 4
        return
    image = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    ours, theirs = lmcl.load(run), lmcl.load(output)
    found = [one.predict([one.prepare(image)])[0] for one in (ours, theirs)]
    assert found[1].deviation == pytest.approx(found[0].deviation, abs=1e-3)
    assert found[1].meaning.lower == pytest.approx(found[0].meaning.lower, abs=1e-3)


def test_a_set_without_deviations_is_refused_or_given_one(
    tiny: Tiny, demo_set: Path, tmp_path: Path
) -> None:
    packed = open_set(demo_set)
    for id in packed.ids().tolist():
        (tmp_path / f"{id}.img").write_bytes(packed.read_bytes(id))
    rows = "".join(f"{id}.img,{packed.samples.mos[id]}\n" for id in packed.ids().tolist())
    (tmp_path / "labels.csv").write_text(f"path,score\n{rows}")
    dataset = open_table(
        tmp_path / "labels.csv", images=tmp_path, score=packed.score, extra_files="ignore"
    )
    build(dataset, tmp_path / "set", workers=1)
    split = make_splits(open_set(tmp_path / "set"), repeats=1)[0]
    write_split(tmp_path / "set", split)
    assert len(load_split(open_set(tmp_path / "set"), split.name).train)
    own = (f"data.root='{tmp_path / 'set'}'", f"data.split={split.name}", f"decoder.bins={BINS}")
    with pytest.raises(ConfigError, match=r"set objective\.deviation to one number for all"):
        plan(tiny(*own), tmp_path / "run")
    plan(tiny(*own, "objective.deviation=0.15"), tmp_path / "run")


def test_a_deviation_that_nothing_learns_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.bins = 0 learns none"):
        tiny("objective.deviation=0.1")


def test_one_bin_is_no_distribution(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match="is no distribution"):
        tiny("decoder.bins=1")
