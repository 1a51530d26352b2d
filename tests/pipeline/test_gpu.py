"""The same laws on a GPU; nothing here ran on the machine this was written on."""

import pytest
import torch

from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.file_batches import FileDecoder
from pipeline.loader import Loader
from pipeline.normalize import normalize
from shards.read import ShardSet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CROPS = CropConfig(size=64, random=3)


def _crops(shard_set: ShardSet, **options: object) -> list[torch.Tensor]:
    with Loader(
        shard_set, shard_set.ids(), crops=CROPS, batch_size=8, mode="train", seed=5, **options
    ) as loader:
        return [batch.crops.cpu() for batch in loader.epoch(0)]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_crops_on_the_gpu_are_those_of_the_cpu(mixed_set: ShardSet, backend: str) -> None:
    decode = DecodeConfig(backend=backend, decode="cpu")
    here = _crops(mixed_set, decode=decode)
    there = _crops(mixed_set, decode=decode, device="cuda")
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_the_gpus_decoder_is_close_to_the_cpus_and_what_it_lacks_is_equal(
    mixed_set: ShardSet,
) -> None:
    options = {"crops": CROPS, "batch_size": 8, "mode": "train", "seed": 5}
    with (
        Loader(mixed_set, mixed_set.ids(), decode=DecodeConfig(decode="cpu"), **options) as cpu,
        Loader(mixed_set, mixed_set.ids(), device="cuda", **options) as gpu,
    ):
        assert gpu.recipe == "dali-gpu-2.4"
        for one, other in zip(cpu.epoch(0), gpu.epoch(0), strict=True):
            off = (one.crops.int() - other.crops.cpu().int()).abs()
            jpeg = other.gpu_decoded
            assert off[jpeg].float().mean() < 0.5
            assert (off[~jpeg] == 0).all()
        assert gpu.decoded.gpu > 0


def test_one_image_has_the_same_pixels_in_every_batch(mixed_set: ShardSet) -> None:
    def by_id(size: int) -> dict[int, torch.Tensor]:
        with Loader(
            mixed_set, mixed_set.ids(), crops=CROPS, batch_size=size, mode="eval", seed=0,
            device="cuda",
        ) as loader:  # fmt: skip
            return {
                int(id): crops.cpu()
                for batch in loader.epoch(0)
                for id, crops in zip(batch.ids, batch.crops, strict=True)
            }

    few, many = by_id(3), by_id(16)
    assert all(torch.equal(crops, many[id]) for id, crops in few.items())


def test_normalising_on_the_gpu_equals_the_cpu() -> None:
    crops = torch.randint(0, 256, (2, 3, 17, 17, 3), dtype=torch.uint8)
    here = normalize(crops, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    there = normalize(crops.cuda(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    assert torch.allclose(here, there.cpu(), atol=1e-6)
    assert there.is_contiguous(memory_format=torch.channels_last)


def test_one_file_has_the_same_crops_alone_and_among_others_and_those_of_the_set(
    mixed_set: ShardSet,
) -> None:
    files = [mixed_set.read_bytes(id) for id in mixed_set.ids().tolist()]
    keys = mixed_set.ids()
    with (
        FileDecoder(crops=CROPS, batch_size=64, device="cuda") as decoder,
        Loader(
            mixed_set, keys, crops=CROPS, batch_size=len(files), mode="eval", seed=0, device="cuda"
        ) as loader,
    ):  # fmt: skip
        together = decoder.decode(files, keys)
        batch = next(loader.epoch(0))
        assert torch.equal(together.crops, batch.crops)
        assert (together.gpu_decoded == batch.gpu_decoded).all()
        for row, data in enumerate(files):
            alone = decoder.decode([data], keys[row : row + 1])
            assert torch.equal(alone.crops[0], together.crops[row])
