"""Several sets as one, without packing anything again: for runs that learn from all of them.

`join_sets(sets) -> JoinedSet` has the rows of all sets, one set after the other. Scores are in
0..1, higher is better, each by its own set's scale, as in a set that `lmcl-shard reshard` merged
(docs/decisions/0205); the manifest's `members` keep the scales. Bytes are read from the sets' own
shards.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.layout import key_of
from shards.manifest import Manifest
from shards.read import ShardSet
from shards.sample import Facts, Member
from shards.sample_table import SampleTable, group_key
from shards.score_scale import ScoreScale
from shards.splits.split import PARTS, Split, make_split

UNIT = ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True)
"""Of scores that come from several sets."""


@dataclass(frozen=True, kw_only=True)
class JoinedSet(ShardSet):
    """Rows of several sets in a row; `manifest.members` says whose are which."""

    sets: tuple[ShardSet, ...]

    @property
    def root(self) -> str:
        """Folders or URLs of all sets."""
        return ", ".join(one.root for one in self.sets)

    @property
    def named_version(self) -> str:
        """Names of all sets, with the versions of those that were updated."""
        names = [m.name for m in self.manifest.members]
        return " + ".join(
            one.named_version.replace(one.name, name, 1)
            for one, name in zip(self.sets, names, strict=True)
        )

    @property
    def names(self) -> tuple[str, ...]:
        """What the sets are called."""
        return tuple(member.name for member in self.manifest.members)

    def set_of(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of each row's set."""
        first = [member.first_id for member in self.manifest.members]
        return np.searchsorted(first, ids, side="right").astype(np.int64) - 1

    def scale_of(self, number: int) -> ScoreScale:
        """The scale that a set's scores were brought to 0..1 by."""
        score = self.manifest.members[number].score
        assert score is not None  # `join_sets` refuses sets without scores
        return score

    def shard_path(self, index: int) -> Path:
        """A shard of one of the sets, as `ShardSet.shard_path`."""
        for one in self.sets:
            if index < len(one.manifest.shards):
                return one.shard_path(index)
            index -= len(one.manifest.shards)
        raise IndexError(f"no shard {index} beyond the last one")

    def member_key(self, id: int) -> str:
        """The name of a sample's member in its tar, which knows its own set alone."""
        number = int(self.set_of(np.array([id]))[0])
        return key_of(self.sets[number].name, id - self.manifest.members[number].first_id)


def join_sets(sets: Sequence[ShardSet], names: Sequence[str] = ()) -> JoinedSet:
    """Several sets as one.

    Args:
        sets: In their order.
        names: What each is called in the joined one; empty, or an empty name: its own.

    Raises:
        ShardError: If a set has no scores, or two are called the same.
    """
    own = names or [""] * len(sets)
    called = [name or one.name for name, one in zip(own, sets, strict=True)]
    _check_sets(sets, called)
    scales = [covering_scale(one) for one in sets]
    members, first_id = [], 0
    for one, name, scale in zip(sets, called, scales, strict=True):
        rows = len(one.samples)
        members.append(Member(name=name, score=scale, first_id=first_id, rows=rows))
        first_id += rows
    manifests = [one.manifest for one in sets]
    return JoinedSet(
        store=sets[0].store,
        manifest=_join_manifests(manifests, members),
        samples=_JoinedTable(sets, called, scales),
        _copies=None,
        sets=tuple(sets),
    )


def join_splits(joined: JoinedSet, splits: Sequence[Split]) -> Split:
    """Each set's own parts together.

    Raises:
        ShardError: If two sets hold the same image, and in different parts.
    """
    first = [member.first_id for member in joined.manifest.members]
    parts = [
        np.concatenate([one.part(part) + at for one, at in zip(splits, first, strict=True)])
        for part in PARTS
    ]
    _check_apart(joined, parts)
    name = ", ".join(f"{set_}: {one.name}" for set_, one in zip(joined.names, splits, strict=True))
    note = " ".join(one.note for one in splits if one.note)
    return make_split(joined, name, "each set's own", 0, 0, parts, note=note)


def covering_scale(one: ShardSet) -> ScoreScale | None:
    """A set's scale, widened where its labels leave it (LIVE has negative scores)."""
    score, labels = one.score, one.manifest.labels
    if score is None or labels is None or score.low <= labels.low <= labels.high <= score.high:
        return score
    return dataclasses.replace(
        score, low=min(score.low, labels.low), high=max(score.high, labels.high)
    )


def shared_groups(sets: Sequence[ShardSet], names: Sequence[str]) -> dict[str, str]:
    """Groups that hold the same image in several sets, by their name in the joined set.

    All groups that are linked, directly or through others, get the name of the first of them.
    """
    keys = [_content_keys(s, s.ids()) for s in sets]
    every = np.concatenate(keys)
    values, counts = np.unique(every, return_counts=True)
    doubled = values[counts > 1]
    linked = _Linked()
    first: dict[bytes, str] = {}
    for one, name, own in zip(sets, names, keys, strict=True):
        for id in one.ids()[np.isin(own, doubled)].tolist():
            group = f"{name}/{one.samples.group[id]}"
            linked.link(first.setdefault(one.samples.sha256[id].tobytes(), group), group)
    return linked.names()


class _Linked:
    """Names that stand for one another."""

    def __init__(self) -> None:
        self._above: dict[str, str] = {}

    def link(self, first: str, second: str) -> None:
        first, second = self._root(first), self._root(second)
        if first != second:
            self._above[second] = first

    def names(self) -> dict[str, str]:
        return {name: self._root(name) for name in self._above}

    def _root(self, name: str) -> str:
        while name in self._above:
            name = self._above[name]
        return name


