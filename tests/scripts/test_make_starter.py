"""The starter is what a run learned, without the stem, in half precision."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lmcl.config import load_config
from lmcl.evaluation.calibration import read_meaning
from lmcl.models.named import STARTER_FOLDER
from lmcl.models.pretrained import build_model, load_model, save_model
from lmcl.models.training_images import (
    TrainingImages,
    read_training_images,
    sketch_images,
    write_training_images,
)
from lmcl.training.setup import fit
from shards.build.build import build
from shards.datasets.demo import open_demo, write_demo
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import write_split
from tests.lmcl.conftest import ConfigMaker

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("maker", REPO / "scripts" / "make_starter.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_released_run_is_small_and_is_whole_again_when_opened(
    maker: ModuleType, tmp_path: Path
) -> None:
    config = load_config("starter")
    card = replace(load_model(REPO / "lmcl" / "starter").card, stem_weights="")
    decoder = replace(config.decoder, damage=maker.WIDTH)
    assert (card.decoder, card.crops) == (decoder, config.crops)
    torch.manual_seed(3)
    model = build_model(card)
    save_model(tmp_path / "run", model, card)
    hashes = np.random.default_rng(0).integers(0, 256, (3, 32), dtype=np.uint8)
    seen = TrainingImages(learned=sketch_images(hashes), selected=sketch_images(hashes[:0]))
    write_training_images(tmp_path / "run", seen)
    maker.release(tmp_path / "run", tmp_path / "starter")

    assert read_training_images(tmp_path / "starter") == seen
    stored = load_file(tmp_path / "starter" / "model.safetensors")
    assert not any(name.startswith("encoder.stem.layers.") for name in stored)
    assert {value.dtype for value in stored.values()} == {torch.float16}
    opened = load_model(tmp_path / "starter")
    assert opened.card.stem_weights == config.encoder.weights
    state = opened.model.state_dict()
    for name, value in stored.items():
        assert torch.equal(state[name], value.float()), name
    # Not the random ones of the run: those that the package brings.
    assert not torch.equal(
        state["encoder.stem.layers.conv_stem.weight"],
        model.state_dict()["encoder.stem.layers.conv_stem.weight"],
    )


def test_the_starter_says_which_photographs_it_has_seen() -> None:
    seen = read_training_images(STARTER_FOLDER)
    assert seen is not None
    assert (seen.learned.count, seen.selected.count, seen.knows_all) == (2400, 0, True)


@pytest.mark.slow
def test_scores_are_placed_by_the_model_and_their_errors_taken_from_the_one_that_held_out(
    maker: ModuleType, tmp_path: Path
) -> None:
    labels = write_demo(tmp_path / "images", contents=6)
    build(open_demo(labels.parent), tmp_path / "shards", workers=1)
    for split in make_splits(open_set(tmp_path / "shards"), repeats=1):
        write_split(tmp_path / "shards", split)
    tiny = ConfigMaker(tmp_path / "shards")
    for seed in (0, 1):
        fit(tiny("train.epochs=1", f"train.seed={seed}"), tmp_path / f"{seed}", progress=False)

    found, neighbours = maker.calibration(tmp_path / "0", tmp_path / "1")
    own, other = (read_meaning(tmp_path / name / "model") for name in "01")
    assert own is not None
    assert other is not None
    assert found.population == pytest.approx(own.calibration.population)
    assert found.population != pytest.approx(other.calibration.population)
    assert found.intervals == other.calibration.intervals
    assert found.distances == other.calibration.distances
    np.testing.assert_allclose(neighbours, own.neighbours, atol=1e-3)


@pytest.mark.slow
def test_a_damage_head_is_added_once_and_leaves_what_the_model_learned_as_it_was(
    maker: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = write_demo(tmp_path / "images", contents=6)
    build(open_demo(labels.parent), tmp_path / "shards", workers=1)
    for split in make_splits(open_set(tmp_path / "shards"), repeats=1):
        write_split(tmp_path / "shards", split)
    small = ("encoder.name='squeezenet-vit'", "encoder.frozen=13", "encoder.patch=32")
    sizes = ("crops.size=64", "saliency.view=64", "train.epochs=1")
    fit(ConfigMaker(tmp_path / "shards")(*small, *sizes), tmp_path / "run", progress=False)
    folder = tmp_path / "run" / "model"
    before, seen = load_file(folder / "model.safetensors"), read_training_images(folder)
    monkeypatch.setattr(maker, "DAMAGED", 2)
    maker.learn_damage(folder, tmp_path / "shards", "70-10-20-seed123-00", seed=0)
    after, written = load_file(folder / "model.safetensors"), folder.stat().st_ino
    maker.learn_damage(folder, tmp_path / "shards", "70-10-20-seed123-00", seed=0)
    assert folder.stat().st_ino == written
    assert {name for name in after if name not in before} == {
        *("damage.0.weight", "damage.0.bias", "damage.2.weight", "damage.2.bias")
    }
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert load_model(folder).card.decoder.damage == maker.WIDTH
    assert read_training_images(folder) == seen
