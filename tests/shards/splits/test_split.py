import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.splits.draw import make_splits
from shards.splits.split import (
    PARTS,
    _are_apart,
    load_split,
    split_hash,
    write_split,
)


def test_a_written_split_is_read_back(packed: ShardSet) -> None:
    split = make_splits(packed, repeats=1)[0]
    name = write_split(packed.root, split)
    assert name == "splits/70-10-20-seed123-00.json"
    for way in (split.name, name, f"{packed.root}/{name}"):
        again = load_split(packed, way)
        assert again.hash == split.hash
        np.testing.assert_array_equal(again.train, split.train)


def test_an_unknown_split_lists_those_there_are(packed: ShardSet) -> None:
    write_split(packed.root, make_splits(packed, repeats=1)[0])
    with pytest.raises(ShardError, match="there are 70-10-20-seed123-00") as caught:
        load_split(packed, "nope")
    assert caught.value.exit_code == 4


def rewrite(packed: ShardSet, **changes: object) -> str:
    split = make_splits(packed, repeats=1)[0]
    path = Path(packed.root) / write_split(packed.root, split)
    fields = msgspec.json.decode(path.read_bytes())
    fields.update(changes)
    ids = [np.array(fields[part], np.int64) for part in PARTS]
    if "hash" not in changes:
        fields["hash"] = split_hash(split.ids_sha256, split.protocol, 123, 1, 0, ids)
    path.write_bytes(msgspec.json.encode(fields))
    return split.name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": [0, 1, 2, 3], "val": [], "test": [4]}, "leaks: 1 groups are in both train and"),
        ({"train": [0, 4], "val": [0], "test": [1]}, "an id is in it twice"),
        ({"train": [0], "val": [], "test": [12]}, "ids outside"),
        ({"hash": "0" * 64}, "its ids do not match its hash"),
        ({"ids_sha256": "0" * 64}, "other images"),
        ({"train": "all"}, "not a split file"),
        ({"surprise": 1}, "not a split file"),
    ],
)
def test_a_split_that_is_not_right_is_refused_on_load(
    packed: ShardSet, changes: dict[str, object], message: str
) -> None:
    if isinstance(changes.get("train"), str):
        changes = {**changes, "hash": "x"}
        name = make_splits(packed, repeats=1)[0].name
        path = Path(packed.root) / write_split(packed.root, make_splits(packed, repeats=1)[0])
        fields = msgspec.json.decode(path.read_bytes())
        path.write_bytes(msgspec.json.encode({**fields, **changes}))
    else:
        name = rewrite(packed, **changes)
    with pytest.raises(ShardError, match=message) as caught:
        load_split(packed, name)
    assert caught.value.exit_code == 3


def test_ids_survive_another_shard_size(tmp_path: Path, packed: ShardSet) -> None:
    split = make_splits(packed, repeats=1)[0]
    from shards.datasets.table import open_table

    dataset = open_table(tmp_path / "mine.csv", images=tmp_path / "mine", name="mine")
    build(dataset, tmp_path / "other", workers=1, size=ShardSize(samples=3))
    write_split(tmp_path / "other", split)
    assert load_split(open_set(tmp_path / "other"), split.name).hash == split.hash


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 50))
def test_the_hash_covers_what_decides_a_result(seed: int, index: int) -> None:
    ids = [np.arange(5), np.arange(5, 6), np.arange(6, 8)]
    first = split_hash("set", "70-10-20", seed, 1, index, ids)
    assert first != split_hash("set", "70-10-20", seed + 1, 1, index, ids)
    assert first != split_hash("set", "70-10-20", seed, 1, index, [*ids[:2], np.arange(6, 9)])
    # Moving an id from one part to the next leaves the bytes of the lists in the same order.
    moved = [np.arange(4), np.arange(4, 6), np.arange(6, 8)]
    assert first != split_hash("set", "70-10-20", seed, 1, index, moved)


def test_part_refuses_other_names(packed: ShardSet) -> None:
    split = dataclasses.replace(make_splits(packed, repeats=1)[0])
    with pytest.raises(ShardError, match="there are train, val, test"):
        split.part("training")


@given(parts=st.lists(st.lists(st.integers(-9, 9), max_size=8), min_size=3, max_size=3))
def test_parts_are_apart_if_and_only_if_no_group_is_in_two_of_them(parts: list[list[int]]) -> None:
    sets = [set(part) for part in parts]
    expected = not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert _are_apart([np.array(part, np.int64) for part in parts]) == expected


_HOSTILE: dict[str, Any] = {
    "format_version": (2, -1, None, "1", 10**4999),
    "name": ("\x1b[2J", "../../x", 7, None),
    "protocol": ("\x1b[2J", None, []),
    "seed": (10**4999, 1.5, None, -(2**80)),
    "algorithm": (10**4999, "1"),
    "index": (10**4999, True),
    "set": ("\x1b[2J" * 9000, None),
    "ids_sha256": ("", "0" * 64, "\ud800", None),
    "hash": ("", "\ud800", 7),
    "note": ("\x1b[2J\nerror: x" * 9000, None),
    "counts": ({}, {"train": -1}, {"train": 2**70}, {"train": 10**15}, None, []),
    "train": (None, {}, [[1]], [1.5], ["1"], [True], [-1], [2**63], [10**4999], [99], [0, 0], []),
    "extra": (1,),
}


@pytest.mark.parametrize("shares", [False, True], ids=["in memory", "kept"])
def test_a_hostile_split_is_refused_in_one_sentence(
    packed: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shares: bool
) -> None:
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    if shares:
        monkeypatch.setattr("shards.sample_table.SHARED_FROM_ROWS", 1)
    sys.set_int_max_str_digits(0)
    path = Path(packed.root) / write_split(packed.root, make_splits(packed, repeats=1)[0])
    good = json.loads(path.read_bytes())
    cases = [json.dumps(good | {key: value}) for key in _HOSTILE for value in _HOSTILE[key]]
    cases += ["", "[]", "[" * 100_000, "\0", '{"train": [' + "1," * 10]
    sys.set_int_max_str_digits(4300)
    accepted, refusals = [], []
    for text in cases:
        path.write_text(text, encoding="utf-8")
        try:
            load_split(open_set(packed.root), str(path))
        except ShardError as error:
            refusals.append(error)
        else:
            accepted.append(text)
    for error in refusals:
        assert str(error).isprintable()
        assert len(str(error).encode()) <= 2048
        assert error.exit_code in (3, 4)
    # What a hash cannot cover: the counts and the note beside the ids, and the split's own name.
    assert all(json.loads(text)["train"] == good["train"] for text in accepted)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ShardError, match="FIFO"):
        load_split(packed, str(path))
