import logging
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends import dali
from pipeline.backends.decode_batch import (
    halve_decode_batch,
    is_out_of_gpu_memory,
    split_request,
)
from pipeline.boxes import CropConfig
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.loader import Loader
from pipeline.request import Request
from shards.read import ShardSet

CRITICAL = "Critical error in pipeline:\nError in MIXED operator `nvidia.dali.fn.decoders.image`"
MESSAGES = [
    f"{CRITICAL} encountered:\nCan't allocate 129499136 bytes on device 0.\nCurrent pipeline "
    "object is no longer valid.",
    f"{CRITICAL} encountered:\nCUDA allocation failed\nCurrent pipeline object is no longer valid.",
    f'{CRITICAL}, NVJPEG error "5" : NVJPEG_STATUS_ALLOCATOR_FAILURE n02130308/a.JPEG',
    "CUDA runtime API error cudaErrorMemoryAllocation (2):\nout of memory",
]


@pytest.mark.parametrize("message", MESSAGES)
def test_dalis_messages_of_too_little_gpu_memory_are_known(message: str) -> None:
    assert is_out_of_gpu_memory(message)


@pytest.mark.parametrize(
    "message",
    [
        "Can't allocate 4096 bytes on host.",
        "Failed to decode sample #2 : unknown image format",
        "Input 'in_anchors' out of range",
    ],
)
def test_other_failures_are_not_taken_for_it(message: str) -> None:
    assert not is_out_of_gpu_memory(message)


def test_halving_ends_at_one_image_with_a_sentence() -> None:
    sizes, images = [], 33
    while images > 1:
        images = halve_decode_batch(images, device="cuda:0", cause="CUDA allocation failed")
        sizes.append(images)
    assert sizes == [17, 9, 5, 3, 2, 1]
    with pytest.raises(PipelineError, match=r'cuda:0 is too small .* set decode = "cpu"'):
        halve_decode_batch(1, device="cuda:0", cause="CUDA allocation failed")


@pytest.mark.parametrize("most", [1, 3, 4, 7, 8])
def test_parts_of_a_request_are_its_images_in_order(most: int) -> None:
    rng = np.random.default_rng(0)
    whole = Request(
        step=5,
        ids=np.arange(7),
        valid=rng.random(7) < 0.5,
        sizes=rng.integers(1, 99, (7, 2)),
        targets=rng.integers(1, 99, (7, 2)),
        boxes=rng.integers(0, 99, (7, 2, 4)).astype(np.int32),
    )
    parts = split_request(whole, most)
    assert all(len(part.ids) <= most and part.step == 5 for part in parts)
    for name in ("ids", "valid", "sizes", "targets", "boxes"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name))


class _SmallMemory:
    """A real DALI graph that says what DALI says when more images come than memory holds."""

    def __init__(self, pipe: Any, fails_at: int) -> None:
        self._pipe, self._left = pipe, fails_at

    def run(self, *arguments: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise RuntimeError(MESSAGES[0])
        return self._pipe.run(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def _limited(images: int, fails_at: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let graphs of more than `images` fail at their n-th run; the sizes that were built."""
    built: list[int] = []
    build = dali.build_graph

    def build_limited(spec: Any, **options: Any) -> Any:
        built.append(spec.batch_size)
        pipe, external_source = build(spec, **options)
        return (pipe if spec.batch_size <= images else _SmallMemory(pipe, fails_at)), (
            external_source
        )

    monkeypatch.setattr(dali, "build_graph", build_limited)
    return built


@pytest.fixture(scope="module")
def graph_set(pack_into, mixed_images, tmp_path_factory) -> ShardSet:
    """A set without BMPs: one that holds some goes around DALI's graph on a CPU (decision 0309)."""
    images = [(name, data) for name, data in mixed_images if not name.endswith(".bmp")]
    return pack_into(tmp_path_factory.mktemp("graph"), images)


def _loader(shard_set: ShardSet, **changes: Any) -> Loader:
    options = {"batch_size": 8, "mode": "train"} | changes
    return Loader(
        shard_set, shard_set.ids(), crops=CropConfig(size=64, random=3), seed=5,
        decode=DecodeConfig(backend="dali", threads=1), **options,
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "global"])
@pytest.mark.parametrize("fails_at", [0, 2])
def test_a_batch_too_large_for_the_gpu_is_decoded_in_halves_and_is_the_same_batch(
    graph_set: ShardSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    fails_at: int, mode: str,
) -> None:  # fmt: skip
    with _loader(graph_set, mode=mode) as loader:
        expected = list(loader.epoch(0))
    built = _limited(3, fails_at, monkeypatch)
    with _loader(graph_set, mode=mode) as loader, caplog.at_level(logging.WARNING):
        batches = list(loader.epoch(0))
        again = next(loader.epoch(0))
    assert built == [8, 4, 2]
    assert [record.message.partition(" (")[0] for record in caplog.records] == [
        "the memory of cpu is too small to decode 8 images at once",
        "the memory of cpu is too small to decode 4 images at once",
    ]
    assert [batch.step for batch in batches] == [batch.step for batch in expected]
    for one, other in zip([*batches, again], [*expected, expected[0]], strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.crops, other.crops)


def test_a_gpu_too_small_for_one_image_is_a_sentence(
    graph_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limited(0, 0, monkeypatch)
    with (
        _loader(graph_set, batch_size=2) as loader,
        pytest.raises(PipelineError, match="too small to decode a single image"),
    ):
        next(loader.epoch(0))
