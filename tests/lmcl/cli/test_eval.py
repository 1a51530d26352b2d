"""A trained model on another set: direction, shared images, splits, and the matrix made of them."""

import csv
import io
import json
import logging
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from scipy import stats

from lmcl.cli.eval import command
from lmcl.errors import LmclError
from lmcl.evaluation.evaluate_run import Asked, evaluate_run
from lmcl.evaluation.metrics import fit_logistic
from lmcl.evaluation.predictions import read_csv
from lmcl.evaluation.scope import ON_TRAIN, ON_VAL, read_scope
from lmcl.models.training_images import TRAINING_IMAGES
from lmcl.report import write_report
from lmcl.training.setup import fit
from pipeline.errors import PipelineError
from shards.build.build import build
from shards.datasets.demo import write_demo
from shards.datasets.table import open_table
from shards.datasets.unlabelled import open_unlabelled
from shards.read import open_set
from shards.score_scale import ScoreScale
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "a"
    fit(tiny("train.epochs=1"), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def turned(tmp_path_factory, demo_set: Path) -> Path:
    """Another set beside the first: new contents, some shared images, lower = better in 0..100."""
    folder = demo_set.parent / "turned-source"
    labels = write_demo(folder, contents=4, seed=5)
    packed = open_set(demo_set)
    rows = [(r["path"], float(r["score"]), r["group"]) for r in _rows(labels)]
    images = next(folder.rglob(rows[0][0])).parent
    for id in load_split(packed, "70-10-20-seed123-00").train[:3].tolist():
        name = f"shared-{Path(packed.samples.path[id]).name}"
        (images / name).write_bytes(packed.read_bytes(id))
        rows.append((name, float(packed.samples.mos[id]), f"shared-{id}"))
    table = folder / "turned.csv"
    with table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "score", "group"])
        writer.writerows((p, round(125.0 - 25.0 * s, 4), g) for p, s, g in rows)
    shards = demo_set.parent / "turned"
    score = ScoreScale(kind="dmos", low=0.0, high=100.0, higher_is_better=False)
    dataset = open_table(table, images=images, name="turned", score=score)
    build(dataset, shards, workers=1)
    for split in make_splits(open_set(shards), repeats=2):
        write_split(shards, split)
    return shards


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_predictions_come_in_the_direction_and_range_of_the_other_set(run, turned) -> None:
    done = evaluate_run(run, Asked(data="turned"), batch_size=8, progress=False)
    found, scope, path = done.evaluation, done.scope, done.path
    table = read_csv(path)
    assert path.name == "turned-all.csv"
    np.testing.assert_allclose(table.prediction, 100.0 - 100.0 * table.prediction_unit)
    assert found.srcc == pytest.approx(stats.spearmanr(table.prediction, table.mos).statistic)
    assert (scope.tested_on, scope.trained_on) == ("turned", "demo")
    assert scope.direction == "direction turned"
    assert not scope.scale.higher_is_better


def test_images_the_model_was_trained_on_are_left_out_and_counted(run, turned) -> None:
    done = evaluate_run(run, Asked(data=str(turned)), batch_size=8, progress=False)
    found, scope, path = done.evaluation, done.scope, done.path
    assert scope.left_out == 3
    assert found.n == scope.images == 40
    assert not [p for p in read_csv(path).path if str(p).startswith("shared-")]


def test_a_protocol_of_splits_fits_on_train_and_counts_the_test_part(run, turned) -> None:
    said = CliRunner().invoke(
        command,
        [str(run), "--set", "turned", "--protocol", "70-10-20", "--no-progress"],
        catch_exceptions=False,
    )
    assert said.exit_code == 0
    assert "direction turned; 3 images of the run's train and val parts left out" in said.output
    assert "median of 10 splits: srcc" in said.output
    tree = json.loads((run / "predictions" / "turned-70-10-20.metrics.json").read_text())
    scope = tree["scope"]
    table = read_csv(run / "predictions" / "turned-70-10-20.csv")
    first = load_split(open_set(turned), "70-10-20-seed123-00")
    row = next(s for s in scope["splits"] if s["name"] == first.name)
    keep = np.isin(table.id, first.test)
    truth = stats.spearmanr(table.prediction[keep], table.mos[keep]).statistic
    assert scope["mapping"] == ON_TRAIN
    assert row["hash"] == first.hash
    assert row["n"] == int(keep.sum())
    assert row["n_fit"] == int(np.isin(table.id, first.train).sum())
    assert row["srcc"] == pytest.approx(truth)


