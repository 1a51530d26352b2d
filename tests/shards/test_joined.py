"""Sets as one without packing: rows, bytes and scores are their own, and those of a merged set."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from pipeline.boxes import CropConfig
from pipeline.loader import Loader
from pipeline.sampler import SetDraw
from shards.build.build import build
from shards.build.reshard import reshard
from shards.datasets.demo import open_demo, write_demo
from shards.errors import ShardError
from shards.joined import JoinedSet, join_sets, join_splits
from shards.read import ShardSet, open_set
from shards.splits.draw import make_splits
from shards.splits.split import Split, make_split


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[ShardSet]:
    """Two synthetic sets with no image in common."""
    found = []
    for name, seed in (("one", 1), ("two", 2)):
        folder = tmp_path_factory.mktemp(name)
        labels = write_demo(folder / "images", contents=2 + seed, seed=seed)
        dataset = dataclasses.replace(open_demo(labels.parent), name=name)
        build(dataset, folder / "shards", workers=1)
        found.append(open_set(folder / "shards"))
    return found


@pytest.fixture(scope="module")
def joined(sets: list[ShardSet]) -> JoinedSet:
    return join_sets(sets)


def first_split(one: ShardSet) -> Split:
    return make_splits(one, repeats=1)[0]


def test_every_row_has_the_bytes_of_its_own_set(sets, joined) -> None:
    at = len(sets[0].samples)
    assert len(joined.samples) == at + len(sets[1].samples)
    for id in (0, at - 1, at, at + 5):
        number = int(id >= at)
        assert joined.read_bytes(id) == sets[number].read_bytes(id - number * at)
        assert joined.set_of(np.array([id])).tolist() == [number]


def test_columns_are_those_of_a_merged_set(sets, joined, tmp_path: Path) -> None:
    reshard(sets, tmp_path / "merged", name="merged", workers=1)
    merged = open_set(tmp_path / "merged").samples
    for name in ("mos", "mos_std", "group", "group_key", "path", "sha256", "width", "codec"):
        ours, theirs = getattr(joined.samples, name), getattr(merged, name)
        assert np.array_equal(ours, theirs, equal_nan=name.startswith("mos")), name


def test_a_loader_cuts_the_crops_of_both_sets(sets, joined) -> None:
    at, crops = len(sets[0].samples), CropConfig(size=32, evaluation=2)

    def crops_of(one: ShardSet, ids: list[int]) -> np.ndarray:
        loader = Loader(one, np.array(ids), crops=crops, batch_size=len(ids), mode="eval", seed=0)
        with loader:
            return next(iter(loader.epoch(0))).crops.numpy()

    together = crops_of(joined, [1, at + 2])
    assert np.array_equal(together[:1], crops_of(sets[0], [1]))
    assert np.array_equal(together[1:], crops_of(sets[1], [2]))


def test_parts_are_each_sets_own(sets, joined) -> None:
    own = [first_split(one) for one in sets]
    split = join_splits(joined, own)
    for part in ("train", "val", "test"):
        numbers = joined.set_of(split.part(part))
        for k, first in enumerate((0, len(sets[0].samples))):
            assert np.array_equal(split.part(part)[numbers == k] - first, own[k].part(part))


def test_an_image_of_two_sets_must_be_in_one_part(sets) -> None:
    one = sets[0]
    joined = join_sets([one, one], ["a", "b"])
    split = first_split(one)
    join_splits(joined, [split, split])
    swapped = make_split(one, "x", "imported", 0, 0, [split.test, split.val, split.train])
    with pytest.raises(ShardError, match=r"images are in the train part of one set.*e\.g\. a/"):
        join_splits(joined, [split, swapped])


def test_the_same_name_twice_is_refused(sets) -> None:
    with pytest.raises(ShardError, match='name = "one-2"'):
        join_sets([sets[0], sets[0]])


@pytest.mark.parametrize(
    ("exponent", "counts"), [(1.0, (100, 40, 10)), (0.5, (32, 20, 10)), (0.0, (10, 10, 10))]
)
def test_sets_share_an_epoch_by_the_exponent(exponent: float, counts: tuple[int, ...]) -> None:
    draw = SetDraw(sizes=(100, 40, 10), exponent=exponent, seed=3)
    assert draw.counts == counts
    for epoch in range(3):
        found = draw.positions(epoch)
        assert len(np.unique(found)) == len(found) == sum(counts)
        assert np.array_equal(np.histogram(found, [0, 100, 140, 150])[0], counts)


def test_every_epoch_draws_others_of_the_larger_sets() -> None:
    draw = SetDraw(sizes=(50, 10), exponent=0.0, seed=0)
    first, second = draw.positions(0), draw.positions(1)
    assert np.array_equal(first, draw.positions(0))
    assert not np.array_equal(first, second)
    seen = np.unique(np.concatenate([draw.positions(epoch) for epoch in range(40)]))
    assert len(seen) == 60
