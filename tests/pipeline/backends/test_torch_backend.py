"""The threads' crops are those of DALI's graph, in memory that is used again."""

import pytest
import torch
from PIL import Image

from pipeline.backends.dali import DaliBackend
from pipeline.backends.row_decoder import RowDecoder
from pipeline.backends.torch_backend import TorchBackend
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.loader import Loader
from pipeline.request import ViewSpec
from pipeline.shard_reader import ShardReader
from shards.read import ShardSet

SPEC = ViewSpec(batch_size=8, views=3, size=64, whole=False, scales=False)


@pytest.fixture
def loader(mixed_set: ShardSet) -> Loader:
    crops = CropConfig(size=64, random=3, salient=False)
    with Loader(
        mixed_set, mixed_set.ids(), crops=crops, batch_size=8, mode="train", seed=3
    ) as made:
        yield made


@pytest.mark.parametrize("decoder", ["nvimagecodec", "pillow"])
def test_threads_give_the_crops_of_dali_s_graph(
    loader: Loader, mixed_set: ShardSet, decoder: str
) -> None:
    pytest.importorskip("nvidia.dali")
    requests = [loader.request(0, step) for step in range(loader.steps)]
    options = {"device": torch.device("cpu")}
    with ShardReader(mixed_set) as reader:
        graph = DaliBackend(reader, SPEC, decoder="cpu", config=DecodeConfig(threads=2), **options)
        threads = TorchBackend(
            reader,
            SPEC,
            num_threads=2,
            prefetch=1,
            decoder=RowDecoder() if decoder == "nvimagecodec" else None,
            **options,
        )
        for expected, got in zip(
            graph.run(iter(requests)), threads.run(iter(requests)), strict=True
        ):
            assert torch.equal(expected.crops, got.crops)
        graph.close()
        threads.close()


def test_a_batch_that_is_held_keeps_its_pixels_while_others_are_made(loader: Loader) -> None:
    held = [batch.crops for batch in loader.epoch(0)]
    copies = [crops.clone() for crops in held]
    for _ in range(2):
        for batch in loader.epoch(1):
            del batch
    assert all(torch.equal(crops, copy) for crops, copy in zip(held, copies, strict=True))
    assert len({crops.data_ptr() for crops in held}) == len(held)


def test_pillow_keeps_as_many_blocks_as_images_are_decoded_at_a_time(mixed_set: ShardSet) -> None:
    with ShardReader(mixed_set) as reader:
        TorchBackend(reader, SPEC, device=torch.device("cpu"), num_threads=3, prefetch=1).close()
    assert Image.core.get_blocks_max() >= 3
