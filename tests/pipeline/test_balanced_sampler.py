"""Images drawn evenly over ranges of their score, alike on any number of ranks."""

from itertools import pairwise

import numpy as np
import pytest

from pipeline.balanced_sampler import BalancedSampler, score_ranges
from pipeline.boxes import random_boxes


def sampler(
    sizes: tuple[int, ...], *, batch: int, world: int = 1, seed: int = 1
) -> BalancedSampler:
    ends = np.cumsum([0, *sizes])
    ranges = tuple(np.arange(a, b) for a, b in pairwise(ends))
    return BalancedSampler(ranges=ranges, batch_size=batch, world_size=world, seed=seed)


SHAPES = [((2, 30, 5), 8), ((1, 1, 1), 3), ((40,), 7), ((3, 3, 90, 4), 16), ((10, 11), 5)]
IDS = ["rare", "ones", "one-range", "caps", "even"]


@pytest.mark.parametrize(("sizes", "batch"), SHAPES, ids=IDS)
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_step_has_no_image_twice_and_ranges_as_evenly_as_they_can(
    sizes: tuple[int, ...], batch: int, epoch: int
) -> None:
    order = sampler(sizes, batch=batch)
    ends = np.cumsum(sizes)
    seen = np.zeros(sum(sizes), dtype=int)
    for step in range(order.steps):
        positions, valid = order.batch(epoch=epoch, step=step, rank=0)
        repeats = order.repeats(epoch=epoch, step=step, rank=0)
        taken = positions[valid]
        assert len(set(taken.tolist())) == len(taken) == order.images(step=step)
        assert np.array_equal(repeats[valid], seen[taken])
        seen[taken] += 1
        counts = np.bincount(np.searchsorted(ends, taken, side="right"), minlength=len(sizes))
        free = counts < np.array(sizes)
        assert not free.any() or counts.max() - counts[free].min() <= 1
    drawn = np.split(seen, ends[:-1])
    assert all(one.max() - one.min() <= 1 for one in drawn)
    assert [one.sum() for one in drawn] == order.draws().tolist()
    assert seen.sum() == order.samples


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_order_does_not_know_the_number_of_ranks(world: int) -> None:
    alone, shared = sampler((5, 21, 9), batch=8), sampler((5, 21, 9), batch=8 // world, world=world)
    for step in range(alone.steps):
        whole, valid = alone.batch(epoch=2, step=step, rank=0)
        parts = [shared.batch(epoch=2, step=step, rank=rank) for rank in range(world)]
        assert np.array_equal(np.stack([p for p, _ in parts], axis=1).ravel(), whole)
        assert np.array_equal(np.stack([v for _, v in parts], axis=1).ravel(), valid)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        order = sampler((50, 50), batch=20, seed=seed)
        found: list[int] = order.batch(epoch=epoch, step=0, rank=0)[0].tolist()
        return found

    assert first(1, 0) == first(1, 0)
    assert first(1, 0) != first(1, 1)
    assert first(1, 0) != first(2, 0)


def test_over_epochs_every_image_has_its_turn() -> None:
    order, seen = sampler((4, 60), batch=8), set()
    for epoch in range(8):
        for step in range(order.steps):
            seen |= set(order.batch(epoch=epoch, step=step, rank=0)[0].tolist())
    assert len(seen) == 64


def test_ranges_are_equally_wide_and_none_is_empty() -> None:
    score = np.array([1.0, 1.1, 2.9, 5.0, 4.9, 3.0])
    found = [one.tolist() for one in score_ranges(score, 4)]
    assert found == [[0, 1], [2], [5], [3, 4]]
    assert [one.tolist() for one in score_ranges(score[:4], 4)] == [[0, 1], [2], [3]]
    assert [one.tolist() for one in score_ranges(np.full(3, 2.0), 5)] == [[0, 1, 2]]


@pytest.mark.parametrize("pool", [None, 9])
def test_an_image_shown_again_in_an_epoch_has_other_crops(pool: int | None) -> None:
    ids, frames = np.array([7, 8]), np.full((2, 2), 500)
    how = {"size": 32, "count": 4, "seed": 3, "epoch": 1, "pool": pool}
    plain = random_boxes(ids, frames, **how)
    again = random_boxes(ids, frames, **how, repeats=np.array([1, 0]))
    assert np.array_equal(plain[1], again[1])
    assert not np.array_equal(plain[0], again[0])
