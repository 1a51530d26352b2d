import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lmcl
from lmcl.errors import LmclError
from lmcl.inference.scorer import MOST_PIXELS, Scorer, load
from lmcl.models.encoder import EncoderConfig
from pipeline.boxes import CropConfig
from shards import ScoreScale

VIT = EncoderConfig(name="vit_tiny_patch16_224", width=48, depth=2, heads=3)


def test_the_three_lines_of_the_readme(model_folder: Path, photos: Path) -> None:
    model = lmcl.load(model_folder, device="cpu")
    score = model.score(photos / "img.00.jpg")
    assert isinstance(score, float)
    assert model.scale_label == "demo mos 0..100"
    assert model.scale.higher_is_better


def test_path_bytes_pil_array_and_tensor_of_one_image_score_the_same(scorer, photos) -> None:
    file = photos / "a b" / "0 (1).png"
    image = Image.open(file)
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    forms = [file, str(file), file.read_bytes(), image, array, tensor, tensor.float() / 255]
    scores = scorer.score(forms)
    assert len(set(scores)) == 1
    assert scores[0] == scorer.score(file)
    image.close()


def _picture(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (10, 13, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((120, 90), Image.Resampling.BICUBIC)


def _saved(image: Image.Image, format: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(_picture(3), "JPEG", exif=exif)


LEVELS = np.arange(90 * 120, dtype=np.uint16).reshape(90, 120)
STILL = {
    "exif-6": _turned(),
    "grey-16": _saved(Image.fromarray(LEVELS * 6), "PNG"),
    "grey-16-tiff": _saved(Image.fromarray(LEVELS * 6), "TIFF"),
    "alpha": _saved(_picture(3).convert("RGBA"), "PNG"),
    "cmyk": _saved(_picture(3).convert("CMYK"), "JPEG"),
    "palette": _saved(_picture(3).quantize(16), "GIF"),
}


@pytest.mark.parametrize("name", STILL)
def test_an_image_that_pillow_opened_scores_as_its_file_does(scorer, name) -> None:
    with Image.open(io.BytesIO(STILL[name])) as image:
        size = image.size
        assert scorer.score(image) == scorer.score(STILL[name])
        assert image.size == size


FRAMES = {"save_all": True, "append_images": [_picture(4)]}
UNSCORABLE = {
    "an animation of 2 frames": _saved(_picture(3), "GIF", **FRAMES),
    "a document of 2 pages": _saved(_picture(3), "TIFF", **FRAMES),
    r"32 bits \(float\)": _saved(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"),
    r"32 bits \(integer\)": _saved(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
}


@pytest.mark.parametrize("message", UNSCORABLE)
def test_what_has_no_one_meaning_is_refused_as_file_and_as_image(scorer, message) -> None:
    data = UNSCORABLE[message]
    with pytest.raises(LmclError, match=message):
        scorer.score(data)
    with Image.open(io.BytesIO(data)) as image, pytest.raises(LmclError, match=message):
        scorer.score(image)


def test_a_damaged_file_that_pillow_opened_is_a_sentence(scorer) -> None:
    data = _saved(_picture(3), "PNG")
    message = "not an image this project can read"
    with Image.open(io.BytesIO(data[:999])) as image, pytest.raises(LmclError, match=message):
        scorer.score(image)


@pytest.mark.parametrize("batch_images", [1, 3, 16])
def test_an_image_scores_the_same_alone_and_in_any_company(scorer, photos, batch_images) -> None:
    files = sorted(photos.rglob("*.*"))
    other = Scorer(_released(scorer), device="cpu")
    other.batch_images = batch_images
    together = other.score(files)
    backwards = other.score(files[::-1])[::-1]
    alone = [other.score(f) for f in files]
    if batch_images == 1:
        assert together == alone == backwards
    reference = np.array([scorer.score(f) for f in files])
    for found in (together, alone, backwards):
        assert np.max(np.abs(np.array(found) - reference)) <= 1e-5 * 100


def test_the_score_does_not_depend_on_the_number_of_threads(scorer, photos) -> None:
    file, before = photos / "img.01.jpg", torch.get_num_threads()
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(scorer.score(file))
    torch.set_num_threads(before)
    assert abs(found[0] - found[1]) <= 1e-5 * 100


@pytest.mark.parametrize("encoder", [None, VIT], ids=["conv-vit", "timm"])
def test_bfloat16_stays_near_float32_and_repeats_exactly(
    tmp_path, make_model, photos, encoder
) -> None:
    folder = make_model(tmp_path / "m", **({"encoder": encoder} if encoder else {}))
    files = sorted(photos.glob("*.jpg"))
    exact = load(folder, device="cpu")
    fast = load(folder, device="cpu", precision="bfloat16")
    scores = fast.score(files)
    assert scores == [fast.score(f) for f in files]
    assert scores != exact.score(files)
    np.testing.assert_allclose(scores, exact.score(files), atol=2.0)  # of a range of 100
    assert fast.details(files[0]).salient is not None


def test_a_dmos_model_answers_in_its_own_direction(tmp_path, make_model, photos, scorer) -> None:
    score = ScoreScale(kind="dmos", low=0.0, high=1.0, higher_is_better=False)
    turned = load(make_model(tmp_path / "m", score=score), device="cpu")
    file = photos / "img.00.jpg"
    assert turned.score(file) == pytest.approx(1.0 - scorer.score(file) / 100.0)
    assert turned.details(file).quality == pytest.approx(scorer.details(file).quality)


def test_details_give_crops_boxes_and_the_salient_crop_inside_the_image(scorer, photos) -> None:
    found = scorer.details(photos / "img.02.jpg")
    assert len(found.crops) == len(found.boxes) == 5
    assert found.score == pytest.approx(np.mean(found.crops))
    assert found.salient is not None
    y, x, h, w = found.salient
    assert (h, w) == (64, 64)
    assert 0 <= y <= 90 - 64
    assert 0 <= x <= 120 - 64


def test_seeded_crops_depend_on_the_file_and_on_nothing_else(tmp_path, make_model, photos) -> None:
    crops = CropConfig(size=64, random=3, evaluation=4, evaluation_layout="seeded")
    model = load(make_model(tmp_path / "m", crops=crops), device="cpu")
    (tmp_path / "copy.jpg").write_bytes((photos / "img.03.jpg").read_bytes())
    assert model.score(photos / "img.03.jpg") == model.score(tmp_path / "copy.jpg")


@pytest.mark.parametrize("size", [(32, 32), (1, 1), (5, 900)], ids=str)
def test_images_smaller_than_a_crop_are_scored(scorer, size) -> None:
    assert np.isfinite(scorer.score(np.full((*size, 3), 77, np.uint8)))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 4, 4), r"shape \[3, h, w\]"),
        (torch.full((3, 4, 4), 2.0), r"lies in \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), r"lies in \[0, 1\], without NaN"),
        (torch.full((3, 4, 4), 256, dtype=torch.int32), r"lies in 0..255, got 256..256"),
        (torch.full((3, 4, 4), -1, dtype=torch.int64), r"lies in 0..255, got -1..-1"),
        (torch.ones(3, 4, 4, dtype=torch.bool), "bytes or floats"),
        (torch.zeros(3, 0, 4), "bytes or floats"),
        (np.zeros((4, 4), np.uint8), r"shape \[h, w, 3\]"),
        (np.zeros((4, 4, 3), np.float64), "uint8"),
    ],
)
def test_arrays_of_another_meaning_are_refused(scorer, image, message) -> None:
    with pytest.raises(ValueError, match=message):
        scorer.score(image)


def test_files_that_cannot_be_scored_say_why(scorer, mixed, tmp_path) -> None:
    folder, bad = mixed
    for name in bad:
        with pytest.raises(LmclError):
            scorer.score(folder / name)
    with pytest.raises(LmclError, match="animation of 3 frames"):
        scorer.score(folder / "moving.gif")
    with pytest.raises(LmclError, match="there is no such file") as caught:
        scorer.score(tmp_path / "nowhere.jpg")
    assert caught.value.exit_code == 4


def test_a_header_that_promises_too_much_is_refused_before_decoding(scorer) -> None:
    width = 40_000
    height = MOST_PIXELS // width + 1
    header = f"P6\n{width} {height}\n255\n".encode()
    with pytest.raises(LmclError, match="250 million pixels, at most 250"):
        scorer.score(header + b"\0" * 100)


def test_a_damaged_model_is_refused(tmp_path, make_model) -> None:
    folder = make_model(tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(LmclError) as caught:
        load(folder)
    assert caught.value.exit_code == 5
    with pytest.raises(LmclError) as caught:
        load(tmp_path / "nowhere")
    assert caught.value.exit_code == 4


def test_a_run_folder_is_as_good_as_its_model_folder(tmp_path, make_model, scorer, photos) -> None:
    make_model(tmp_path / "run" / "model")
    file = photos / "img.00.jpg"
    assert load(tmp_path / "run", device="cpu").score(file) == scorer.score(file)


def _released(scorer: Scorer):
    from lmcl.models.pretrained import ReleasedModel

    return ReleasedModel(model=scorer.model, card=scorer.card)
