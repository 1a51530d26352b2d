"""One suite for both backends, and the law that they agree."""

import io
import itertools
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, frame_sizes
from pipeline.decode import decode_rgb, reflect_pad, resize_rgb
from pipeline.decode_config import DecodeConfig
from pipeline.errors import PipelineError
from pipeline.loader import Loader
from pipeline.saliency_table import SaliencyTable
from pipeline.validation import codecs_of
from shards.read import ShardSet

CROPS = CropConfig(size=64, random=3, evaluation=4)
BACKENDS = ["dali", "torch"]


def _salient(shard_set: ShardSet, crops: CropConfig) -> SaliencyTable:
    table = shard_set.samples
    span = frame_sizes(table.height, table.width, crops) - crops.size
    boxes = np.full((len(table), 4), crops.size, dtype=np.int32)
    boxes[:, :2] = span // 3
    return SaliencyTable(ids=table.id, boxes=boxes)


def _loader(shard_set: ShardSet, **changes: object) -> Loader:
    options = {
        "crops": CROPS, "batch_size": 8, "mode": "train", "seed": 5, "threads": 2,
    } | changes  # fmt: skip
    names = {field.name for field in fields(DecodeConfig)} & set(options)
    decode = DecodeConfig(**{name: options.pop(name) for name in names})
    ids = options.pop("ids", shard_set.ids())
    return Loader(shard_set, ids, decode=decode, **options)


def _epoch(shard_set: ShardSet, epoch: int = 0, **changes: object) -> list[CropBatch]:
    salient = changes.pop("saliency", None)
    start = changes.pop("start", 0)
    with _loader(shard_set, **changes) as loader:
        return list(loader.epoch(epoch, start=start, saliency=salient))


def _expected_crops(
    shard_set: ShardSet, id: int, boxes: np.ndarray, crops: CropConfig
) -> np.ndarray:
    frame = reflect_pad(decode_rgb(shard_set.read_bytes(id)), crops.size)
    return np.stack([frame[y : y + h, x : x + w] for y, x, h, w in boxes.tolist()])


@pytest.mark.parametrize("backend", BACKENDS)
def test_crops_are_the_decoded_pixels_of_their_boxes(mixed_set: ShardSet, backend: str) -> None:
    salient = _salient(mixed_set, CROPS)
    for batch in _epoch(mixed_set, backend=backend, saliency=salient):
        assert batch.crops.shape == (8, 4, 64, 64, 3)
        for row, id in enumerate(batch.ids.tolist()):
            expected = _expected_crops(mixed_set, id, batch.boxes[row].numpy(), CROPS)
            assert np.array_equal(batch.crops[row].numpy(), expected)
            assert np.array_equal(batch.boxes[row, -1].numpy(), salient.boxes[id])


