from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.build.build import build
from shards.datasets.unlabelled import open_unlabelled
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.sample import DataSet
from shards.splits.draw import make_splits, part_sizes
from shards.splits.split import (
    PARTS,
    Protocol,
    Split,
)


@pytest.fixture
def large(tmp_path: Path, table: Callable[..., DataSet]) -> ShardSet:
    """Ninety images of thirty contents, three each."""
    build(table(90, groups=30), tmp_path / "large", workers=1)
    return open_set(tmp_path / "large")


def all_ids(split: Split) -> list[int]:
    return sorted(np.concatenate([split.part(part) for part in PARTS]).tolist())


@pytest.mark.parametrize("protocol", ["70-10-20", "80-20", "k-fold"])
def test_a_split_holds_every_sample_once_and_no_group_twice(
    large: ShardSet, protocol: Protocol
) -> None:
    for split in make_splits(large, protocol=protocol):
        assert all_ids(split) == list(range(90))
        groups = [set(large.samples.group[split.part(part)]) for part in PARTS]
        assert sum(len(group) for group in groups) == 30


def test_proportions_are_those_of_the_name(large: ShardSet) -> None:
    for split in make_splits(large):
        assert [split.part(part).size for part in PARTS] == [63, 9, 18]


def test_repeats_differ_and_seeds_repeat(large: ShardSet) -> None:
    first, again = make_splits(large), make_splits(large)
    other = make_splits(large, seed=124)
    assert [s.hash for s in first] == [s.hash for s in again]
    tests = {tuple(split.test.tolist()) for split in [*first, *other]}
    assert len(tests) == 20


def test_every_group_is_tested_by_some_repeat(large: ShardSet) -> None:
    tested = {id for split in make_splits(large, repeats=30) for id in split.test.tolist()}
    assert len(tested) == 90


def test_parts_have_the_scores_of_the_whole(large: ShardSet) -> None:
    mos = large.samples.mos
    gaps = [abs(mos[split.test].mean() - mos.mean()) for split in make_splits(large)]
    rng = np.random.default_rng(0)
    blind = [abs(mos[rng.permutation(90)[:18]].mean() - mos.mean()) for _ in range(200)]
    assert np.mean(gaps) < np.mean(blind)


def test_the_draw_does_not_depend_on_the_order_of_rows(tmp_path: Path, large: ShardSet) -> None:
    lines = (tmp_path / "mine.csv").read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    from shards.datasets.table import open_table

    dataset = open_table(tmp_path / "turned.csv", images=tmp_path / "mine", name="mine")
    build(dataset, tmp_path / "turned", workers=1)
    turned = open_set(tmp_path / "turned")
    for one, other in zip(make_splits(large), make_splits(turned), strict=True):
        assert set(large.samples.path[one.test]) == set(turned.samples.path[other.test])


def test_official_keeps_the_parts_of_the_set(packed: ShardSet) -> None:
    (split,) = make_splits(packed, protocol="official")
    part = packed.samples.part
    for name in PARTS:
        assert set(part[split.part(name)]) == {name}
    assert split.name == "official"


def test_official_val_is_carved_out_of_train(tmp_path: Path, large: ShardSet) -> None:
    text = (tmp_path / "mine.csv").read_text().replace(",val\n", ",train\n")
    (tmp_path / "mine.csv").write_text(text)
    from shards.datasets.table import open_table

    build(open_table(tmp_path / "mine.csv", images=tmp_path / "mine"), tmp_path / "b", workers=1)
    shard_set = open_set(tmp_path / "b")
    (split,) = make_splits(shard_set, protocol="official", val_fraction=0.2)
    (bare,) = make_splits(shard_set, protocol="official", val_fraction=0.0)
    assert bare.val.size == 0
    assert "no val part" in bare.note
    assert sorted([*split.train.tolist(), *split.val.tolist()]) == bare.train.tolist()
    assert split.test.tolist() == bare.test.tolist()
    assert 0.1 < split.val.size / bare.train.size < 0.3


def test_folds_are_disjoint_and_complete(large: ShardSet) -> None:
    splits = make_splits(large, protocol="k-fold", folds=5)
    tests = np.concatenate([split.test for split in splits])
    assert sorted(tests.tolist()) == list(range(90))
    for split, after in zip(splits, [*splits[1:], splits[0]], strict=True):
        assert split.val.tolist() == after.test.tolist()


def test_a_left_out_family_is_only_in_test(large: ShardSet) -> None:
    splits = make_splits(large, protocol="leave-one-distortion-out", repeats=1)
    family = large.samples.distortion
    assert [split.name for split in splits] == ["without-a-seed123-00", "without-b-seed123-00"]
    for split, name in zip(splits, "ab", strict=True):
        assert set(family[split.test]) == {name}
        assert name not in set(family[split.train]) | set(family[split.val])


def test_fractions_are_nested_and_test_on_the_same_images(large: ShardSet) -> None:
    parts = [
        make_splits(large, protocol="fraction", fraction=f, repeats=1)[0] for f in (0.2, 0.4, 1.0)
    ]
    assert (
        set(parts[0].train.tolist()) < set(parts[1].train.tolist()) < set(parts[2].train.tolist())
    )
    whole = make_splits(large, repeats=1)[0]
    assert parts[2].train.tolist() == whole.train.tolist()
    assert all(split.test.tolist() == whole.test.tolist() for split in parts)


def test_fractions_of_the_sets_own_train_part_leave_its_other_parts_alone(large: ShardSet) -> None:
    (whole,) = make_splits(large, protocol="official")
    few, more = (
        make_splits(large, protocol="official-fraction", fraction=f, repeats=2) for f in (0.2, 0.6)
    )
    assert [split.name for split in few] == ["official20-seed123-00", "official20-seed123-01"]
    assert few[0].train.tolist() != few[1].train.tolist()
    for small, large_one in zip(few, more, strict=True):
        kept = set(small.train.tolist())
        assert kept < set(large_one.train.tolist()) < set(whole.train.tolist())
        assert 0.1 < len(kept) / whole.train.size < 0.3
        assert small.val.tolist() == whole.val.tolist()
        assert small.test.tolist() == whole.test.tolist()


@given(
    groups=st.integers(3, 400),
    shares=st.sampled_from([(0.7, 0.1, 0.2), (0.8, 0.0, 0.2), (0.9, 0.1, 0.0)]),
)
def test_part_sizes_add_up_and_leave_no_wanted_part_empty(
    groups: int, shares: tuple[float, float, float]
) -> None:
    sizes = part_sizes(groups, shares)
    assert sum(sizes) == groups
    assert all((size > 0) == (share > 0) for size, share in zip(sizes, shares, strict=True))
    assert all(abs(size - groups * share) <= 1.5 for size, share in zip(sizes, shares, strict=True))


def test_too_few_groups_are_refused(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    build(table(6, groups=2), tmp_path / "two", workers=1)
    with pytest.raises(ShardError, match="2 groups cannot be dealt into 3 parts"):
        make_splits(open_set(tmp_path / "two"))


def test_a_set_without_labels_cannot_be_split(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    table(6)
    build(open_unlabelled(tmp_path / "mine"), tmp_path / "out", workers=1)
    with pytest.raises(ShardError, match="no labelled image"):
        make_splits(open_set(tmp_path / "out"))


# --- files -----------------------------------------------------------------------------------
