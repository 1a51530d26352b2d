import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from lmcl.report.analysis import analyse
from lmcl.report.compare import compare
from lmcl.report.compare_page import verdict
from lmcl.report.run import read_run
from lmcl.report.write import write_report

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, make_run) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    wanted = [("good", 5.0, 0), ("bad", 30.0, 1), ("twin", 5.0, 2)]
    return [make_run(root / n, noise=e, seed=s, pictures=False) for n, e, s in wanted]


@pytest.fixture(scope="module")
def comparison(runs):
    return compare([analyse(read_run(r)) for r in runs])


def test_a_worse_run_is_found_and_an_equal_one_is_not(comparison) -> None:
    p = {(q.a, q.b): q for q in comparison.pairs}
    assert p["good", "bad"].difference.value > 0.1
    assert p["good", "bad"].p_holm < 0.05
    assert p["good", "twin"].p_holm > 0.05
    assert "good ranks better than bad" in verdict(comparison)


def test_runs_that_differ_only_in_the_split_are_one_model(tmp_path: Path, make_run) -> None:
    folders = []
    for index in range(3):
        for name, lr in (("a", "2e-4"), ("b", "3e-4")):
            folder = make_run(
                tmp_path / f"{name}{index}", seed=index, split=f"s-0{index}", pictures=False
            )
            text = (folder / "config.toml").read_text().replace("2e-4", lr)
            (folder / "config.toml").write_text(text)
            folders.append(folder)
    found = compare([analyse(read_run(f)) for f in folders])
    assert [len(m.runs) for m in found.models] == [3, 3]
    assert found.split_pairs[0].splits == 3
    assert found.split_pairs[0].tests[0].name == "wilcoxon"


def _runs_of_two_models(root: Path, make_run, wanted: list[tuple[str, float, int, str]]):
    """Runs `(model, noise, seed, split)`; the models a and b differ in their learning rate."""
    folders = []
    for name, noise, seed, split in wanted:
        folder = make_run(
            root / f"{name}-{split}-{seed}", noise=noise, seed=seed, split=split, pictures=False
        )
        if name == "b":
            config = folder / "config.toml"
            config.write_text(config.read_text().replace("2e-4", "3e-4"))
        folders.append(folder)
    return folders


def test_two_seeds_of_one_split_are_one_split_and_every_run_counts(
    tmp_path: Path, make_run
) -> None:
    wanted = [("a", 5.0, 0, "s"), ("a", 12.0, 1, "s"), ("b", 20.0, 2, "s"), ("b", 40.0, 3, "s")]
    folders = _runs_of_two_models(tmp_path, make_run, wanted)
    analyses = [analyse(read_run(f)) for f in folders]
    found = compare(analyses)
    (pair,) = found.split_pairs
    a0, a1, b0, b1 = (one.evaluation.srcc for one in analyses)
    assert (pair.splits, pair.runs) == (1, (2, 2))
    assert pair.mean == pytest.approx((a0 + a1) / 2 - (b0 + b1) / 2)
    assert all(math.isnan(test.p) for test in pair.tests)
    assert "fewer than two splits" in pair.tests[1].reason
    page = write_report(folders, tmp_path / "out").read_text()
    words = "on 1 split: runs of one model on one split were averaged first"
    assert words in page
    assert words in (tmp_path / "out" / "report.md").read_text()


