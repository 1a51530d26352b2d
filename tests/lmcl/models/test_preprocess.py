import dataclasses

import pytest
import torch

from lmcl.models.preprocess import Preprocessing, preprocess

PREPROCESSING = Preprocessing(
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), precision=torch.float32
)


def test_mirrored_pixels_are_those_of_a_mirrored_view_bit_for_bit() -> None:
    crops = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    flip = torch.tensor([True, False, True, True, False, False])
    plain = preprocess(crops, PREPROCESSING)
    expected = torch.where(flip[:, None, None, None], plain.flip(-1), plain)
    assert torch.equal(preprocess(crops, PREPROCESSING, flip), expected)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_pixels_are_rounded_once_to_what_autocast_would_make_of_them(precision) -> None:
    crops = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8)
    rounded = preprocess(crops, dataclasses.replace(PREPROCESSING, precision=precision))
    assert rounded.dtype == precision
    assert torch.equal(rounded, preprocess(crops, PREPROCESSING).to(precision))
    convolution = torch.nn.Conv2d(3, 4, 8)
    with torch.autocast("cpu", dtype=precision):
        assert torch.equal(convolution(rounded), convolution(preprocess(crops, PREPROCESSING)))


def test_kept_features_stay_as_they_are_and_cannot_be_mirrored() -> None:
    features = torch.randn(2, 3, 4, 5)
    assert torch.equal(preprocess(features, PREPROCESSING), features.flatten(0, 1))
    with pytest.raises(ValueError, match=r"set train\.flip = false"):
        preprocess(features, PREPROCESSING, torch.zeros(6, dtype=torch.bool))