def test_splits_of_the_own_set_are_refused_since_they_leak(run) -> None:
    with pytest.raises(LmclError, match="training images; train one run per split") as caught:
        evaluate_run(run, Asked(protocol="70-10-20"), batch_size=8, progress=False)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("how", ["spelled", "linked", "copied", "moved"])
def test_the_own_set_is_known_by_its_images_and_not_by_its_path(
    run, demo_set, tmp_path, tiny, how
) -> None:
    place = demo_set / ".." / demo_set.name
    if how == "linked":
        place = tmp_path / "link"
        place.symlink_to(demo_set)
    if how in ("copied", "moved"):
        place = tmp_path / "copy"
        shutil.copytree(demo_set, place)
    if how == "moved":
        run = Path(shutil.copytree(run, tmp_path / "run"))
        config = (run / "config.toml").read_text().replace(str(demo_set), str(tmp_path / "gone"))
        (run / "config.toml").write_text(config)
    asked = Asked(data=str(place), protocol="70-10-20")
    with pytest.raises(LmclError, match="training images; train one run per split") as caught:
        evaluate_run(run, asked, batch_size=8, progress=False)
    assert caught.value.exit_code == 2


def test_the_test_part_of_another_split_of_the_own_set_is_refused_if_it_was_learned_from(
    run,
) -> None:
    with pytest.raises(LmclError, match="learned from 0 and was chosen by 10: they are in"):
        evaluate_run(run, Asked(part="70-10-20-seed123-01"), batch_size=8, progress=False)


def test_all_images_of_the_own_set_come_with_a_warning_that_counts_those_learned_from(
    run, demo_set, caplog
) -> None:
    evaluate_run(run, Asked(part="all"), batch_size=8, progress=False)
    split = load_split(open_set(demo_set), "70-10-20-seed123-00")
    train, val = len(split.part("train")), len(split.part("val"))
    assert f"of its 60 images this run has learned from {train} (train part)" in caplog.text
    assert f"chosen by {val} (val part)" in caplog.text


def test_the_metrics_say_with_which_decoder_the_images_were_judged(run, turned) -> None:
    evaluate_run(run, Asked(data="turned"), batch_size=8, progress=False)
    tree = json.loads((run / "predictions" / "turned-all.metrics.json").read_text())
    assert tree["decode"] == json.loads((run / "protocol.json").read_text())["decode"]
    assert tree["decode"].startswith(("dali-", "torch-"))


