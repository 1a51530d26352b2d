from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.boxes import (
    CropConfig,
    check_boxes,
    evaluation_boxes,
    frame_sizes,
    pool_boxes,
    random_boxes,
    scaled_sizes,
)
from pipeline.errors import PipelineError
from pipeline.overlap import box_iou

sides = st.integers(1, 6000)
crop_sizes = st.sampled_from([1, 64, 96, 224])


def _frames(height: int, width: int, crops: CropConfig, count: int = 1) -> np.ndarray:
    return frame_sizes(np.full(count, height), np.full(count, width), crops)


def _inside(boxes: np.ndarray, frames: np.ndarray, size: int) -> bool:
    corners, extents = boxes[..., :2], boxes[..., 2:]
    fits = (corners >= 0).all() and (corners + extents <= frames[:, None, :]).all()
    return bool(fits and (extents == size).all())


@given(
    height=sides, width=sides, size=crop_sizes, epoch=st.integers(0, 99), id=st.integers(0, 2**40)
)
def test_random_boxes_lie_in_their_frame(
    height: int, width: int, size: int, epoch: int, id: int
) -> None:
    crops = CropConfig(size=size)
    frames = _frames(height, width, crops)
    boxes = random_boxes(np.array([id]), frames, size=size, count=10, seed=1, epoch=epoch)
    assert _inside(boxes, frames, size)


@given(
    height=sides,
    width=sides,
    size=crop_sizes,
    count=st.integers(1, 40),
    layout=st.sampled_from(["grid", "seeded"]),
    max_side=st.sampled_from([None, 300, 1000]),
)
def test_evaluation_boxes_lie_in_their_frame(
    height: int, width: int, size: int, count: int, layout: str, max_side: int | None
) -> None:
    crops = CropConfig(size=size, evaluation=count, evaluation_layout=layout, max_side=max_side)
    frames = _frames(height, width, crops)
    assert _inside(evaluation_boxes(np.array([3]), frames, crops), frames, size)


def test_an_images_boxes_do_not_depend_on_its_batch() -> None:
    ids = np.array([5, 9, 2])
    frames = np.array([[300, 400], [500, 224], [1000, 800]])
    together = random_boxes(ids, frames, size=224, count=4, seed=3, epoch=2)
    for row in range(3):
        alone = random_boxes(
            ids[row : row + 1], frames[row : row + 1], size=224, count=4, seed=3, epoch=2
        )
        assert np.array_equal(alone[0], together[row])


def test_more_crops_keep_the_first_ones() -> None:
    ids, frames = np.array([5]), np.array([[768, 1024]])
    few = random_boxes(ids, frames, size=224, count=4, seed=3, epoch=2)
    many = random_boxes(ids, frames, size=224, count=10, seed=3, epoch=2)
    assert np.array_equal(few, many[:, :4])


def test_boxes_change_with_seed_epoch_and_id() -> None:
    frames = np.array([[768, 1024]])
    seen = {
        random_boxes(np.array([id]), frames, size=224, count=4, seed=seed, epoch=epoch).tobytes()
        for id in range(4)
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(seen) == 64


def test_every_corner_is_equally_likely() -> None:
    ids = np.arange(4000)
    frames = np.tile([[9, 12]], (4000, 1))
    boxes = random_boxes(ids, frames, size=5, count=10, seed=0, epoch=0)
    counts = np.zeros((5, 8))
    np.add.at(counts, (boxes[..., 0], boxes[..., 1]), 1)
    # 39 degrees of freedom: beyond 72 once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 72


def test_the_grid_covers_the_corners_of_a_landscape() -> None:
    crops = CropConfig(size=224, evaluation=10)
    boxes = evaluation_boxes(np.array([0]), _frames(768, 1024, crops), crops)[0, :, :2]
    assert boxes.tolist() == [
        [0, 0], [0, 400], [0, 800],
        [272, 0], [272, 267], [272, 533], [272, 800],
        [544, 0], [544, 400], [544, 800],
    ]  # fmt: skip


def test_a_single_evaluation_crop_is_the_centre() -> None:
    crops = CropConfig(size=100, evaluation=1)
    boxes = evaluation_boxes(np.array([0]), _frames(300, 500, crops), crops)
    assert boxes.tolist() == [[[100, 200, 100, 100]]]


def test_grid_boxes_depend_on_the_size_alone_and_seeded_ones_on_the_id_too() -> None:
    grid = CropConfig(size=64)
    seeded = replace(grid, evaluation_layout="seeded")
    frames = _frames(300, 400, grid, 2)
    one, two = evaluation_boxes(np.array([1, 2]), frames, grid)
    assert np.array_equal(one, two)
    one, two = evaluation_boxes(np.array([1, 2]), frames, seeded)
    assert not np.array_equal(one, two)


@given(height=sides, width=sides, limit=st.integers(1, 3000), is_short=st.booleans())
def test_a_limit_bounds_its_side_and_keeps_the_aspect(
    height: int, width: int, limit: int, is_short: bool
) -> None:
    name, (bounded, other) = ("short_side", (min, max)) if is_short else ("max_side", (max, min))
    crops = CropConfig(size=1, **{name: limit})
    ((tall, wide),) = scaled_sizes(np.array([height]), np.array([width]), crops).tolist()
    if bounded(height, width) <= limit:
        assert (tall, wide) == (height, width)
        return
    assert bounded(tall, wide) == limit
    exact = other(height, width) * limit / bounded(height, width)
    assert min(tall, wide) >= 1
    assert abs(other(tall, wide) - max(exact, 1)) <= 0.5


def test_a_frame_is_at_least_a_crop() -> None:
    crops = CropConfig(size=224)
    assert _frames(50, 1000, crops).tolist() == [[224, 1000]]


@pytest.mark.parametrize(
    "box",
    [(0, 0, 224, 223), (-1, 0, 224, 224), (0, 801, 224, 224), (545, 0, 224, 224)],
    ids=["wrong-size", "above", "right", "below"],
)
def test_a_box_outside_its_frame_is_named(box: tuple[int, ...]) -> None:
    boxes = np.array([[(0, 0, 224, 224), box]], dtype=np.int32)
    with pytest.raises(PipelineError, match=r"saliency table: box .* of sample 17 .* 768 x 1024"):
        check_boxes(
            boxes, np.array([17]), np.array([[768, 1024]]), size=224, origin="saliency table"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: CropConfig(size=0), "crops.size is 0"),
        (lambda: CropConfig(random=0), "crops.random is 0"),
        (lambda: CropConfig(evaluation=0), "crops.evaluation is 0"),
        (lambda: CropConfig(max_side=100), "crops.max_side is 100; it must be at least 224"),
        (lambda: CropConfig(evaluation_layout="spiral"), "spiral"),
        (lambda: CropConfig(short_side=100), "crops.short_side is 100; it must be at least 224"),
        (lambda: CropConfig(short_side=300, max_side=300), "set one of them"),
    ],
    ids=["size", "random", "evaluation", "max-side", "layout", "short-side", "two-sides"],
)
def test_a_senseless_config_is_refused(change: Callable[[], CropConfig], message: str) -> None:
    with pytest.raises(Exception, match=message):
        change()


