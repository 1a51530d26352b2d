"""Pooled features: what they are made of, and that they are made once."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from lmcl.distributed import make_rank_context
from lmcl.features.partial import PartialFeatures
from lmcl.features.pooled import PooledFeatures, depth_features
from lmcl.models.encoder import EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.preprocess import Preprocessing
from pipeline.boxes import CropConfig
from pipeline.decode import decode_rgb
from pipeline.decode_config import DecodeConfig
from shards.read import open_set

PIXELS = Preprocessing(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), precision=torch.float32)


@pytest.fixture(scope="module")
def maker(demo_set: Path, tmp_path_factory) -> PooledFeatures:
    torch.manual_seed(0)
    config = EncoderConfig(name="hybrid", stem="resnet10t", levels=("layer1", "layer3"), frozen=2)
    return PooledFeatures(
        folder=tmp_path_factory.mktemp("pooled"),
        shard_set=open_set(demo_set),
        encoder=make_encoder(config, sizes=(64,)).eval(),
        has_trained_blocks=False,
        crops=CropConfig(size=64, evaluation=3),
        preprocessing=PIXELS,
        context=make_rank_context(Accelerator(cpu=True), decode=DecodeConfig(), progress=False),
    )


def test_they_are_means_and_deviations_over_all_places_of_all_crops(maker: PooledFeatures) -> None:
    ids = maker.shard_set.ids()[:5]
    found = maker.make(ids)
    places = []
    for y, x, h, w in maker._boxes(ids)[4]:
        crop = decode_rgb(maker.shard_set.read_bytes(int(ids[4])))[y : y + h, x : x + w]
        pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            levels = depth_features(maker.encoder, pixels, has_blocks=False)
        places.append(torch.cat([level[0] for level in levels], dim=1).double())
    every = torch.cat(places)
    expected = torch.cat([every.mean(0), every.std(0, correction=0)])
    np.testing.assert_allclose(found[4], expected.numpy(), rtol=2e-4, atol=2e-4)


def test_a_place_that_is_asked_for_twice_counts_once(maker: PooledFeatures) -> None:
    ids = maker.shard_set.ids()[:3]
    samples = maker.shard_set.samples
    side = int(max(samples.height[ids].max(), samples.width[ids].max()) // 32 + 1) * 32
    whole = replace(maker, crops=CropConfig(size=side, evaluation=1))
    again = replace(maker, crops=CropConfig(size=side, evaluation=4))
    np.testing.assert_array_equal(whole.make(ids), again.make(ids))


def test_they_are_made_once_and_an_interrupted_making_goes_on(
    maker: PooledFeatures, tmp_path: Path
) -> None:
    ids = maker.shard_set.ids()[:6]
    first = replace(maker, folder=tmp_path / "a")
    made = first.make(ids)
    (file,) = (tmp_path / "a").glob("*.npy")
    marked = np.load(file)
    marked[0] = 7.0
    np.save(file, marked)
    assert (first.make(ids)[0] == 7.0).all()

    partial = PartialFeatures(tmp_path / "b" / file.name, shape=made.shape, dtype=made.dtype)
    partial.values[:4] = 7.0
    partial.save(1)
    resumed = replace(maker, folder=tmp_path / "b").make(ids)
    assert (resumed[:4] == 7.0).all()
    np.testing.assert_array_equal(resumed[4:], made[4:])


@pytest.mark.parametrize(
    ("name", "levels"),
    [("vit_tiny_patch16_224", 5), ("deit3_small_patch16_224", 5), ("eva02_tiny_patch14_224", 5)],
)
def test_a_transformer_is_read_after_its_quarters_and_at_cls(name: str, levels: int) -> None:
    config = EncoderConfig(name=name, depth=4, width=48, heads=4)
    side = 28 if "14" in name else 32
    encoder = make_encoder(config, sizes=(side,)).eval()
    with torch.no_grad():
        found = depth_features(encoder, torch.rand(2, 3, side, side), has_blocks=True)
    assert [one.shape[:2] for one in found] == [(2, 4)] * (levels - 1) + [(2, 1)]


def test_another_encoder_pixel_or_crop_is_another_file(maker: PooledFeatures) -> None:
    ids = maker.shard_set.ids()[:2]
    torch.manual_seed(1)
    config = EncoderConfig(name="hybrid", stem="resnet10t", levels=("layer1", "layer3"), frozen=2)
    others = [
        replace(maker, encoder=make_encoder(config, sizes=(64,)).eval()),
        replace(maker, crops=CropConfig(size=64, evaluation=2)),
        replace(maker, preprocessing=replace(PIXELS, mean=(0.4, 0.5, 0.5))),
        replace(maker, has_trained_blocks=True),
    ]
    names = {one._key(ids, one._boxes(ids)) for one in (maker, *others)}
    assert len(names) == 5
