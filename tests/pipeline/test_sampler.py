import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import sampler as sampler_module
from pipeline.sampler import DistributedSampler, images_by_rank, permute, permute_by_rounds

sizes = st.integers(1, 300)
batches = st.integers(1, 17)
worlds = st.integers(1, 9)
seeds = st.integers(0, 2**63)


def _whole_epoch(order: DistributedSampler, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """[steps, world, b] places and their validity."""
    dealt = [
        [order.batch(epoch=epoch, step=step, rank=rank) for rank in range(order.world_size)]
        for step in range(order.steps)
    ]
    places = np.array([[places for places, _ in ranks] for ranks in dealt])
    valid = np.array([[valid for _, valid in ranks] for ranks in dealt])
    return places, valid


@settings(deadline=None)
@given(n=sizes, batch=batches, world=worlds, seed=seeds, epoch=st.integers(0, 1000))
def test_every_sample_appears_exactly_once_per_epoch(
    n: int, batch: int, world: int, seed: int, epoch: int
) -> None:
    order = DistributedSampler(samples=n, batch_size=batch, world_size=world, seed=seed)
    places, valid = _whole_epoch(order, epoch)
    assert sorted(places[valid].tolist()) == list(range(n))


@settings(deadline=None)
@given(n=sizes, batch=batches, world=worlds)
def test_padding_fills_the_last_step_only_and_evenly(n: int, batch: int, world: int) -> None:
    order = DistributedSampler(samples=n, batch_size=batch, world_size=world, seed=3)
    places, valid = _whole_epoch(order, 0)
    assert valid[:-1].all()
    assert valid.size - valid.sum() < batch * world
    per_rank = valid[-1].sum(axis=1)
    assert per_rank.max() - per_rank.min() <= 1
    assert places.min() >= 0
    assert places.max() < n


@settings(deadline=None)
@given(n=sizes, batch=batches, world=worlds)
def test_images_of_a_rank_follow_from_those_of_all_ranks(n: int, batch: int, world: int) -> None:
    order = DistributedSampler(samples=n, batch_size=batch, world_size=world, seed=3)
    _, valid = _whole_epoch(order, 0)
    for step, per_rank in enumerate(valid.sum(axis=2).tolist()):
        assert images_by_rank(order.images(step=step), world) == tuple(per_rank)


@settings(deadline=None)
@given(n=sizes, batch=batches, world=worlds, seed=seeds)
def test_the_global_order_does_not_know_the_world_size(
    n: int, batch: int, world: int, seed: int
) -> None:
    alone = DistributedSampler(samples=n, batch_size=batch * world, seed=seed)
    together = DistributedSampler(samples=n, batch_size=batch, world_size=world, seed=seed)
    assert alone.steps == together.steps
    for step in range(alone.steps):
        one, _ = alone.batch(epoch=5, step=step, rank=0)
        ranks = [together.batch(epoch=5, step=step, rank=rank)[0] for rank in range(world)]
        assert np.array_equal(np.stack(ranks, axis=1).reshape(-1), one)


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = {
        tuple(
            DistributedSampler(samples=50, batch_size=50, seed=seed).batch(
                epoch=epoch, step=0, rank=0
            )[0]
        )
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


def test_without_shuffling_the_splits_own_order_is_kept() -> None:
    order = DistributedSampler(samples=7, batch_size=4, shuffle=False)
    assert order.batch(epoch=9, step=1, rank=0)[0].tolist() == [4, 5, 6, 0]
    assert order.batch(epoch=9, step=1, rank=0)[1].tolist() == [True, True, True, False]


@pytest.mark.parametrize("name", ["samples", "batch_size", "world_size"])
def test_an_order_of_nothing_is_refused(name: str) -> None:
    sizes = {"samples": 5, "batch_size": 5, "world_size": 5, name: 0}
    with pytest.raises(ValueError, match=f"{name} of an order is 0"):
        DistributedSampler(**sizes)


@pytest.mark.parametrize(("step", "rank"), [(-1, 0), (3, 0), (0, 2), (0, -1)])
def test_a_step_or_rank_beyond_the_end_is_refused(step: int, rank: int) -> None:
    order = DistributedSampler(samples=10, batch_size=2, world_size=2)
    with pytest.raises(ValueError, match="was asked of"):
        order.batch(epoch=0, step=step, rank=rank)


@settings(deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**64 - 1))
def test_the_pseudorandom_permutation_is_a_bijection(n: int, key: int) -> None:
    image = permute_by_rounds(np.arange(n), n, key=key)
    assert np.array_equal(np.sort(image), np.arange(n))


@settings(max_examples=3, deadline=None)
@given(n=st.integers(sampler_module.TABLE_LIMIT, 3 * sampler_module.TABLE_LIMIT))
def test_the_pseudorandom_permutation_of_millions_is_a_bijection(n: int) -> None:
    image = permute(np.arange(n), n, key=n)
    assert np.array_equal(np.bincount(image, minlength=n), np.ones(n, dtype=np.int64))


@settings(deadline=None)
@given(n=st.integers(2, 5000), key=st.integers(0, 2**64 - 1), start=st.integers(0, 4999))
def test_a_place_goes_where_it_goes_whoever_asks(n: int, key: int, start: int) -> None:
    whole = permute_by_rounds(np.arange(n), n, key=key)
    some = np.arange(start % n, n, 3)
    assert np.array_equal(permute_by_rounds(some, n, key=key), whole[some])


@pytest.mark.parametrize("permutation", [permute, permute_by_rounds], ids=["table", "rounds"])
def test_every_place_is_equally_likely(permutation: object) -> None:
    n, keys = 16, 1500
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), permutation(np.arange(n), n, key=key * 7919)] += 1
    # 225 degrees of freedom: beyond 295 once in a thousand.
    assert ((counts - keys / n) ** 2 / (keys / n)).sum() < 295


@pytest.mark.parametrize("permutation", [permute, permute_by_rounds], ids=["table", "rounds"])
def test_neighbours_do_not_stay_together(permutation: object) -> None:
    n = 20_000
    image = permutation(np.arange(n), n, key=42).astype(float)
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 4 / np.sqrt(n)


def test_the_order_of_a_hundred_million_samples_takes_no_memory() -> None:
    tracemalloc.start()
    order = DistributedSampler(samples=100_000_000, batch_size=64, world_size=8, seed=1)
    seen = [order.batch(epoch=0, step=order.steps - 1 - step, rank=7)[0] for step in range(20)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.unique(np.concatenate(seen)).size == 20 * 64
    assert peak < 1_000_000