def test_iou_of_known_boxes() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 5, 10, 10], [20, 20, 10, 10]]], dtype=torch.int32)
    expected = torch.tensor([[[1, 1 / 3, 0], [1 / 3, 1, 0], [0, 0, 1]]])
    assert torch.allclose(box_iou(boxes), expected)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=2, max_size=6))
def test_iou_counts_shared_pixels(corners: list[tuple[int, int]]) -> None:
    boxes = torch.tensor([[(y, x, 9, 7) for y, x in corners]], dtype=torch.int32)
    masks = torch.zeros(len(corners), 64, 64, dtype=torch.bool)
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y : y + 9, x : x + 7] = True
    shared = (masks[:, None] & masks[None]).sum((2, 3))
    joined = (masks[:, None] | masks[None]).sum((2, 3))
    assert torch.allclose(box_iou(boxes)[0], shared / joined)


@given(seed=st.integers(0, 2**31), epoch=st.integers(0, 99), count=st.integers(1, 6))
def test_crops_from_a_pool_are_different_places_of_it(seed: int, epoch: int, count: int) -> None:
    frames, ids = np.array([[400, 700], [300, 240]]), np.array([4, 9])
    pool = pool_boxes(ids, frames, size=224, pool=6)
    drawn = random_boxes(ids, frames, size=224, count=count, seed=seed, epoch=epoch, pool=6)
    for places, boxes in zip(pool, drawn, strict=True):
        indices = [int(np.flatnonzero((places == box).all(axis=1))[0]) for box in boxes]
        assert len(set(indices)) == count
    assert _inside(pool, frames, 224)


def test_every_place_of_a_pool_is_drawn_equally_often() -> None:
    frames, ids = np.array([[4000, 7000]]), np.array([4])
    pool = pool_boxes(ids, frames, size=224, pool=6)[0]
    hits = np.zeros(6)
    for epoch in range(3000):
        drawn = random_boxes(ids, frames, size=224, count=2, seed=1, epoch=epoch, pool=6)[0]
        hits += (pool[:, None] == drawn).all(-1).any(-1)
    # 1000 expected each; the deviation of a fair draw is 26.
    assert np.all(np.abs(hits - 1000) < 130)


def test_a_pool_smaller_than_the_draw_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set crops\.pool to at least 10"):
        CropConfig(random=10, pool=8)


@pytest.mark.parametrize(
    ("frame", "count", "ys", "xs"),
    [
        ((512, 768), 10, [0, 288], [0, 136, 272, 408, 544]),
        ((384, 384), 25, [0, 40, 80, 120, 160], [0, 40, 80, 120, 160]),
    ],
    ids=["512x768", "384x384"],
)
def test_the_worked_examples_of_the_grid_are_what_is_cut(frame, count, ys, xs) -> None:
    """docs/scoring.md, "Where crops lie: the grid, as a formula"."""
    crops = CropConfig(evaluation=count)
    boxes = evaluation_boxes(np.array([0]), np.array([frame]), crops)[0]
    assert boxes[:, :2].tolist() == [[y, x] for y in ys for x in xs]
