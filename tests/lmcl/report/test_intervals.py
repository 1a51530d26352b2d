"""Coverage of intervals and the sentence on where a model is worst, as the report shows them."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from lmcl.evaluation.predictions import Predictions, read_csv
from lmcl.report import write_report
from lmcl.report.formatting import format_figure
from lmcl.report.intervals import coverages


@pytest.fixture(scope="module")
def with_intervals(tmp_path_factory: pytest.TempPathFactory, make_run) -> Path:
    """A run whose intervals hold everywhere but at night."""
    root = make_run(tmp_path_factory.mktemp("runs") / "one", pictures=False)
    table = read_csv(root / "predictions" / "test.csv")
    half = np.where(table.subset == "indoor", 40.0, 6.0)
    path = root / "predictions" / "test.csv"
    lower, upper = table.prediction - half, table.prediction + half
    dataclasses.replace(table, lower=lower, upper=upper).write_csv(path)
    return root


def test_coverage_counts_the_scores_inside_and_its_interval_is_exact(with_intervals: Path) -> None:
    p = read_csv(with_intervals / "predictions" / "test.csv")
    every, night = coverages(p, [("subset", "night & fog")])
    mine = p.subset == "night & fog"
    hits = int(np.sum((p.lower <= p.mos) & (p.mos <= p.upper) & mine))
    assert (night.covered.hits, night.covered.of) == (hits, int(mine.sum()))
    expected = stats.binomtest(hits, int(mine.sum())).proportion_ci(method="exact")
    ends = (night.covered.low, night.covered.high)
    assert ends == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert night.width == pytest.approx(12.0)
    assert every.covered.of == len(p)
    assert not night.keeps


def test_the_report_says_where_intervals_do_not_hold(with_intervals: Path, tmp_path: Path) -> None:
    page = write_report([with_intervals], tmp_path).read_text()
    assert "Do the intervals hold?" in page
    assert re.search(r"Inside [^.]*night &amp; fog[^.]* differs by more than chance", page)
    entry = json.loads((tmp_path / "results.json").read_text())["runs"][0]
    assert [c["name"] for c in entry["coverage"]][:3] == ["all images", "indoor", "night & fog"]
    assert "## Intervals" in (tmp_path / "report.md").read_text()


def test_the_report_says_where_the_model_is_worst(tmp_path: Path, make_run) -> None:
    root = make_run(tmp_path / "run", pictures=False)
    table = read_csv(root / "predictions" / "test.csv")
    wrong = np.where(table.distortion == "noise", 25.0, 0.0)
    capped = np.minimum(table.mos * 0.7, 55.0) - wrong
    dataclasses.replace(table, prediction=capped).write_csv(root / "predictions" / "test.csv")
    page = write_report([root], tmp_path / "out").read_text()
    error = (capped - table.mos)[table.distortion == "noise"]
    assert f"distortion noise (36 images), mean error {format_figure(error.mean(), 2)}" in page
    above = int(np.sum(table.mos > capped.max()))
    assert f"above {capped.max():.2f} (the scale ends at 100), where people put {above}" in page


def test_predictions_without_intervals_have_no_such_section(tmp_path: Path, make_run) -> None:
    root = make_run(tmp_path / "run", pictures=False)
    before = (root / "predictions" / "test.csv").read_text().splitlines()[0]
    assert "lower" not in before
    assert "Do the intervals hold?" not in write_report([root], tmp_path / "out").read_text()


def test_intervals_survive_the_file(with_intervals: Path, tmp_path: Path) -> None:
    table: Predictions = read_csv(with_intervals / "predictions" / "test.csv")
    table.write_csv(tmp_path / "again.csv")
    again = read_csv(tmp_path / "again.csv")
    assert np.array_equal(again.lower, table.lower)
    assert np.array_equal(again.upper, table.upper)
