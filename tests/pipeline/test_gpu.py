"""The same laws on a GPU; nothing here ran on the machine this was written on."""

import pytest
import torch

from pipeline.boxes import CropConfig
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
    here = _crops(mixed_set, backend=backend)
    there = _crops(mixed_set, backend=backend, device="cuda")
    assert all(torch.equal(one, other) for one, other in zip(here, there, strict=True))


def test_mixed_decoding_is_close_to_the_cpus(mixed_set: ShardSet) -> None:
    here = torch.cat(_crops(mixed_set, backend="dali")).int()
    there = torch.cat(_crops(mixed_set, backend="dali", device="cuda", decode="mixed")).int()
    assert (here - there).abs().float().mean() < 0.5


def test_normalising_on_the_gpu_equals_the_cpu() -> None:
    crops = torch.randint(0, 256, (2, 3, 17, 17, 3), dtype=torch.uint8)
    here = normalize(crops, mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    there = normalize(crops.cuda(), mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    assert torch.allclose(here, there.cpu(), atol=1e-6)
    assert there.is_contiguous(memory_format=torch.channels_last)
