"""The raters' spread as weights: their values, their way into a run, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lmcl.cli.main import cli
from lmcl.errors import ConfigError
from lmcl.method.objective import ObjectiveConfig
from lmcl.training.rating_weights import rating_weights
from lmcl.training.soft_labels import soft_labels
from shards.build.build import build
from shards.datasets.table import open_table
from shards.read import open_set
from shards.splits.split import load_split, split_from_ids

SPLIT = "70-10-20-seed123-00"
BY_SPREAD = ObjectiveConfig(image_weight="inverse-variance")


def test_weights_are_inverse_variances_over_a_floor_and_one_on_average(demo_set: Path) -> None:
    shard_set = open_set(demo_set)
    split = load_split(shard_set, SPLIT)
    found = rating_weights(BY_SPREAD, shard_set, split)
    assert found is not None
    # Twenty simulated observers on a scale from 1 to 5.
    error = shard_set.samples.mos_std / 4 / np.sqrt(20)
    expected = 1 / (error**2 + 0.05**2)
    expected /= expected[split.train].mean()
    np.testing.assert_allclose(found[split.train], expected[split.train], rtol=1e-5)
    assert not found[split.test].any()
    single = rating_weights(
        ObjectiveConfig(image_weight="inverse-variance", ratings=1), shard_set, split
    )
    assert single[split.train].std() > 2 * found[split.train].std()


def test_equal_weights_are_none_at_all(demo_set: Path) -> None:
    shard_set = open_set(demo_set)
    assert rating_weights(ObjectiveConfig(), shard_set, load_split(shard_set, SPLIT)) is None


def train(tiny, folder: Path, *changes: str) -> list[dict[str, float]]:
    config = Path(__file__).resolve().parents[3] / "configs" / "smoke.toml"
    small = ("saliency.layers=1", "train.epochs=1", "objective.contrastive_weight=0", *changes)
    settings = [part for change in tiny.overrides(*small) for part in ("--set", change)]
    command = ["train", "--config", str(config), "--output", str(folder), "--no-progress"]
    done = CliRunner().invoke(cli, [*command, *settings], catch_exceptions=False)
    assert done.exit_code == 0
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == "step"]


def test_a_run_weighs_its_images_and_reports_the_plain_error(tiny, tmp_path: Path) -> None:
    plain = train(tiny, tmp_path / "plain")
    assert all(step["loss"] == step["l1"] for step in plain)
    weighed = train(
        tiny, tmp_path / "b", "objective.image_weight=inverse-variance", "objective.ratings=1"
    )
    assert weighed[0]["l1"] == plain[0]["l1"]
    assert weighed[0]["loss"] != weighed[0]["l1"]
    assert weighed[1]["l1"] != plain[1]["l1"]


def pack(demo_set: Path, folder: Path, deviation: Callable[[int], str]) -> Path:
    """Twenty images of the demo set with other deviations."""
    packed = open_set(demo_set)
    (folder / "images").mkdir()
    lines = ["path,score,std"]
    for id in packed.ids()[:20].tolist():
        name = f"{id}.{packed.samples.codec[id]}"
        (folder / "images" / name).write_bytes(packed.read_bytes(id))
        lines.append(f"{name},{packed.samples.mos[id]},{deviation(id)}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    table = open_table(
        folder / "labels.csv", images=folder / "images", name="own", score=packed.score
    )
    build(table, folder / "set", workers=1)
    return folder / "set"


@pytest.fixture
def without_spread(demo_set: Path, tmp_path: Path) -> Path:
    return pack(demo_set, tmp_path, lambda id: "" if id == 3 else "0.5")


@pytest.mark.parametrize(
    ("deviation", "said"),
    [
        (lambda id: "0", "has the deviation 0 for all 15 images"),
        (
            lambda id: "12.5" if id == 3 else "0.5",
            r"for 1 of the 15 images .*up to 12\.5; ids \[3\]",
        ),
    ],
    ids=["never-filled-in", "of-another-scale"],
)
def test_deviations_that_cannot_be_are_refused_for_weights_and_for_soft_labels(
    demo_set: Path, tmp_path: Path, deviation: Callable[[int], str], said: str
) -> None:
    shard_set = open_set(pack(demo_set, tmp_path, deviation))
    ids = shard_set.ids()
    split = split_from_ids(shard_set, "s", 0, (ids[:15], ids[:0], ids[15:]), note="")
    with pytest.raises(ConfigError, match=said):
        rating_weights(
            ObjectiveConfig(image_weight="inverse-variance", ratings=10), shard_set, split
        )
    with pytest.raises(ConfigError, match=said):
        soft_labels(ObjectiveConfig(), 8, shard_set, split)
    assert soft_labels(ObjectiveConfig(deviation=0.1), 8, shard_set, split) is not None


def test_a_set_that_does_not_say_is_refused_with_the_way_out(without_spread: Path) -> None:
    shard_set = open_set(without_spread)
    ids = shard_set.ids()

    def weights(train: np.ndarray, **changes: object) -> torch.Tensor | None:
        split = split_from_ids(shard_set, "s", 0, (train, ids[:0], ids[15:]), note="")
        config = ObjectiveConfig(image_weight="inverse-variance", **changes)
        return rating_weights(config, shard_set, split)

    lacking = shard_set.ids()[np.isnan(shard_set.samples.mos_std[ids])]
    assert len(lacking) == 1
    with pytest.raises(ConfigError, match=r"for 1 of the 15 images .* --std-column"):
        weights(ids[:15], ratings=10)
    rest = np.setdiff1d(ids[:15], lacking)
    with pytest.raises(ConfigError, match=r"of own is the mean of; set objective\.ratings"):
        weights(rest)
    assert weights(rest, ratings=10)[rest].tolist() == pytest.approx([1.0] * len(rest))
