import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shards.build.build import build
from shards.build.pack import PackOptions
from shards.build.plan import ShardSize
from shards.build.reshard import reshard
from shards.datasets.table import open_table
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
    packed: ShardSet, tmp_path: Path, table: Callable[..., DataSet], picture: Callable[..., bytes]
) -> None:
    other = table(8, name="other")
    for k, sample in enumerate(other.samples()):
        sample.file.write_bytes(picture(100 + k))
    build(other, tmp_path / "o", workers=1)
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


def test_one_set_gets_another_name_and_keeps_its_splits(packed: ShardSet, tmp_path: Path) -> None:
    split = make_splits(packed, repeats=1)[0]
    write_split(packed.root, split)
    reshard([packed], tmp_path / "new", name="other", workers=1)
    new = open_set(tmp_path / "new")
    assert (new.name, load_split(new, split.name).set) == ("other", "other")
    assert [data for _, data, _ in new] == [data for _, data, _ in packed]
    assert verify(tmp_path / "new", deep=True).ok


def test_two_packings_of_one_set_join_by_the_way_the_error_names(
    packed: ShardSet, tmp_path: Path
) -> None:
    with pytest.raises(
        ShardError, match=r"called the same .*`lmcl-shard reshard (.*) --name mine-2"
    ):
        reshard([packed, packed], tmp_path / "both", name="both")
    reshard([packed], f"{packed.root}-2", name="mine-2", workers=1)
    again = open_set(f"{packed.root}-2")
    reshard([packed, again], tmp_path / "both", name="both", workers=1)
    both = open_set(tmp_path / "both")
    assert both.samples.part.tolist() == packed.samples.part.tolist() * 2
    # The same images: each with its twin, whatever split is drawn.
    assert np.array_equal(both.samples.group_key[:12], both.samples.group_key[12:])
    for split in (*make_splits(both, repeats=3), *make_splits(both, protocol="official")):
        for part in (split.train, split.val, split.test):
            assert set((part + 12) % 24) == set(part)


def test_an_image_that_one_set_trains_on_and_another_tests_on_is_left_out_of_train(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    sets = []
    for name, part in (("one", "train"), ("two", "test")):
        (tmp_path / name).mkdir()
        rows = ["path,score,split"]
        for k in range(4):
            # The first image is the same in both.
            data = picture(0 if k == 0 else 10 + k + 100 * (name == "two"))
            (tmp_path / name / f"{k}.png").write_bytes(data)
            other = {"train": "test", "test": "train"}[part]
            rows.append(f"{k}.png,{k},{part if k < 2 else other}")
        (tmp_path / f"{name}.csv").write_text("\n".join(rows) + "\n")
        build(open_table(tmp_path / f"{name}.csv", images=tmp_path / name, name=name),
              tmp_path / f"{name}-set", workers=1)  # fmt: skip
        sets.append(open_set(tmp_path / f"{name}-set"))
    reshard(sets, tmp_path / "both", name="both", workers=1)
    both = open_set(tmp_path / "both")
    (split,) = make_splits(both, protocol="official", val_fraction=0)
    assert (split.train.tolist(), split.test.tolist()) == ([1, 6, 7], [2, 3, 4, 5])
    assert "1 images are left out" in split.note


def test_labels_that_leave_their_scale_do_not_leave_0_to_1(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    scale = ScoreScale(kind="dmos", low=1.0, high=4.0, higher_is_better=False)
    wild = dataclasses.replace(table(8, name="wild"), score=scale, is_checked=False)
    build(wild, tmp_path / "w", workers=1)
    build(table(6, name="tame"), tmp_path / "t", workers=1)
    told: list[str] = []
    sets = [open_set(tmp_path / "w"), open_set(tmp_path / "t")]
    reshard(sets, tmp_path / "b", name="b", workers=1, tell=lambda plan: told.extend(plan.notes))
    both = open_set(tmp_path / "b")
    assert (both.samples.mos.min(), both.samples.mos.max()) == (0.0, 1.0)
    member = both.manifest.members[0]
    assert member.score is not None
    assert (member.score.low, member.score.high) == (0.0, 4.0)
    np.testing.assert_allclose(member.score.from_unit(both.samples.mos[:8]), sets[0].samples.mos)
    assert any("its scores leave its scale dmos 1..4" in line for line in told)