@pytest.mark.parametrize("backend", BACKENDS)
def test_turned_and_finely_sampled_jpegs_are_cut_where_their_boxes_are(
    pack: Callable[..., ShardSet], photograph: Callable[..., Image.Image], backend: str
) -> None:
    def jpeg(index: int) -> bytes:
        exif, buffer = Image.Exif(), io.BytesIO()
        exif[0x0112] = index % 8 + 1
        photograph(97, 131, seed=index).save(buffer, "JPEG", exif=exif, subsampling=index % 3)
        return buffer.getvalue()

    turned = pack([(f"{index}.jpg", jpeg(index)) for index in range(24)])
    for batch in _epoch(turned, backend=backend):
        for row, id in enumerate(batch.ids.tolist()):
            expected = _expected_crops(turned, id, batch.boxes[row].numpy(), CROPS)
            assert np.array_equal(batch.crops[row].numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_holds_every_sample_once_and_its_label(mixed_set: ShardSet, backend: str) -> None:
    batches = _epoch(mixed_set, backend=backend)
    ids = torch.cat([batch.ids[batch.valid] for batch in batches])
    mos = torch.cat([batch.mos[batch.valid] for batch in batches])
    assert sorted(ids.tolist()) == list(range(37))
    assert torch.allclose(mos, ids / 36)
    assert [batch.step for batch in batches] == list(range(5))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_both_backends_give_the_same_batches_bit_for_bit(mixed_set: ShardSet, mode: str) -> None:
    salient = _salient(mixed_set, CROPS)
    dali, plain = (
        _epoch(mixed_set, backend=backend, mode=mode, saliency=salient) for backend in BACKENDS
    )
    for one, other in zip(dali, plain, strict=True):
        for name in ("ids", "boxes", "mos", "valid", "crops"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_whole_views_of_both_backends_agree_within_rounding(mixed_set: ShardSet) -> None:
    dali, plain = (_epoch(mixed_set, backend=backend, mode="global") for backend in BACKENDS)
    for one, other in zip(dali, plain, strict=True):
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.boxes, other.boxes)
        difference = (one.crops.int() - other.crops.int()).abs()
        assert difference.float().mean() < 0.05
        assert difference.max() <= 5


def test_a_whole_view_is_the_resized_image_and_its_box_the_image(mixed_set: ShardSet) -> None:
    batch = _epoch(mixed_set, backend="torch", mode="global")[0]
    id = int(batch.ids[2])
    image = decode_rgb(mixed_set.read_bytes(id))
    assert batch.boxes[2, 0].tolist() == [0, 0, *image.shape[:2]]
    assert np.array_equal(batch.crops[2, 0].numpy(), resize_rgb(image, 64, 64))


def test_max_side_scales_large_images_and_leaves_others_alone(mixed_set: ShardSet) -> None:
    crops = replace(CROPS, max_side=150)
    dali, plain = (_epoch(mixed_set, backend=backend, crops=crops) for backend in BACKENDS)
    sizes = np.stack([mixed_set.samples.height, mixed_set.samples.width], axis=1).max(axis=1)
    for one, other in zip(dali, plain, strict=True):
        difference = (one.crops.int() - other.crops.int()).abs().amax((1, 2, 3, 4)).numpy()
        large = sizes[one.ids.numpy()] > 150
        assert (difference[~large] == 0).all()
        assert (difference <= 5).all()
        assert torch.equal(one.boxes, other.boxes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("start", [0, 1, 4, 5])
def test_starting_at_a_step_equals_never_having_stopped(
    mixed_set: ShardSet, backend: str, start: int
) -> None:
    whole = _epoch(mixed_set, 3, backend=backend)
    resumed = _epoch(mixed_set, 3, backend=backend, start=start)
    assert len(resumed) == len(whole) - start
    for one, other in zip(whole[start:], resumed, strict=True):
        assert one.step == other.step
        assert torch.equal(one.ids, other.ids)
        assert torch.equal(one.crops, other.crops)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_together_see_every_sample_once_in_equal_steps(
    mixed_set: ShardSet, backend: str, world: int
) -> None:
    epochs = [
        _epoch(mixed_set, backend=backend, batch_size=5, rank=rank, world_size=world)
        for rank in range(world)
    ]
    assert len({len(batches) for batches in epochs}) == 1
    ids = [batch.ids[batch.valid] for batches in epochs for batch in batches]
    assert sorted(torch.cat(ids).tolist()) == list(range(37))
    assert {len(batch.ids) for batches in epochs for batch in batches} == {5}


def test_a_samples_crops_do_not_depend_on_world_or_batch(mixed_set: ShardSet) -> None:
    def crops_by_id(**options: object) -> dict[int, torch.Tensor]:
        batches = _epoch(mixed_set, 4, **options)
        return {
            int(id): crops
            for batch in batches
            for id, crops in zip(batch.ids, batch.crops, strict=True)
        }

    alone = crops_by_id(batch_size=37)
    shared = crops_by_id(batch_size=4, rank=1, world_size=2)
    assert all(torch.equal(alone[id], crops) for id, crops in shared.items())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("threads", "prefetch"), [(1, 1), (3, 4)])
def test_threads_and_prefetching_change_nothing(
    mixed_set: ShardSet, backend: str, threads: int, prefetch: int
) -> None:
    usual = _epoch(mixed_set, backend=backend)
    other = _epoch(mixed_set, backend=backend, threads=threads, prefetch=prefetch)
    assert all(torch.equal(a.crops, b.crops) for a, b in zip(usual, other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_split_smaller_than_a_step_is_padded(mixed_set: ShardSet, backend: str, n: int) -> None:
    for rank in range(2):
        (batch,) = _epoch(
            mixed_set, backend=backend, ids=np.arange(n), batch_size=8, rank=rank, world_size=2
        )
        assert batch.crops.shape[0] == 8
        assert int(batch.valid.sum()) == len(range(rank, n, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_batches_are_not_overwritten(mixed_set: ShardSet, backend: str) -> None:
    with _loader(mixed_set, backend=backend) as loader:
        kept, copies = [], []
        for epoch in range(2):
            for batch in loader.epoch(epoch):
                kept.append(batch.crops)
                copies.append(batch.crops.clone())
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_leaving_an_epoch_early_does_not_disturb_the_next(
    mixed_set: ShardSet, backend: str
) -> None:
    expected = _epoch(mixed_set, 1, backend=backend)
    with _loader(mixed_set, backend=backend) as loader:
        for taken in (1, 2, 4):
            abandoned: Iterator[CropBatch] = loader.epoch(0)
            list(itertools.islice(abandoned, taken))
            abandoned.close()
            assert torch.equal(next(loader.epoch(1)).crops, expected[0].crops)


def test_evaluation_takes_ids_in_their_order_and_the_same_boxes_every_time(
    mixed_set: ShardSet,
) -> None:
    ids = np.array([9, 3, 30, 4])
    first = _epoch(mixed_set, 0, ids=ids, mode="eval", batch_size=3)
    later = _epoch(mixed_set, 7, ids=ids, mode="eval", batch_size=4, seed=99)
    assert torch.cat([batch.ids[batch.valid] for batch in first]).tolist() == ids.tolist()
    boxes = torch.cat([batch.boxes[batch.valid] for batch in first])
    assert torch.equal(boxes, later[0].boxes)


def test_auto_says_what_it_took_and_why(mixed_set: ShardSet) -> None:
    with _loader(mixed_set, backend="auto") as loader:
        assert loader.choice.backend in loader.recipe
        assert "installed" in loader.choice.reason


def test_waiting_for_data_is_counted(mixed_set: ShardSet) -> None:
    with _loader(mixed_set) as loader:
        assert loader.wait_s == 0
        list(loader.epoch(0))
        assert loader.wait_s > 0


def test_a_gpu_that_is_not_there_is_refused_when_the_loader_is_made(mixed_set: ShardSet) -> None:
    with pytest.raises(PipelineError, match="no CUDA GPU; choose decode") as caught:
        _loader(mixed_set, decode="gpu")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_and_loader_say_who_decoded(mixed_set: ShardSet, backend: str) -> None:
    with _loader(mixed_set, backend=backend) as loader:
        batches = list(loader.epoch(0))
        assert (loader.decoded.gpu, loader.decoded.cpu) == (0, 40)
    assert not any(batch.gpu_decoded.any() for batch in batches)


def test_the_codecs_of_a_set_are_those_of_its_images(mixed_set: ShardSet) -> None:
    assert codecs_of(mixed_set) == {"jpg", "png", "bmp", "webp"}
