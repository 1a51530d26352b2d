import copy
import io
import multiprocessing
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lmcl
from lmcl.errors import LmclError
from lmcl.inference import torch_engine
from lmcl.inference.adaptive_scoring import CropOutputs
from lmcl.inference.scorer import MOST_PIXELS, Scorer, load
from lmcl.models.encoder import EncoderConfig
from lmcl.models.saliency import SaliencyConfig
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


@pytest.mark.parametrize("errors", ["raise", "nan"])
def test_what_fails_in_a_list_is_named_by_its_place_or_nan(scorer, photos, errors) -> None:
    good = photos / "img.00.jpg"
    images = [good, photos / "gone.jpg", torch.zeros(2, 9, 9), None, good]
    if errors == "nan":
        found = np.array(scorer.score(images, errors="nan"))
        assert np.isnan(found).tolist() == [False, True, True, True, False]
        assert np.isnan(scorer.score(images[1], errors="nan"))
        return
    with pytest.raises(LmclError, match=r"images\[1\]: .*gone\.jpg: .*no such file") as caught:
        scorer.score(images)
    assert caught.value.exit_code == 4
    with pytest.raises(ValueError, match=r"images\[0\]: an image has 1, 3 or 4"):
        scorer.score(images[2:])
    with pytest.raises(TypeError, match=r"images\[1\]: an image must be"):
        scorer.score(iter([good, None]))
    # Checked types in tests are quicker than the sentence; both name the argument.
    with pytest.raises((ValueError, TypeError), match="errors"):
        scorer.score(good, errors="ignore")


class Counted:
    """An image that knows how many of its kind are alive."""

    alive = most = 0

    def __init__(self) -> None:
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)

    def __del__(self) -> None:
        type(self).alive -= 1

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.zeros((64, 64, 3), np.uint8)


def test_a_generator_is_scored_in_a_stream(scorer) -> None:
    scores = scorer.score(Counted() for _ in range(200))
    assert len(scores) == 200
    assert Counted.most <= 2 * scorer.batch_images + 1


