"""`lmcl eval MODEL --table`: a labelled folder, by the reader of tables, in its own scale."""

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import lmcl
from lmcl.cli.main import cli
from lmcl.evaluation.metrics import srcc
from lmcl.evaluation.predictions import read_csv
from lmcl.evaluation.scope import read_scope
from lmcl.training.setup import fit
from shards.datasets.demo import write_demo
from shards.read import open_set
from shards.splits.split import load_split

SPLIT = "70-10-20-seed123-00"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(tiny("train.epochs=1"), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, demo_set: Path) -> Path:
    """New photographs and three that the run learned from; a table as a spreadsheet exports it."""
    folder = tmp_path_factory.mktemp("labelled")
    labels = write_demo(folder / "source", contents=2, seed=5)
    with labels.open(newline="") as lines:
        rows = [(r["path"], float(r["score"]), r["group"]) for r in csv.DictReader(lines)]
    images = next((folder / "source").rglob(rows[0][0])).parent
    images.rename(folder / "photos")
    packed = open_set(demo_set)
    for id in load_split(packed, SPLIT).train[:3].tolist():
        name = f"shared-{id}.{packed.samples.codec[id]}"
        (folder / "photos" / name).write_bytes(packed.read_bytes(id))
        rows.append((name, float(packed.samples.mos[id]), "shared"))
    cells = [(f"photos\\{name}", f"{100 - 20 * s:.2f}".replace(".", ","), g) for name, s, g in rows]
    text = "Image Path;DMOS;group\n" + "".join(";".join(row) + "\n" for row in cells)
    (folder / "labels.csv").write_text(text)
    return folder


def call(*arguments: object) -> str:
    done = CliRunner().invoke(cli, ["eval", *map(str, arguments), "--no-progress"])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_a_run_is_evaluated_on_a_labelled_folder_and_its_report_shows_it(
    run: Path, labelled: Path
) -> None:
    said = call(
        run, "--table", labelled / "labels.csv", "--images", labelled / "photos",
        "--score-range", 0, 100, "--lower-is-better",
    )  # fmt: skip
    path = run / "predictions" / "labels-all.csv"
    table, scope = read_csv(path), read_scope(path)
    assert f"predictions: {path}" in said
    assert "direction turned; 3 images of the run's train and val parts left out" in said
    assert (scope.left_out, scope.left_out_known, scope.images) == (3, True, 20)
    assert not [name for name in table.path if str(name).startswith("shared")]
    scorer = lmcl.load(run)
    photos = [labelled / "photos" / name for name in table.path]
    quality = scorer.scale.to_unit(np.array(scorer.score(photos)))
    np.testing.assert_allclose(table.prediction, 100 - 100 * quality, atol=1e-6)
    assert f"SRCC {srcc(table.prediction, table.mos):.4f}" in said
    assert CliRunner().invoke(cli, ["report", str(run)]).exit_code == 0
    assert "labels-all" in (run / "report.html").read_text()


def test_a_model_without_a_run_gets_a_folder_that_can_be_reported(
    run: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = call(run / "model", "--table", labelled / "labels.csv", "--images", labelled / "photos")
    assert "--score-range LOW HIGH says otherwise" in said
    assert "3 images of the run's train and val parts left out" in said
    done = CliRunner().invoke(cli, ["report", "runs/eval-labels"])
    assert done.exit_code == 0, done.exception
    assert "lmcl probe" not in Path("runs/eval-labels/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--table", "labels.csv", "--part", "val"), "--part is for packed sets"),
        (("--images", "photos"), "--images needs --table FILE"),
        (("--table", "labels.csv", "--lower-is-better"), "--lower-is-better needs --score-range"),
        (("--table", "labels.csv", "--images", "elsewhere"), "labelled images are not there"),
        (("--table", "broken.csv", "--images", "broken"), "take its row out"),
    ],
)
def test_what_cannot_be_done_is_said(
    run: Path, labelled: Path, monkeypatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(labelled)
    for folder in ("elsewhere", "broken"):
        (labelled / folder).mkdir(exist_ok=True)
    (labelled / "broken" / "a.png").write_bytes(b"no image")
    (labelled / "broken.csv").write_text("path,score\na.png,3\n")
    (labelled / "elsewhere" / "other.png").write_bytes(b"x")
    done = CliRunner().invoke(cli, ["eval", str(run), *arguments], standalone_mode=False)
    assert said in str(done.exception)