def test_runs_of_a_sweep_are_told_apart_by_the_folder_of_their_rung(
    tmp_path: Path, make_run
) -> None:
    folders = []
    for rung, lr in (("0-baseline", "2e-4"), ("1-faster", "3e-4")):
        for seed in (0, 1):
            folder = make_run(tmp_path / rung / f"seed-{seed}", seed=seed, pictures=False)
            config = folder / "config.toml"
            config.write_text(config.read_text().replace("2e-4", lr))
            folders.append(folder)
    write_report(folders, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    wanted = ["0-baseline/seed-0", "0-baseline/seed-1", "1-faster/seed-0", "1-faster/seed-1"]
    assert [run["name"] for run in found["runs"]] == wanted
    assert [model["name"] for model in found["comparison"]["models"]] == ["0-baseline", "1-faster"]


def test_a_run_that_is_named_twice_is_compared_with_itself(tmp_path: Path, make_run) -> None:
    folder = make_run(tmp_path / "rung" / "seed-0", pictures=False)
    write_report([folder, folder], tmp_path / "out")
    (pair,) = json.loads((tmp_path / "out" / "results.json").read_text())["comparison"]["pairs"]
    assert (pair["a"], pair["b"]) == ("seed-0", "seed-0")


def test_splits_weigh_the_same_however_many_seeds_they_were_run_with(
    tmp_path: Path, make_run
) -> None:
    wanted = [
        *[("a", 5.0, 0, "s"), ("a", 9.0, 1, "s"), ("a", 30.0, 2, "t")],
        *[("b", 20.0, 3, "s"), ("b", 25.0, 4, "t")],
    ]
    analyses = [analyse(read_run(f)) for f in _runs_of_two_models(tmp_path, make_run, wanted)]
    (pair,) = compare(analyses).split_pairs
    a0, a1, a2, b0, b1 = (one.evaluation.srcc for one in analyses)
    assert (pair.splits, pair.runs) == (2, (3, 2))
    assert pair.mean == pytest.approx(((a0 + a1) / 2 - b0 + a2 - b1) / 2)


def test_other_images_are_refused_with_the_reason(tmp_path: Path, make_run, runs) -> None:
    other = make_run(tmp_path / "other", contents=5, pictures=False)
    found = compare([analyse(read_run(r)) for r in (runs[0], other)])
    assert found.pairs == ()
    assert "different test images" in found.refusals[0]


def test_splits_of_two_models_are_compared_by_split_and_not_refused_pair_by_pair(
    tmp_path: Path, make_run
) -> None:
    folders = []
    for index in range(3):
        for name, lr in (("a", "2e-4"), ("b", "3e-4")):
            folder = make_run(
                tmp_path / f"{name}{index}",
                seed=index,
                contents=6 + index,
                split=f"s-0{index}",
                pictures=False,
            )
            text = (folder / "config.toml").read_text().replace("2e-4", lr)
            (folder / "config.toml").write_text(text)
            folders.append(folder)
    found = compare([analyse(read_run(f)) for f in folders])
    assert found.refusals == ()
    assert [(p.a, p.b) for p in found.pairs] == [("a0", "b0"), ("a1", "b1"), ("a2", "b2")]
    assert found.split_pairs[0].splits == 3


def test_many_pairs_do_not_hide_a_clear_difference_behind_the_bootstrap_s_resolution(
    tmp_path: Path, make_run
) -> None:
    folders = [
        make_run(tmp_path / f"r{i}", seed=i, noise=4.0 if i == 0 else 40.0, pictures=False)
        for i in range(9)
    ]
    found = compare([analyse(read_run(f)) for f in folders])
    assert len(found.pairs) == 36
    assert all(p.p_holm < 0.05 for p in found.pairs if p.a == "r0")


def test_one_configuration_on_two_sets_is_two_models(tmp_path: Path, make_run) -> None:
    folders = [make_run(tmp_path / n, pictures=False) for n in ("a", "b")]
    text = (folders[1] / "protocol.json").read_text().replace('"demo"', '"livec"')
    (folders[1] / "protocol.json").write_text(text)
    found = compare([analyse(read_run(f)) for f in folders])
    assert [len(m.runs) for m in found.models] == [1, 1]
    assert "a and b: different sets" in found.refusals


def test_splits_of_one_name_on_two_sets_are_told_apart_on_the_page(
    tmp_path: Path, make_run
) -> None:
    folders = [make_run(tmp_path / n, pictures=False) for n in ("a", "b")]
    text = (folders[1] / "protocol.json").read_text().replace('"demo"', '"livec"')
    (folders[1] / "protocol.json").write_text(text)
    page = write_report(folders, tmp_path / "out").read_text()
    assert "<td>demo, 70-10-20-seed123-00</td>" in page
    assert "<td>livec, 70-10-20-seed123-00</td>" in page


def test_the_only_value_of_a_row_is_not_its_highest(tmp_path: Path, make_run) -> None:
    folders = [make_run(tmp_path / n, pictures=False, seed=i) for i, n in enumerate(("a", "b"))]
    config = folders[1] / "config.toml"
    config.write_text(config.read_text().replace("lr = 2e-4", "lr = 3e-4"))
    table = folders[1] / "predictions" / "test.csv"
    rows = [line for line in table.read_text().splitlines() if ",blur," not in line]
    table.write_text("\n".join(rows) + "\n")
    page = write_report(folders, tmp_path / "out").read_text()
    (blur,) = re.findall(r"<tr><td>blur</td>.*?</tr>", page, re.S)
    (noise,) = re.findall(r"<tr><td>noise</td>.*?</tr>", page, re.S)
    assert "<b>" not in blur
    assert noise.count("<b>") == 1


def test_the_comparison_is_written_side_by_side(tmp_path: Path, runs) -> None:
    page = write_report(runs, tmp_path).read_text()
    tree = json.loads((tmp_path / "results.json").read_text())
    assert [r["name"] for r in tree["runs"]] == ["good", "bad", "twin"]
    assert len(tree["comparison"]["pairs"]) == 3
    assert "Is the difference real?" in page
    assert "good - bad" in (tmp_path / "report.md").read_text()
    assert not (tmp_path / "predictions.csv").exists()


def test_pairs_use_the_images_and_not_the_order_of_runs(comparison, runs) -> None:
    turned = compare([analyse(read_run(r)) for r in reversed(runs)])
    there = {(p.a, p.b): p.difference.value for p in comparison.pairs}
    back = {(p.b, p.a): p.difference.value for p in turned.pairs}
    assert there.keys() == back.keys()
    assert all(math.isclose(there[k], -back[k], abs_tol=1e-12) for k in there)


def test_the_matrix_across_sets_shows_every_other_set(tmp_path: Path, make_run) -> None:
    folders = [make_run(tmp_path / n, pictures=False, seed=i) for i, n in enumerate(("a", "b"))]
    for folder in folders:
        (folder / "predictions" / "livec.csv").write_bytes(
            (folder / "predictions" / "test.csv").read_bytes()
        )
    page = write_report(folders, tmp_path / "out").read_text()
    assert "Across sets" in page
    assert "livec" in page


def test_values_of_a_model_keep_the_order_of_its_runs(comparison) -> None:
    first = comparison.models[0]
    expected = [a.evaluation.srcc for a in first.runs]
    np.testing.assert_array_equal(first.values("srcc"), expected)


@pytest.mark.parametrize(
    ("kept", "is_bold"), [(36, True), (20, True), (19, False), (2, False)], ids=lambda v: str(v)
)
def test_the_highest_of_a_group_is_bold_only_among_runs_with_enough_images_of_it(
    tmp_path: Path, make_run, kept: int, is_bold: bool
) -> None:
    many = make_run(tmp_path / "many", noise=30.0, pictures=False)
    less = make_run(tmp_path / "less", noise=1.0, seed=1, pictures=False)
    file = less / "predictions" / "test.csv"
    head, *rows = file.read_text().splitlines()
    blurred = [r for r in rows if ",blur," in r]
    others = [r for r in rows if ",blur," not in r]
    file.write_text("\n".join([head, *blurred[:kept], *others]) + "\n")
    config = less / "config.toml"
    config.write_text(config.read_text().replace("2e-4", "3e-4"))
    page = write_report([many, less], tmp_path / "out").read_text()
    row = re.search(r"<tr[^>]*><td>blur</td>.*?</tr>", page, re.DOTALL)[0]
    assert ("<b>" in row) is is_bold
    assert (f"<small>{kept}</small>" in row) is (kept < 36)


def test_only_a_difference_larger_than_chance_has_a_bold_p(runs, tmp_path: Path) -> None:
    page = write_report(runs, tmp_path / "out").read_text()
    rows = dict(re.findall(rf"<tr><td>(\w+ {MINUS} \w+)</td>(.*?)</tr>", page, re.DOTALL))
    assert "<b>" in rows[f"good {MINUS} bad"]
    assert "<b>" not in rows[f"good {MINUS} twin"]
