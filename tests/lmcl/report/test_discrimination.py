"""The pairs of a run that people can tell apart, in every file of the report."""

import csv
import itertools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from scipy import stats

from lmcl.cli.report import command
from lmcl.report import write_report
from lmcl.report.discrimination import ratings_of

TITLE = "Pairs people can tell apart"


@pytest.fixture(scope="module")
def run(tmp_path_factory, make_run) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "one", contents=5, pictures=False)


@pytest.fixture
def changed(run: Path, tmp_path: Path):
    """Makes a copy of the run whose predictions and set are changed."""

    def change(row: Callable[[int, dict[str, str]], dict[str, str]], set_name: str) -> Path:
        copy = tmp_path / "changed"
        shutil.copytree(run, copy)
        file = copy / "predictions" / "test.csv"
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0].keys())
            writer.writeheader()
            writer.writerows(row(i, r) for i, r in enumerate(rows))
        protocol = json.loads((copy / "protocol.json").read_text())
        (copy / "protocol.json").write_text(json.dumps(protocol | {"set": set_name}))
        return copy

    return change


def discrimination(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["runs"][0]["discrimination"]


def test_the_areas_are_those_of_all_pairs_counted_one_by_one(run, tmp_path) -> None:
    write_report([run], tmp_path)
    with (tmp_path / "predictions.csv").open(newline="") as lines:
        rows = [
            tuple(float(r[c]) for c in ("prediction", "mos", "mos_std"))
            for r in csv.DictReader(lines)
        ]
    different, similar, oriented = [], [], []
    for (p, s, d), (q, t, e) in itertools.combinations(rows, 2):
        apart = abs(s - t) > stats.norm.ppf(0.975) * math.sqrt((d**2 + e**2) / 20)
        (different if apart else similar).append(abs(p - q))
        if apart:
            oriented.append((p - q) * np.sign(s - t))
    found = discrimination(tmp_path)
    both = len(different) * len(similar)
    area = stats.mannwhitneyu(different, similar).statistic / both
    turned = stats.mannwhitneyu(oriented, np.negative(oriented)).statistic / len(oriented) ** 2
    assert (found["n_different"], found["n_pairs"]) == (len(different), math.comb(len(rows), 2))
    assert found["auc_different"] == pytest.approx(area, abs=1e-9)
    assert found["auc_better"] == pytest.approx(turned, abs=1e-9)
    assert (found["ratings"], found["reason"]) == (20, "")
    for name in ("report.html", "report.md"):
        assert TITLE in (tmp_path / name).read_text()
    assert f"| {area:.4f} |" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    ("blank", "set_name", "reason"),
    [
        (range(1000), "demo", "the labels of demo give no standard deviation"),
        (range(3), "demo", "3 of 60 images have no standard deviation of their ratings"),
        (range(0), "my-set", "how many ratings a score of my-set is the mean of"),
    ],
    ids=["no-spread", "some-spreads", "no-number"],
)
def test_where_the_spread_or_the_number_is_unknown_every_file_says_why(
    changed, blank, set_name, reason
) -> None:
    folder = changed(lambda i, r: r | {"mos_std": ""} if i in blank else r, set_name)
    write_report([folder], folder)
    found = discrimination(folder)
    assert reason in found["reason"]
    assert found["auc_different"] is found["auc_better"] is None
    for name in ("report.html", "report.md"):
        assert reason in (folder / name).read_text()


def test_the_number_of_ratings_can_be_told(changed) -> None:
    folder = changed(lambda _, r: r, "my-set")
    said = CliRunner().invoke(command, [str(folder), "--ratings", "25"], catch_exceptions=False)
    found = discrimination(folder)
    assert said.exit_code == 0
    assert (found["ratings"], found["ratings_source"]) == (25, "--ratings")
    assert 0.5 < found["auc_different"] < found["auc_better"] <= 1.0


def test_scores_that_all_differ_leave_no_similar_pair_and_that_is_said(changed) -> None:
    folder = changed(lambda i, r: r | {"mos": str(float(i)), "mos_std": "0.001"}, "demo")
    write_report([folder], folder)
    found = discrimination(folder)
    assert found["auc_different"] is None
    assert found["auc_better"] is not None
    assert "no pair is similar" in found["reason"]


def test_an_inverted_model_gets_worse_from_better_below_chance(changed) -> None:
    folder = changed(lambda _, r: r | {"prediction": str(-float(r["prediction"]))}, "demo")
    write_report([folder], folder)
    found = discrimination(folder)
    assert found["auc_better"] < 0.5 < found["auc_different"]


def test_runs_side_by_side_show_the_areas_of_each(run, make_run, tmp_path) -> None:
    other = make_run(tmp_path / "two", contents=5, noise=25.0, seed=3, pictures=False)
    write_report([run, other], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text().partition(f"## {TITLE}")[2]
    assert "| one | 1770 |" in text
    assert "| two | 1770 |" in text
    assert TITLE in (tmp_path / "out" / "report.html").read_text()


def test_every_number_on_file_has_a_source() -> None:
    known = {name: ratings_of(name) for name in ("demo", "livec", "kadid10k", "koniq10k")}
    assert all(number > 1 and source for number, source in known.values())
    assert ratings_of("tid2013") == (0, "")
