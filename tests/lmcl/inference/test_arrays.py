"""Arrays and tensors of every kind become the pixels that a file of them has, or are refused."""

import io
import warnings

import numpy as np
import pytest
import torch

from lmcl.inference.arrays import as_array, rgb_pixels

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 7, 3), dtype=np.uint8)
GREY = RGB[..., :1]
ALPHA = np.concatenate([RGB, GREY], axis=2)
DEEP = RGB.astype(np.uint16) * 257 + 3


def chw(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 2, 0)


SAME = {
    "hwc": (RGB, RGB),
    "chw": (chw(RGB), RGB),
    "tensor-chw": (torch.from_numpy(chw(RGB).copy()), RGB),
    "tensor-hwc": (torch.from_numpy(RGB.copy()), RGB),
    "grey-hw": (GREY[..., 0], np.repeat(GREY, 3, axis=2)),
    "grey-hw1": (GREY, np.repeat(GREY, 3, axis=2)),
    "grey-1hw": (torch.from_numpy(chw(GREY).copy()), np.repeat(GREY, 3, axis=2)),
    "alpha-hwc": (ALPHA, RGB),
    "alpha-chw": (chw(ALPHA), RGB),
    "16-bit": (DEEP, RGB),
    "int64": (RGB.astype(np.int64), RGB),
    "float32": (RGB.astype(np.float32) / 255, RGB),
    "float64": (RGB / 255, RGB),
    "float16": ((RGB / 255).astype(np.float16), RGB),
    "bfloat16-ends": (torch.tensor([0.0, 1.0] * 9).bfloat16().reshape(3, 2, 3), None),
    "read-only": (np.broadcast_to(RGB, RGB.shape), RGB),
    "both-ends-array": (RGB[:3], RGB[:3]),
    "both-ends-tensor": (torch.from_numpy(RGB[:3].copy()), np.moveaxis(RGB[:3], 0, 2)),
}


@pytest.mark.parametrize("name", SAME)
def test_one_rule_says_what_an_array_shows(name: str) -> None:
    given, expected = SAME[name]
    values, first = as_array(given)
    pixels, overshot = rgb_pixels(values, channels_first=first)
    assert (pixels.dtype, pixels.ndim, pixels.shape[2]) == (np.uint8, 3, 3)
    assert not overshot
    if expected is not None:
        assert np.array_equal(pixels, expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.full((3, 4, 4), 2.0), r"lies in \[0, 1\].*divide by 255"),
        (torch.full((3, 4, 4), -0.3), r"lies in \[0, 1\]"),
        (torch.full((3, 4, 4), torch.nan), r"lies in \[0, 1\], without NaN"),
        (torch.full((3, 4, 4), torch.inf), r"lies in \[0, 1\]"),
        (torch.full((3, 4, 4), 256, dtype=torch.int32), r"lies in 0..255, got 256..256"),
        (torch.full((3, 4, 4), -1, dtype=torch.int64), r"lies in 0..255, got -1..-1"),
        (torch.ones(3, 4, 4, dtype=torch.bool), "bytes, 16 bits or floats, got bool"),
        (np.ones((4, 4, 3), np.complex64), "bytes, 16 bits or floats, got complex64"),
        (torch.zeros(3, 0, 4), "at least one pixel"),
        (np.zeros((5, 6, 2), np.uint8), "1, 3 or 4 channels.*choose three"),
        (np.zeros((12, 9, 9), np.uint8), "1, 3 or 4 channels"),
        (np.zeros(12, np.uint8), "shape"),
        (np.zeros((2, 3, 8, 8), np.uint8), r"give a batch .* to score\(\) itself"),
    ],
)
def test_arrays_of_no_one_meaning_are_refused_with_what_to_do(image, message) -> None:
    values, first = as_array(image)
    with pytest.raises(ValueError, match=message):
        rgb_pixels(values, channels_first=first)


def test_a_batch_scores_as_its_images_do(scorer) -> None:
    batch = torch.randint(0, 256, (3, 3, 70, 80), dtype=torch.uint8)
    alone = [scorer.score(image) for image in batch]
    assert scorer.score(batch) == scorer.score(iter(batch)) == alone
    assert scorer.score(batch.permute(0, 2, 3, 1).numpy()) == alone


def test_open_files_and_buffers_score_as_their_paths(scorer, photos) -> None:
    path = photos / "img.00.jpg"
    data, expected = path.read_bytes(), scorer.score(path)
    with path.open("rb") as file:
        forms = [io.BytesIO(data), bytearray(data), memoryview(data), file]
        assert scorer.score(forms) == [expected] * len(forms)
    assert scorer.score(io.BytesIO(data)) == expected
    assert scorer.score(np.array([str(path)])) == [expected]


def test_overshoot_of_resampling_is_clamped_with_one_warning(scorer) -> None:
    wild = torch.linspace(-0.11, 1.14, 3 * 70 * 80).reshape(3, 70, 80)
    with pytest.warns(UserWarning, match="clamped") as told:
        scores = scorer.score([wild, wild, wild.clamp(0, 1)])
    assert len(told) == 1
    assert len(set(scores)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scorer.score(wild.clamp(0, 1)) == scores[0]