def test_a_set_without_scores_is_judged_and_its_missing_figures_explained(
    run, demo_set, tmp_path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    packed = open_set(demo_set)
    for id in range(4):
        (images / Path(packed.samples.path[id]).name).write_bytes(packed.read_bytes(id) + b"x")
    build(open_unlabelled(images), tmp_path / "bare", workers=1)
    asked = [str(run), "--set", str(tmp_path / "bare"), "--no-progress"]
    said = CliRunner().invoke(command, asked, catch_exceptions=False)
    assert said.exit_code == 0
    assert "SRCC and PLCC are not defined: no image has a score" in said.output
    assert "4 of the 4 evaluated images have no score in the set" in said.output
    assert len(read_csv(run / "predictions" / "unlabelled-all.csv")) == 4


def test_a_mapping_fitted_on_val_judges_the_test_part_and_the_report_says_so(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    said = CliRunner().invoke(command, [str(copy), "--fit-on", "val", "--no-progress"])
    assert said.exit_code == 0, said.output
    val, test = (read_csv(copy / "predictions" / f"{name}.csv") for name in ("val", "test"))
    fit = fit_logistic(val.prediction, val.mos)
    rmse = float(np.sqrt(np.mean((fit(test.prediction) - test.mos) ** 2)))
    write_report([copy], copy)
    found = json.loads((copy / "results.json").read_text())["runs"][0]["evaluation"]
    words = f"fitted on {len(val)} images of the val part of 70-10-20-seed123-00"
    assert (found["fit_on"], found["fit4"]["centre"]) == ("val", pytest.approx(fit.centre))
    assert found["rmse_fit4"] == pytest.approx(rmse, rel=1e-4)
    assert rmse != pytest.approx(_rmse_fitted_on_itself(test), rel=1e-3)
    assert words in said.output
    for name in ("report.html", "report.md", "results.json"):
        assert words in (copy / name).read_text()


def test_judging_a_part_again_keeps_the_salient_boxes_of_training(run, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    before = read_csv(copy / "predictions" / "test.csv")
    evaluate_run(copy, Asked(fit_on="val"), batch_size=8, progress=False)
    after = read_csv(copy / "predictions" / "test.csv")
    assert np.all(before.h > 0)
    for name in ("y", "x", "h", "w"):
        assert np.array_equal(getattr(before, name), getattr(after, name))


def test_a_split_of_another_set_gives_the_part_the_mapping_is_fitted_on(run, turned) -> None:
    split = load_split(open_set(turned), "70-10-20-seed123-00")
    asked = Asked(data="turned", part=split.name, fit_on="train")
    done = evaluate_run(run, asked, batch_size=8, progress=False)
    found, scope, path = done.evaluation, done.scope, done.path
    assert set(read_csv(path).id) <= set(split.test.tolist())
    assert scope.fitted is not None
    shared = [p for p in open_set(turned).samples.path[split.train] if p.startswith("shared-")]
    assert scope.fitted.n == len(split.train) - len(shared)
    assert found.fit_on == "train"


def test_splits_of_another_set_can_be_fitted_on_their_val_parts(run, turned) -> None:
    asked = Asked(data="turned", protocol="70-10-20", fit_on="val")
    scope = evaluate_run(run, asked, batch_size=8, progress=False).scope
    first = load_split(open_set(turned), "70-10-20-seed123-00")
    row = next(s for s in scope.splits if s.name == first.name)
    assert scope.mapping == ON_VAL
    assert row.n_fit == len([i for i in first.val if i in set(_judged_ids(run))])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (Asked(data="turned", fit_on="val"), "so it has no val part; evaluate one split"),
        (Asked(part="all", fit_on="train"), "so it has no train part"),
        (Asked(data="turned", protocol="80-20", fit_on="val"), "no image in its val part"),
    ],
    ids=["whole-set", "all", "no-val"],
)
def test_a_part_that_is_not_there_to_fit_on_is_refused_with_the_way_out(
    run, turned, asked, words
) -> None:
    with pytest.raises(LmclError, match=words) as caught:
        evaluate_run(run, asked, batch_size=8, progress=False)
    assert caught.value.exit_code == 2


def _judged_ids(run: Path) -> list[int]:
    return read_csv(run / "predictions" / "turned-70-10-20.csv").id.tolist()


def _rmse_fitted_on_itself(test) -> float:
    mapped = fit_logistic(test.prediction, test.mos)(test.prediction)
    return float(np.sqrt(np.mean((mapped - test.mos) ** 2)))


def test_the_matrix_states_sets_direction_and_mapping(run, turned, tmp_path, tiny) -> None:
    other = tmp_path / "b"
    fit(tiny(f"data.root='{turned}'", "train.epochs=1"), other, progress=False)
    own = str(run.parent / "a")
    evaluate_run(Path(own), Asked(data="turned"), batch_size=8, progress=False)
    evaluate_run(other, Asked(data="shards"), batch_size=8, progress=False)
    write_report([run, other], tmp_path / "out")
    tree = json.loads((tmp_path / "out" / "results.json").read_text())
    cells = {(e["trained_on"], e["column"]): e for e in tree["comparison"]["matrix"]}
    assert {("demo", "demo"), ("demo", "turned"), ("turned", "turned"), ("turned", "demo")} <= set(
        cells
    )
    assert cells["demo", "turned"]["direction"] == "direction turned"
    assert cells["demo", "turned"]["left_out"] == 3
    assert cells["turned", "turned"]["own"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "DMOS 0 to 100, lower is better" in page
    assert "from demo: direction turned" in page
    assert "| demo (a) | turned |" in (tmp_path / "out" / "report.md").read_text()


def test_both_decoders_without_a_gpu_are_refused_before_the_first_pass(run: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(PipelineError, match=r"no CUDA GPU.*\"cpu\"") as error:
        evaluate_run(run, Asked(decode="both"), batch_size=8, progress=False)
    assert error.value.exit_code == 2
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_the_decoder_is_said_and_another_than_the_trainings_is_a_warning(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    card = copy / "model" / "config.json"
    tree = json.loads(card.read_text())
    caplog.set_level(logging.INFO)
    evaluate_run(copy, Asked(), batch_size=8, progress=False)
    assert re.search(r"device cpu .*, decode (dali-cpu|torch-pillow)-", caplog.text)
    assert "--decode both" not in caplog.text
    card.write_text(json.dumps(tree | {"decode": "dali-gpu-2.4"}))
    evaluate_run(copy, Asked(), batch_size=8, progress=False)
    assert "trained on images decoded by dali-gpu-2.4" in caplog.text


@pytest.mark.parametrize(
    ("options", "part", "words"),
    [
        ([], "test", ""),
        (["--part", "val"], "val", ""),
        (["--split", "val"], "val", "--part val"),
    ],
)
def test_a_part_is_named_by_part_and_the_old_spelling_is_understood(
    run: Path, options: list[str], part: str, words: str
) -> None:
    done = CliRunner().invoke(command, [str(run), *options, "--no-progress"])
    assert done.exit_code == 0, done.output
    assert f"{part}: SRCC" in done.output
    assert words in done.output


def test_a_run_in_bf16_is_evaluated_in_it_and_what_emulation_costs_is_said(
    run, tmp_path, monkeypatch, caplog
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    config = copied / "config.toml"
    config.write_text(config.read_text().replace('precision = "no"', 'precision = "bf16"', 1))
    monkeypatch.setattr("lmcl.models.precision.bfloat16_unit", lambda device: "")
    caplog.set_level("INFO")
    done = evaluate_run(copied, Asked(part="test"), batch_size=8, progress=False)
    assert "networks bf16 (as asked)" in caplog.text
    assert re.search(r"emulates it: one batch of 4 crops took \d+\.\d times", caplog.text)
    assert done.evaluation.n > 0


@pytest.fixture
def moved_run(run: Path, tmp_path: Path, demo_set: Path) -> Path:
    """The run where its set is no more."""
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    config = (copy / "config.toml").read_text().replace(str(demo_set), str(tmp_path / "gone"))
    (copy / "config.toml").write_text(config)
    return copy


def test_shared_images_are_left_out_where_the_training_set_is_gone(moved_run, turned) -> None:
    scope = evaluate_run(moved_run, Asked(data=str(turned)), batch_size=8, progress=False).scope
    assert (scope.left_out, scope.left_out_known) == (3, True)


def test_a_model_that_does_not_list_its_images_says_so_where_its_set_is_gone(
    moved_run, turned
) -> None:
    (moved_run / "model" / TRAINING_IMAGES).unlink()
    said = CliRunner().invoke(
        command, [str(moved_run), "--set", str(turned), "--no-progress"], catch_exceptions=False
    )
    assert "training set is not here, so shared images were not looked for" in said.output


def test_another_set_of_the_same_names_is_another_set(run, demo_set, tmp_path) -> None:
    packed = open_set(demo_set)
    images = tmp_path / "images"
    for id in packed.ids().tolist():
        path = images / packed.samples.path[id]
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.open(io.BytesIO(packed.read_bytes(id)))
        picture.transpose(Image.Transpose.ROTATE_90).save(path, picture.format)
    rows = "".join(f"{path},{4 - id % 4}\n" for id, path in enumerate(packed.samples.path))
    (tmp_path / "labels.csv").write_text(f"path,score\n{rows}")
    dataset = open_table(tmp_path / "labels.csv", images=images, name="demo", score=packed.score)
    build(dataset, tmp_path / "shards", workers=1)
    assert open_set(tmp_path / "shards").manifest.ids_sha256 == packed.manifest.ids_sha256
    said = CliRunner().invoke(
        command, [str(run), "--set", str(tmp_path / "shards"), "--no-progress"]
    )
    assert said.exit_code == 0, said.output
    assert "trained on demo" in said.output
    scope = read_scope(run / "predictions" / "demo-all.csv")
    assert scope.is_across
    assert scope.images == len(packed.ids())
    write_report([run], run)
    assert "demo-all" in (run / "report.html").read_text()
