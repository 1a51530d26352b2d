"""The floor beside the trained figure: what is compared, and what is refused with a way out."""

import json
from pathlib import Path

import numpy as np
import pytest

from lmcl.evaluation.metrics import srcc
from lmcl.evaluation.predictions import read_csv
from lmcl.evaluation.probe import ProbeFacts, write_probe
from lmcl.evaluation.ridge import RidgeChoice
from lmcl.evaluation.significance import srcc_difference
from lmcl.report.analysis import Analysis, analyse
from lmcl.report.run import read_run

FACTS = ProbeFacts(
    set="demo",
    set_sha256="0",
    split="a",
    split_hash="1f",
    part="test",
    encoder="hybrid on resnet18",
    weights="timm",
    crops="4 x 224 px",
    decode="torch",
    features=512,
    train=300,
    ridge=RidgeChoice(weight=0.1, width=0.7, rmse=0.1, folds=5, repeats=1),
)


@pytest.fixture
def probed(make_run, tmp_path: Path) -> Path:
    """A run whose probe is its own predictions with more noise."""
    root = make_run(tmp_path / "run", pictures=False)
    protocol = json.loads((root / "protocol.json").read_text()) | {"split_hash": "1f"}
    (root / "protocol.json").write_text(json.dumps(protocol))
    table = read_csv(root / "predictions" / "test.csv")
    noise = np.random.default_rng(0).normal(scale=25, size=len(table))
    worse = table.take(np.arange(len(table)))
    object.__setattr__(worse, "prediction", table.prediction + noise)
    write_probe(root / "probe", FACTS, worse, {})
    return root


def analysed(root: Path) -> Analysis:
    return analyse(read_run(root))


def test_the_difference_is_the_paired_one_over_groups(probed: Path) -> None:
    model, probe = (
        read_csv(probed / f"{p}.csv") for p in ("predictions/test", "probe/predictions")
    )
    groups = np.unique(model.group.astype(str), return_inverse=True)[1]
    expected = srcc_difference(model.prediction, probe.prediction, model.mos, groups)
    floor = analysed(probed).floor
    assert floor.difference == expected
    assert floor.evaluation is not None
    assert floor.evaluation.srcc == pytest.approx(srcc(probe.prediction, probe.mos))
    assert "ahead of it (95 % interval of the difference" in floor.words
    assert "includes zero" not in floor.words


def test_a_model_that_is_not_ahead_is_said_to_be_so(probed: Path) -> None:
    write_probe(probed / "probe", FACTS, read_csv(probed / "predictions" / "test.csv"), {})
    assert (
        "training shows no gain over the features it started from" in analysed(probed).floor.words
    )


def spoil_hash(root: Path) -> None:
    path = root / "probe" / "predictions.csv"
    path.write_text(path.read_text() + "\n")


def spoil_json(root: Path) -> None:
    (root / "probe" / "probe.json").write_text("{")


def link(root: Path) -> None:
    (root / "probe" / "probe.json").rename(root / "elsewhere")
    (root / "probe" / "probe.json").symlink_to(root / "elsewhere")


def other_split(root: Path) -> None:
    protocol = json.loads((root / "protocol.json").read_text()) | {"split_hash": "2f"}
    (root / "protocol.json").write_text(json.dumps(protocol))


def other_scores(root: Path) -> None:
    table = read_csv(root / "predictions" / "test.csv")
    object.__setattr__(table, "mos", table.mos + 1)
    table.write_csv(root / "predictions" / "test.csv")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (spoil_hash, "is not the file that probe.json is about"),
        (spoil_json, "probe.json"),
        (link, "is a link"),
        (other_split, "of split a"),
        (other_scores, "other scores"),
    ],
)
def test_what_cannot_be_compared_is_named_with_the_command_that_helps(probed, spoil, said) -> None:
    spoil(probed)
    floor = analysed(probed).floor
    assert floor.words == ""
    assert said in floor.reason
    assert f"`lmcl probe {probed}`" in floor.reason
    assert floor.to_json() == {"reason": floor.reason}
