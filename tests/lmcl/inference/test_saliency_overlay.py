"""`lmcl saliency` on real files: what is drawn is what training would cut."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from lmcl.cli.saliency import command
from lmcl.errors import LmclError
from lmcl.inference.saliency_overlay import draw_all, image_saliency, overlay
from lmcl.inference.scorer import open_scorer
from lmcl.models.encoder import EncoderConfig
from lmcl.models.pretrained import ModelCard, build_model, load_model, save_model
from lmcl.models.quality_model import DecoderConfig
from lmcl.models.saliency import SaliencyConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale
from shards.errors import ShardError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder of random weights whose map is 8 x 8."""
    torch.manual_seed(0)
    card = ModelCard(
        encoder=EncoderConfig(name="conv-vit", patch=8, width=48, depth=2, heads=4),
        decoder=DecoderConfig(heads=4),
        crops=CropConfig(size=32, max_side=160, evaluation=2),
        saliency=SaliencyConfig(view=64, window=4, layers=2),
        score=ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True),
        training_set="none",
        split="none",
        split_hash="",
        decode="none",
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "model", build_model(card), card)
    return folder


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A landscape that max_side halves."""
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (200, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "saliency.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_box_is_the_one_that_scoring_names(model: Path, photo: Path, tmp_path: Path) -> None:
    assert draw_all([str(photo)], model, tmp_path / "out", progress=False) == 1
    (row,) = rows(tmp_path / "out")
    box = tuple(int(row[f"box_{side}"]) for side in ("y", "x", "h", "w"))
    assert box == open_scorer(model, device="cpu").details(photo).salient


def test_the_window_is_drawn_where_the_attention_is(model: Path, photo: Path) -> None:
    pixels = np.asarray(Image.open(photo))
    seen = image_saliency(load_model(model / "model"), pixels)
    y, x = seen.window_at
    sums = [
        seen.attention[a : a + 4, b : b + 4].sum(dtype=np.float64)
        for a in range(5)
        for b in range(5)
    ]
    inside = seen.attention[y : y + 4, x : x + 4].sum(dtype=np.float64)
    assert inside == pytest.approx(max(sums))
    top, left, height, width = seen.window_box
    assert (height, width) == (50, 80)  # half of each side of the 100 x 160 frame
    assert (top, left) == (round(y * 100 / 8), round(x * 160 / 8))


def test_the_crop_shows_through_and_both_frames_stand_in_the_picture(
    model: Path, photo: Path
) -> None:
    seen = image_saliency(load_model(model / "model"), np.asarray(Image.open(photo)))
    picture = np.asarray(overlay(seen))
    assert picture.shape[1] == 160
    assert picture.shape[0] > 100  # the caption
    y, x, h, w = seen.box
    assert (picture[y, x + w // 2] == 255).all()
    top, left, _, width = seen.window_box
    edge = picture[top, left : left + width]
    assert (edge == (255, 150, 0)).all(axis=-1).any()
    original = seen.pixels.astype(int)
    likeness = np.abs(picture[:100] - original).mean(axis=-1)
    inner = np.zeros(likeness.shape, dtype=bool)
    inner[y + 4 : y + h - 4, x + 4 : x + w - 4] = True
    # Inside the crop the photograph is nearly itself, around it grey and warm.
    assert likeness[inner].mean() < 0.5 * likeness[~inner].mean()


def test_what_is_no_image_is_named_and_the_others_are_drawn(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "notes.png"
    bad.write_text("not an image")
    with pytest.raises(LmclError, match=r"2 of 3 images .*notes.png: not a readable") as error:
        draw_all(
            [str(bad), str(photo), str(tmp_path / "gone.jpg")], model, tmp_path / "out",
            progress=False,
        )  # fmt: skip
    assert error.value.exit_code == 3
    assert "gone.jpg" in str(error.value)
    assert "0x" not in str(error.value)
    assert (tmp_path / "out" / "photo.png").is_file()


def test_images_of_one_name_get_pictures_of_their_own(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    other = tmp_path / "more" / "photo.png"
    other.parent.mkdir()
    Image.new("RGB", (64, 64), "red").save(other)
    done = CliRunner().invoke(
        command,
        [str(photo), str(other), "--model", str(model), "--output", str(tmp_path / "out")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert {row["picture"] for row in rows(tmp_path / "out")} == {"photo.png", "photo-2.png"}


def test_a_photograph_smaller_than_the_crop_is_drawn(model: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 24), "blue").save(tmp_path / "small.png")
    assert draw_all([str(tmp_path / "small.png")], model, tmp_path / "out", progress=False) == 1


@pytest.mark.parametrize("size", [(1, 1), (2000, 1), (1, 2000), (3, 2)])
def test_a_photograph_of_a_few_pixels_a_side_is_drawn(
    model: Path, tmp_path: Path, size: tuple[int, int]
) -> None:
    Image.new("RGB", size, "blue").save(tmp_path / "thin.png")
    assert draw_all([str(tmp_path / "thin.png")], model, tmp_path / "out", progress=False) == 1


def test_an_output_that_is_a_file_is_refused_before_anything_is_drawn(
    model: Path, photo: Path, tmp_path: Path
) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(LmclError, match=r"--output .*taken: cannot be made a folder") as error:
        draw_all([str(photo)], model, tmp_path / "taken", progress=False)
    assert error.value.exit_code == 2


def test_a_pattern_without_a_match_is_missing_input(model: Path, tmp_path: Path) -> None:
    with pytest.raises(LmclError, match="no file matches") as error:
        draw_all([str(tmp_path / "*.jpg")], model, tmp_path / "out", progress=False)
    assert error.value.exit_code == 4


def test_an_overlay_replaces_overlays_and_no_photograph(model: Path, photo: Path) -> None:
    """With the folder of the photographs as output, an overlay has a photograph's name."""
    before = photo.read_bytes()
    with pytest.raises(ShardError, match="was not written by this command") as caught:
        draw_all([str(photo)], model, photo.parent, progress=False)
    assert caught.value.exit_code == 2
    assert photo.read_bytes() == before
    for _ in range(2):
        assert draw_all([str(photo)], model, photo.parent / "out", progress=False) == 1
