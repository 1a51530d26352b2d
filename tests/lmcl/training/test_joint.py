"""Runs that learn from several sets, through the main command: `lmcl train`, `eval`, `score`."""

import csv
import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats

from kernels import manifold_contrastive_loss
from lmcl.cli.main import cli
from lmcl.config import Config, dump_config, parse_config
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.data import open_data
from lmcl.evaluation.predictions import read_csv
from lmcl.models.pretrained import load_model
from lmcl.report import write_report
from lmcl.training.checkpoint import list_checkpoints, load_tensors
from lmcl.training.setup import fit, prepare
from lmcl.training.signals import InterruptedRunError
from lmcl.training.trainer import Trainer
from shards.build.build import build
from shards.datasets.demo import write_demo
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.read import open_set
from shards.score_scale import ScoreScale
from shards.splits.draw import make_splits
from shards.splits.split import load_split, split_from_ids, write_split

SPLIT = "70-10-20-seed123-00"
TURNED = ScoreScale(kind="dmos", low=0.0, high=100.0, higher_is_better=False)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty other pictures, whose scores run from 100 (bad) to 0."""
    folder = tmp_path_factory.mktemp("turned")
    labels = write_demo(folder / "images", contents=4, seed=5)
    with labels.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    table = folder / "turned.csv"
    with table.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["path", "score", "group"])
        writer.writerows(
            (row["path"], round(125.0 - 25.0 * float(row["score"]), 4), row["group"])
            for row in rows
        )
    images = next((folder / "images").rglob(rows[0]["path"])).parent
    shards = folder / "shards"
    build(open_table(table, images=images, name="turned", score=TURNED), shards, workers=1)
    for split in make_splits(open_set(shards), repeats=2):
        write_split(shards, split)
    return shards


def sets_of(*roots: Path, split: str = SPLIT) -> str:
    return "data.sets=[" + ", ".join(f'{{root="{r}", split="{split}"}}' for r in roots) + "]"


@pytest.fixture(scope="module")
def joint(tiny, demo_set: Path, turned: Path):
    """Makes configurations of runs on both sets."""

    def make(*changes: str) -> Config:
        return tiny("data.root=''", "data.split=''", sets_of(demo_set, turned), *changes)

    return make


@pytest.fixture(scope="module")
def run(joint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint") / "run"
    fit(joint(), folder, progress=False)
    return folder


def log_of(run: Path, event: str) -> list[dict]:
    lines = (json.loads(line) for line in (run / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def same_weights(one: Path, other: Path) -> bool:
    left, right = (
        load_tensors(list_checkpoints(f / "checkpoints")[0])["student"] for f in (one, other)
    )
    return left.keys() == right.keys() and all(left[n].equal(right[n]) for n in left)


def test_the_command_trains_on_two_sets_and_says_how_it_does_on_each(
    tiny, demo_set: Path, turned: Path, tmp_path: Path
) -> None:
    changes = [*tiny.overrides("saliency.layers=1", "train.epochs=1"), "data.root=", "data.split="]
    asked = [word for change in [*changes, sets_of(demo_set, turned)] for word in ("--set", change)]
    output = tmp_path / "run"
    done = CliRunner().invoke(
        cli, ["train", "--config", "smoke", *asked, "--output", str(output), "--no-progress"]
    )
    assert done.exit_code == 0, done.output
    metrics = json.loads((output / "metrics.json").read_text())
    for name in ("demo", "turned"):
        assert f"{name}: SRCC {metrics['sets'][name]['srcc']:.4f}" in done.output
    mean = np.mean([one["srcc"] for one in metrics["sets"].values()])
    assert f"mean over 2 sets: SRCC {mean:.4f}" in done.output
    assert metrics["mean_over_sets"]["srcc"] == pytest.approx(mean)


def test_dry_run_states_sets_scales_shares_and_steps(
    tiny, demo_set: Path, turned: Path, tmp_path: Path
) -> None:
    changes = [*tiny.overrides("saliency.layers=1", "data.share_exponent=0"), "data.root="]
    changes += ["data.split=", sets_of(demo_set, turned)]
    asked = [word for change in changes for word in ("--set", change)]
    done = CliRunner().invoke(
        cli,
        ["train", "--config", "smoke", *asked, "--output", str(tmp_path / "x"), "--dry-run"],
    )
    assert done.exit_code == 0, done.output
    assert (
        "demo (MOS 1 to 5, higher is better): train 40, val 10, test 10; 20 images" in done.output
    )
    assert "turned (DMOS 0 to 100, lower is better): train 20" in done.output
    assert "2 epochs x 4 steps x 12 images" in done.output
    assert not (tmp_path / "x").exists()


def test_each_sets_predictions_stand_in_its_own_unit_scale(run: Path, joint) -> None:
    table = read_csv(run / "predictions" / "test.csv")
    assert set(table.subset) == {"demo", "turned"}
    joined, split = open_data(joint().data)
    assert np.array_equal(np.sort(table.id), split.test)
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("demo", "turned"):
        own = table.subset == name
        found = stats.spearmanr(table.prediction[own], table.mos[own])[0]
        # A set whose scores fall is turned round: so are both columns of its figures.
        assert metrics["sets"][name]["srcc"] == pytest.approx(found)
    truth = open_set(joined.sets[1].root)
    raw = 100 * (1 - table.mos[table.subset == "turned"])
    rows = table.id[table.subset == "turned"] - len(joined.sets[0].samples)
    assert truth.samples.mos[rows] == pytest.approx(raw)


def test_an_epoch_is_chosen_by_the_mean_over_the_sets(run: Path) -> None:
    for entry in log_of(run, "epoch"):
        assert entry["val_srcc"] == pytest.approx(np.mean(list(entry["val_sets"].values())))
    assert "mean over the sets" in json.loads((run / "protocol.json").read_text())["selection"]


def test_the_report_shows_each_set(run: Path, tmp_path: Path) -> None:
    write_report([run], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"\| turned \|", text)
    assert re.search(r"\| demo \|", text)


def test_evaluating_one_of_the_sets_takes_its_own_part_and_scale(run: Path, turned: Path) -> None:
    done = CliRunner().invoke(cli, ["eval", str(run), "--set", str(turned), "--no-progress"])
    assert done.exit_code == 0, done.output
    table = read_csv(run / "predictions" / "turned-test.csv")
    assert np.array_equal(table.id, load_split(open_set(turned), SPLIT).test)
    together = read_csv(run / "predictions" / "test.csv")
    unit = together.prediction[together.subset == "turned"]
    assert table.prediction == pytest.approx(100 * (1 - unit), abs=1e-3)


def test_evaluating_the_run_again_gives_the_figures_of_its_end(run: Path) -> None:
    before = json.loads((run / "metrics.json").read_text())["sets"]
    done = CliRunner().invoke(cli, ["eval", str(run), "--no-progress"])
    assert done.exit_code == 0, done.output
    after = json.loads((run / "predictions" / "test.metrics.json").read_text())["sets"]
    assert after["turned"]["srcc"] == pytest.approx(before["turned"]["srcc"])
    assert after["turned"]["rmse_raw"] == pytest.approx(before["turned"]["rmse_raw"], rel=1e-4)


def test_scores_are_on_the_shared_scale_or_on_a_sets(
    run: Path, turned: Path, tmp_path: Path
) -> None:
    def scores(*more: str) -> dict[str, float]:
        file = tmp_path / f"scores{len(more)}.csv"
        words = ["score", str(turned), "--model", str(run), "--output", str(file), *more]
        done = CliRunner().invoke(cli, [*words, "--no-progress"])
        assert done.exit_code == 0, done.output
        with file.open(newline="") as lines:
            return {row["path"]: float(row["score"]) for row in csv.DictReader(lines)}

    shared, own = scores(), scores("--scale", "turned")
    scales = load_model(run / "model").model.scales
    slope, offset = scales.log_slope.exp().item(), scales.offset.item()
    for path, value in shared.items():
        assert own[path] == pytest.approx(100 * (0.5 - offset - slope * (value - 0.5)), abs=0.01)


def test_a_scale_that_the_model_does_not_have_is_refused(run: Path, tmp_path: Path) -> None:
    words = ["score", str(tmp_path), "--model", str(run), "--scale", "livec"]
    done = CliRunner().invoke(cli, [*words, "--output", str(tmp_path / "s.csv")])
    assert isinstance(done.exception, LmclError)
    assert done.exception.exit_code == 2
    assert "it has those of demo, turned" in str(done.exception)


def test_the_model_folder_says_which_sets_and_scales(run: Path) -> None:
    card = load_model(run / "model").card
    assert [one.name for one in card.sets] == ["demo", "turned"]
    assert card.sets[1].score == TURNED
    assert (card.score.low, card.score.high) == (0.0, 1.0)
    assert "--scale NAME" in (run / "model" / "README.md").read_text()


def test_one_set_in_the_list_is_that_set_alone(tiny, demo_set: Path, tmp_path: Path) -> None:
    fit(tiny("train.epochs=1"), tmp_path / "root", progress=False)
    alone = tiny("data.root=''", "data.split=''", sets_of(demo_set), "train.epochs=1")
    fit(alone, tmp_path / "sets", progress=False)
    assert same_weights(tmp_path / "root", tmp_path / "sets")
    figures = [(tmp_path / n / "metrics.json").read_bytes() for n in ("root", "sets")]
    assert figures[0] == figures[1]


def test_a_joint_run_that_stops_goes_on_bit_for_bit(
    joint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = joint("data.share_exponent=0.5", "evaluation.select=last")
    fit(config, tmp_path / "whole", progress=False)
    step, taken = Trainer.step, []

    def stopping(self: Trainer, batch):
        taken.append(batch.step)
        self.stop.requested = len(taken) == 3
        return step(self, batch)

    monkeypatch.setattr(Trainer, "step", stopping)
    with pytest.raises(InterruptedRunError):
        fit(config, tmp_path / "stopped", progress=False)
    monkeypatch.undo()
    fit(config, tmp_path / "stopped", resume="auto", progress=False)
    assert same_weights(tmp_path / "whole", tmp_path / "stopped")


def test_lines_begin_at_the_moments_of_the_train_scores_and_learn(joint, tmp_path: Path) -> None:
    trainer = prepare(joint(), tmp_path / "run", resume="", progress=False)
    joined, train = trainer.shard_set, trainer.split.train
    mos, number = joined.unit_mos()[train], joined.set_of(train)
    scales = trainer.core.scales
    slope = mos[number == 1].std() / mos[number == 0].std()
    assert scales.log_slope.exp().item() == pytest.approx(slope, rel=1e-5)
    before = scales.offset.detach().clone()
    trainer.run_saliency_pass(0)
    trainer.train_epoch(0)
    trainer.close()
    assert not scales.offset.equal(before)


def test_negatives_are_of_the_own_set_unless_asked_for(joint, tmp_path: Path) -> None:
    found = {}
    for across in (False, True):
        config = joint(f"objective.across_sets={str(across).lower()}")
        trainer = prepare(config, tmp_path / str(across), resume="", progress=False)
        trainer.run_saliency_pass(0)
        batch = next(iter(trainer.loader.epoch(0, saliency=trainer.progress.saliency)))
        seen = trainer.grad_cache.forward(batch)
        found[across] = float(trainer.compute_loss(batch, seen).contrastive)
        trainer.close()
    crops = seen.output.embedding.detach().reshape(len(batch.ids), 4, -1)

    def contrast(rows: torch.Tensor) -> float:
        own, ids = crops[rows], batch.ids[rows].repeat_interleave(3)
        return float(
            manifold_contrastive_loss(
                own[:, :3].flatten(0, 1), own[:, 3], ids, temperature=0.1, gather=False
            ).loss
        )

    apart = sum(len(rows) * contrast(rows) for rows in batch.sets.rows) / batch.images
    assert all(len(rows) > 1 for rows in batch.sets.rows)
    assert found[False] == pytest.approx(apart, rel=1e-5)
    assert found[True] == pytest.approx(contrast(torch.arange(batch.images)), rel=1e-5)


def test_a_set_without_a_val_part_is_named(joint, tiny, demo_set, turned, tmp_path) -> None:
    opened = open_set(turned)
    whole = load_split(opened, SPLIT)
    parts = [np.concatenate([whole.train, whole.val]), whole.val[:0], whole.test]
    split = split_from_ids(opened, "no-val", 0, parts, note="")
    write_split(tmp_path, split)
    sets = (
        f'data.sets=[{{root="{demo_set}", split="{SPLIT}"}}, '
        f'{{root="{turned}", split="{tmp_path}/splits/no-val.json"}}]'
    )
    with pytest.raises(ConfigError, match="turned: its val part is empty"):
        fit(tiny("data.root=''", "data.split=''", sets), tmp_path / "run", progress=False)


def test_two_sets_of_one_name_are_refused_with_the_way_out(tiny, demo_set, tmp_path) -> None:
    config = tiny("data.root=''", "data.split=''", sets_of(demo_set, demo_set))
    with pytest.raises(ShardError, match=r"called 'demo'.*name = .demo-2"):
        fit(config, tmp_path / "run", progress=False)


def test_an_image_in_unlike_parts_of_two_sets_is_refused(tiny, demo_set, tmp_path) -> None:
    sets = (
        f'data.sets=[{{root="{demo_set}", split="70-10-20-seed123-00"}}, '
        f'{{root="{demo_set}", split="70-10-20-seed123-01", name="again"}}]'
    )
    config = tiny("data.root=''", "data.split=''", sets)
    with pytest.raises(
        ShardError, match=r"images are in the \w+ part of one set.*reshard"
    ) as error:
        fit(config, tmp_path / "run", progress=False)
    assert error.value.exit_code == 3
    assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.root=x"], "data.sets and data.root = 'x'"),
        (["data.share_exponent=2"], "data.share_exponent must be a number <= 1"),
        (["evaluation.probe=always"], "evaluation.probe = 'always'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(joint, changes, words) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        joint(*changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["data.share_exponent=0.5"], "shares an epoch between several sets"),
        (["objective.across_sets=true"], "data.sets does not name several"),
        (["data.root=''"], "data.root is missing"),
    ],
)
def test_settings_of_joint_runs_are_refused_in_others(tiny, changes, words) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        tiny(*changes)


def test_a_key_that_no_set_has_is_refused(joint) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data.sets.0.splits'.*'split'"):
        joint('data.sets=[{root="a", splits="b"}]')


def test_sets_are_written_whole_and_without_credentials(joint) -> None:
    config = joint('data.sets=[{root="s3://me:secret@host/a", split="x"}, {root="b", split="y"}]')
    text = dump_config(config)
    assert "secret" not in text
    assert parse_config(tomllib.loads(text), where="x").data.sets[1] == config.data.sets[1]