def test_memory_stays_flat_over_ten_thousand_paths(scorer, photos, monkeypatch) -> None:
    made = []

    def prepare(image, *, salient=False):
        prepared = real(photos / "img.00.jpg")
        made.append(weakref.ref(prepared))
        assert sum(one() is not None for one in made[-50:]) <= 2 * scorer.batch_images
        return prepared

    real = scorer.prepare
    prepared = real(photos / "img.00.jpg")
    said = CropOutputs(np.zeros((scorer.batch_images, 5)), np.zeros((scorer.batch_images, 5, 4)))

    def forward(crops, **_):
        return CropOutputs(said.quality[: len(crops)], said.embedding[: len(crops)])

    monkeypatch.setattr(scorer.engine, "forward", forward)
    monkeypatch.setattr(scorer, "prepare", prepare)
    assert len(scorer.score([photos / "img.00.jpg"] * 10_000)) == 10_000
    assert prepared.crops.shape == (5, 64, 64, 3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_callers_settings_change_no_score(model_folder, photos, precision) -> None:
    model = load(model_folder, device="cpu", precision=precision)
    file = photos / "img.00.jpg"
    expected = model.details(file)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.details(file) == expected
    with torch.autocast("cpu", enabled=False), torch.no_grad():
        assert model.details(file) == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert model.details(file) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_loading_changes_no_limit_of_pillows(model_folder, photos) -> None:
    code = (
        "from PIL import Image, ImageFile; import lmcl\n"
        "names = ['MAX_IMAGE_PIXELS']\n"
        "before = [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.SAFEBLOCK]\n"
        f"lmcl.load({str(model_folder)!r}).score({str(photos / 'img.00.jpg')!r})\n"
        "after = [Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.SAFEBLOCK]\n"
        "assert after == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle-2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "scored-before": lambda model: (model.score(np.zeros((64, 64, 3), np.uint8)), model)[1],
}


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_scores_as_its_original(model_folder, photos, name) -> None:
    model = load(model_folder, device="cpu")
    found = COPIES[name](model).details(photos / "img.00.jpg")
    assert found == model.details(photos / "img.00.jpg")


def _score_in_child(model: Scorer, file: Path) -> float:
    return model.score(file)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_score_a_model_that_has_scored_before(scorer, photos, method) -> None:
    file = photos / "img.00.jpg"
    expected = scorer.score(file)
    with warnings.catch_warnings():
        # Python warns of forks in processes with threads; here they are what is tested.
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context(method).Pool(1) as pool:
            found = pool.apply_async(_score_in_child, (scorer, file)).get(timeout=250)
    assert found == pytest.approx(expected, abs=1e-3)


def test_a_gpu_after_a_fork_is_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(torch_engine, "_told_threads", set())
    with pytest.raises(LmclError, match=r"forked from one that uses cuda:0.*'spawn'"):
        torch_engine.settle_after_fork(torch.device("cuda:0"))


@pytest.mark.parametrize("layout", ["grid", "seeded"])
@pytest.mark.parametrize("size", [(64, 64), (90, 130), (40, 33), (150, 100)], ids=str)
def test_quality_is_what_score_says(tmp_path, make_model, size, layout) -> None:
    crops = CropConfig(size=64, random=3, evaluation=4, evaluation_layout=layout)
    model = load(make_model(tmp_path / "m", crops=crops), device="cpu")
    bytes_ = torch.randint(0, 256, (2, 3, *size), generator=torch.Generator().manual_seed(1))
    images = bytes_.to(torch.float32) / 255
    found = model.quality(images)
    expected = model.scale.to_unit(np.array(model.score(images)))
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    assert model.quality(images[0]).item() == pytest.approx(expected[0], abs=1e-5)


def test_quality_of_images_above_the_longest_side_stays_near_the_score(tmp_path, make_model):
    crops = CropConfig(size=64, random=3, evaluation=4, max_side=100)
    model = load(make_model(tmp_path / "m", crops=crops), device="cpu")
    image = torch.rand(3, 150, 120, generator=torch.Generator().manual_seed(1))
    expected = float(model.scale.to_unit(model.score(image)))
    assert model.quality(image).item() == pytest.approx(expected, abs=0.01)


def test_the_gradient_of_quality_is_that_of_differences(tmp_path, make_model) -> None:
    encoder = EncoderConfig(name="conv-vit", width=12, depth=1, heads=3, patch=16)
    crops = CropConfig(size=16, random=1, evaluation=2)
    saliency = SaliencyConfig(view=16, layers=1, window=1)
    folder = make_model(tmp_path / "m", encoder=encoder, crops=crops, saliency=saliency)
    model = load(folder, device="cpu")
    model.score(np.zeros((20, 20, 3), np.uint8))
    images = torch.rand(1, 3, 14, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(model.quality, (images,), atol=1e-6, fast_mode=True)
    assert not any(value.requires_grad for value in model.model.parameters())


def test_quality_can_be_a_loss(scorer) -> None:
    image = torch.full((1, 3, 70, 70), 0.5, requires_grad=True)
    before = scorer.quality(image)
    before.sum().backward()
    better = image.detach() + 0.01 * image.grad / image.grad.abs().max()
    assert scorer.quality(better).item() > before.item()


@pytest.mark.parametrize(
    "image", [np.zeros((3, 9, 9), np.float32), torch.zeros(3, 9, 9, dtype=torch.uint8),
              torch.zeros(2, 9, 9), torch.zeros(9, 9), torch.zeros(0, 3, 9, 9)],
)  # fmt: skip
def test_quality_takes_float_tensors_and_says_so(scorer, image) -> None:
    with pytest.raises(ValueError, match=r"takes a float tensor \[b, 3, h, w\]"):
        scorer.quality(image)


def test_bfloat16_on_a_processor_without_it_is_said_with_what_it_costs(
    model_folder, monkeypatch, caplog
) -> None:
    monkeypatch.setattr(torch_engine, "has_bfloat16", lambda device: False)
    load(model_folder, device="cpu", precision="bfloat16")
    assert re.search(r"took \d+\.\d times as long as in float32", caplog.text)
    caplog.clear()
    caplog.set_level("INFO")
    assert load(model_folder, device="cpu", precision="auto").precision == "float32"
    assert "computes in float32, as cpu has no bfloat16 products" in caplog.text
    caplog.clear()
    monkeypatch.setattr(torch_engine, "has_bfloat16", lambda device: True)
    assert load(model_folder, device="cpu", precision="auto").precision == "bfloat16"
    assert "computes in bfloat16, as cpu multiplies in it" in caplog.text
    assert "took" not in caplog.text


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