class _JoinedTable(SampleTable):
    """The sample tables of several sets, one after the other.

    `subset` is the set's name; paths and groups get it in front, as in merged sets.
    """

    def __init__(
        self, sets: Sequence[ShardSet], names: Sequence[str], scales: Sequence[ScoreScale | None]
    ) -> None:
        self.path_of_file = sets[0].samples.path_of_file
        self.files = None
        self._columns: dict[str, NDArray[Any]] = {}
        self._sets, self._names, self._scales = sets, names, scales
        self._linked: dict[str, str] | None = None

    def __len__(self) -> int:
        return sum(len(one.samples) for one in self._sets)

    def arrow(self, columns: list[str]) -> Iterable[pa.RecordBatch]:
        """All rows of some columns in one batch."""
        yield pa.record_batch({name: self._numpy(name) for name in columns})

    def _read(self, name: str) -> NDArray[Any]:
        if name == "id":
            return np.arange(len(self), dtype=np.int64)
        if name == "group_key":
            return np.array([group_key(group) for group in self.group], dtype=np.int64)
        return np.concatenate([self._of_set(number, name) for number in range(len(self._sets))])

    def _of_set(self, number: int, name: str) -> NDArray[Any]:
        one, called, scale = self._sets[number], self._names[number], self._scales[number]
        if name == "subset":
            return np.full(len(one.samples), called, dtype=object)
        column: NDArray[Any] = getattr(one.samples, name)
        if name == "shard":
            before = sum(len(s.manifest.shards) for s in self._sets[:number])
            return np.where(column < 0, column, column + before).astype(column.dtype)
        if name == "mos" and scale is not None:
            return scale.to_unit(column)
        if name == "mos_std" and scale is not None:
            return np.asarray(column / (scale.high - scale.low))
        if name == "group":
            if self._linked is None:
                self._linked = shared_groups(self._sets, self._names)
            full = (f"{called}/{text}" for text in column)
            return np.array([self._linked.get(text, text) for text in full], dtype=object)
        if name == "path":
            return np.array([f"{called}/{text}" for text in column], dtype=object)
        return column


def _check_sets(sets: Sequence[ShardSet], names: Sequence[str]) -> None:
    for number, (one, name) in enumerate(zip(sets, names, strict=True)):
        if one.score is None:
            raise ShardError(
                f"{one.root}: has no scores, so nothing can be learned from it beside others; "
                "leave it out of data.sets",
                exit_code=3,
            )
        if name in names[:number]:
            raise ShardError(
                f"two of the sets are called {name!r} ({sets[names.index(name)].root}, "
                f"{one.root}), and could not be told apart; give one of them a name of its own: "
                f'{{ root = "{one.root}", split = "...", name = "{name}-2" }}',
                exit_code=2,
            )


def _check_apart(joined: JoinedSet, parts: Sequence[NDArray[np.int64]]) -> None:
    keys = [_content_keys(joined, ids) for ids in parts]
    numbers = [joined.set_of(ids) for ids in parts]
    for first, second in combinations(range(len(PARTS)), 2):
        common = np.intersect1d(keys[first], keys[second])
        owners = [_owners(keys[at], numbers[at], common) for at in (first, second)]
        # The same image twice in one set is that set's own split's affair.
        leaked = [key for key in common.tolist() if owners[0][key] != owners[1][key]]
        if leaked:
            place = int(np.flatnonzero(keys[first] == leaked[0])[0])
            other = int(np.flatnonzero(keys[second] == leaked[0])[0])
            paths = joined.samples.path
            raise ShardError(
                f"{len(leaked):,} images are in the {PARTS[first]} part of one set and in the "
                f"{PARTS[second]} part of another, e.g. {paths[parts[first][place]]} and "
                f"{paths[parts[second][other]]}; merge the sets (`lmcl-shard reshard A B --name AB "
                "--output AB`), which keeps such images in one group, draw a split of AB, and "
                "train on it, or leave one of the sets out",
                exit_code=3,
            )


def _owners(
    keys: NDArray[np.int64], numbers: NDArray[np.int64], wanted: NDArray[np.int64]
) -> dict[int, set[int]]:
    """Which sets hold each of some images."""
    found: dict[int, set[int]] = {key: set() for key in wanted.tolist()}
    keep = np.isin(keys, wanted)
    for key, number in zip(keys[keep].tolist(), numbers[keep].tolist(), strict=True):
        found[key].add(number)
    return found


def _content_keys(one: ShardSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """A number for each image's bytes."""
    return np.ascontiguousarray(one.samples.sha256[ids, :8]).view(np.int64).ravel()


def _join_manifests(manifests: Sequence[Manifest], members: Sequence[Member]) -> Manifest:
    def together(field: str) -> str:
        text = "/".join(
            f"{member.name}:{getattr(one, field)}"
            for one, member in zip(manifests, members, strict=True)
        )
        return hashlib.sha256(text.encode()).hexdigest()

    titles = ", ".join(one.facts.title for one in manifests)
    licences = "; ".join(
        f"{m.name}: {one.facts.licence}" for one, m in zip(manifests, members, strict=True)
    )
    return Manifest(
        format_version=manifests[0].format_version,
        producer=manifests[0].producer,
        name="+".join(member.name for member in members),
        score=UNIT,
        num_samples=sum(one.num_samples for one in manifests),
        num_rejected=sum(one.num_rejected for one in manifests),
        num_withdrawn=sum(one.num_withdrawn for one in manifests),
        shards=tuple(shard for one in manifests for shard in one.shards),
        samples_sha256=together("samples_sha256"),
        ids_sha256=together("ids_sha256"),
        source_sha256=together("source_sha256"),
        facts=Facts(title=f"Joined: {titles}", licence=licences),
        members=tuple(members),
    )
