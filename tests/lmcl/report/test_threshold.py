"""`lmcl threshold`: the rule in the model folder, the page with the curve and images."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.errors import LmclError
from lmcl.evaluation.predictions import read_csv
from lmcl.evaluation.threshold import judge, read_rules
from lmcl.report import write_report


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_run) -> Path:
    """A run with val and test predictions and a model folder."""
    root = make_run(tmp_path_factory.mktemp("runs") / "one")
    test = read_csv(root / "predictions" / "test.csv")
    other = make_run(tmp_path_factory.mktemp("runs") / "two", seed=1, pictures=False)
    shutil.copy(other / "predictions" / "test.csv", root / "predictions" / "val.csv")
    (root / "model").mkdir()
    dataclasses.replace(test).write_csv(root / "predictions" / "test.csv")
    return root


def threshold(*arguments: str | Path):
    return CliRunner().invoke(cli, ["threshold", *map(str, arguments)])


@pytest.mark.parametrize(
    "promise", [("--precision", "0.9"), ("--recall", "0.8"), ("--reject-share", "0.25")]
)
def test_the_cut_keeps_its_promise_on_val_and_is_judged_on_test(
    finished: Path, promise: tuple[str, str]
) -> None:
    done = threshold(finished, "--bad-below", "0.4", *promise)
    assert done.exit_code == 0, done.output
    name = f"bad-0.4-{promise[0].strip('-')}-{float(promise[1]):g}"
    rule = read_rules(finished / "model")[name]
    for part, found in (("val", rule.val), ("test", rule.test)):
        table = read_csv(finished / "predictions" / f"{part}.csv")
        assert found == judge(table.prediction_unit, table.mos / 100, cut=rule.cut, bad_below=0.4)
    kept = {
        "--precision": rule.val.precision.value >= 0.9,
        "--recall": rule.val.recall.value >= 0.8,
        "--reject-share": rule.val.rejected.value <= 0.25,
    }
    assert kept[promise[0]]
    assert f"--keep {name}" in done.output
    page = (finished / "thresholds" / f"{name}.html").read_text()
    assert "Just below: rejected" in page
    assert page.count('src="data:image/jpeg') == 24
    assert f"{rule.test.precision.low:.3f} to {rule.test.precision.high:.3f}" in page


def test_a_rule_of_ones_own_name_is_drawn_in_the_report(finished: Path, tmp_path: Path) -> None:
    assert not threshold(
        finished, "--bad-below", "0.4", "--recall", "0.9", "--name", "careful"
    ).exit_code
    page = write_report([finished], tmp_path / "report").read_text()
    assert "What sorting out would cost" in page
    assert ">careful<" in page


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--bad-below", "0.4"), 2, "give one of"),
        (("--bad-below", "0.4", "--recall", "0.9", "--precision", "0.9"), 2, "give one of"),
        (("--bad-below", "4", "--recall", "0.9"), 2, "--bad-below"),
        (("--bad-below", "0.4", "--recall", "0.9", "--name", "../x"), 2, "letters, digits"),
        (("--bad-below", "nan", "--recall", "0.9"), 2, "nan is not in the range 0<x<=1"),
        (("--bad-below", "0.4", "--recall", "nan"), 2, "nan is not in the range 0<x<=1"),
        (("--bad-below", "0.4", "--precision", "nan"), 2, "nan is not in the range 0<x<=1"),
        (("--bad-below", "0.4", "--reject-share", "nan"), 2, "nan is not in the range 0<x<=1"),
        (("--bad-below", "0.001", "--recall", "0.9"), 3, "higher --bad-below"),
    ],
    ids=[
        *("no-promise", "two-promises", "raw-scale", "name"),
        *("nan-bad", "nan-recall", "nan-precision", "nan-share", "nothing-bad"),
    ],
)
def test_what_cannot_be_chosen_is_a_sentence(
    finished: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    done = threshold(finished, *arguments)
    found = getattr(done.exception, "exit_code", done.exit_code)
    assert found == code
    assert words in (str(done.exception) if isinstance(done.exception, LmclError) else done.output)


def test_without_a_val_part_the_way_out_is_named(finished: Path, tmp_path: Path) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    (root / "predictions" / "val.csv").unlink()
    done = threshold(root, "--bad-below", "0.4", "--recall", "0.9")
    assert isinstance(done.exception, LmclError)
    assert "--part val" in str(done.exception)


def test_a_damaged_file_of_rules_does_not_keep_a_report_from_being_made(
    finished: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    (root / "model" / "thresholds.json").write_text(json.dumps({"format_version": 1, "rules": 3}))
    assert "thresholds cannot be shown" in write_report([root], root).read_text()


def test_the_rejected_lie_below_the_cut_whatever_the_direction_of_the_scale(
    finished: Path, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(finished, root)
    protocol = json.loads((root / "protocol.json").read_text())
    protocol["score"]["higher_is_better"] = False
    (root / "protocol.json").write_text(json.dumps(protocol))
    for part in ("val", "test"):
        table = read_csv(root / "predictions" / f"{part}.csv")
        turned = dataclasses.replace(table, mos=100 - table.mos, prediction=100 - table.prediction)
        turned.write_csv(root / "predictions" / f"{part}.csv")
    plain = threshold(finished, "--bad-below", "0.4", "--recall", "0.7", "--name", "one")
    other = threshold(root, "--bad-below", "0.4", "--recall", "0.7", "--name", "one")
    assert plain.exit_code == other.exit_code == 0
    one, two = (read_rules(r / "model")["one"] for r in (finished, root))
    assert one.cut == pytest.approx(two.cut)
    assert np.isclose(one.test.precision.value, two.test.precision.value)
