import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import build
from shards.build.pack import PackOptions
from shards.build.plan import ShardSize
from shards.build.reshard import reshard
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.sample import DataSet
from shards.score_scale import ScoreScale
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split
from shards.verify import verify


def test_another_shard_size_keeps_ids_bytes_labels_and_splits(
    packed: ShardSet, tmp_path: Path
) -> None:
    split = make_splits(packed, repeats=1)[0]
    write_split(packed.root, split)
    reshard([packed], tmp_path / "new", size=ShardSize(samples=4), workers=1)
    new = open_set(tmp_path / "new")
    assert [shard.samples for shard in new.manifest.shards] == [4, 4, 4]
    assert [(id, data) for id, data, _ in new] == [(id, data) for id, data, _ in packed]
    for column in ("mos", "mos_std", "group", "level", "part", "sha256"):
        np.testing.assert_array_equal(getattr(new.samples, column), getattr(packed.samples, column))
    assert load_split(new, split.name).hash == split.hash
    assert verify(tmp_path / "new", deep=True).ok


def test_resharding_to_the_same_size_gives_the_same_bytes(packed: ShardSet, tmp_path: Path) -> None:
    reshard([packed], tmp_path / "new", size=ShardSize(samples=5), workers=1)
    assert open_set(tmp_path / "new").manifest.shards == packed.manifest.shards


def test_merged_sets_share_one_scale_and_keep_their_own(
    packed: ShardSet, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    scale = ScoreScale(kind="dmos", low=0.0, high=10.0, higher_is_better=False)
    build(dataclasses.replace(table(8, name="other"), score=scale), tmp_path / "o", workers=1)
    other = open_set(tmp_path / "o")
    reshard([packed, other], tmp_path / "both", name="both", workers=1)
    both = open_set(tmp_path / "both")
    np.testing.assert_allclose(
        both.unit_mos(), np.concatenate([packed.unit_mos(), other.unit_mos()]), atol=1e-12
    )
    first, second = both.manifest.members
    assert (first.name, first.first_id, first.rows) == ("mine", 0, 12)
    assert (second.score, second.first_id, second.rows) == (scale, 12, 8)
    assert second.score is not None
    raw = second.score.from_unit(both.samples.mos[12:])
    np.testing.assert_allclose(raw, other.samples.mos, atol=1e-12)
    np.testing.assert_allclose(both.samples.mos_std[12:] * 10, other.samples.mos_std)
    assert both.samples.path[12] == "other/Photo 0.v1.png"
    assert verify(tmp_path / "both", deep=True).ok


def test_groups_of_merged_sets_stay_apart(
    packed: ShardSet, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(8, name="other"), tmp_path / "o", workers=1)
    reshard([packed, open_set(tmp_path / "o")], tmp_path / "both", name="both", workers=1)
    assert np.unique(open_set(tmp_path / "both").samples.group_key).size == 8


def test_merging_needs_a_name_and_different_sets(packed: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="give it a name"):
        reshard([packed, packed], tmp_path / "x")
    with pytest.raises(ShardError, match="two of the sets are called the same"):
        reshard([packed, packed], tmp_path / "x", name="x")


def test_rejected_rows_keep_their_place(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    dataset = table()
    files = [sample.file for sample in dataset.samples()]
    files[4].write_bytes(b"no image")
    options = PackOptions(on_error="skip")
    build(dataset, tmp_path / "a", workers=1, options=options)
    one = open_set(tmp_path / "a")
    reshard([one], tmp_path / "b", size=ShardSize(samples=3), workers=1)
    again = open_set(tmp_path / "b")
    assert again.ids().tolist() == one.ids().tolist()
    assert again.read_bytes(5) == one.read_bytes(5)


def test_a_set_is_not_packed_again_into_itself(packed: ShardSet) -> None:
    with pytest.raises(ShardError, match="into itself; give another `--output`"):
        reshard([packed], packed.root, size=ShardSize(samples=3), workers=1)
