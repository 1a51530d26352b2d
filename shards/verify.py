"""Is a packed set what its manifest says? Every kind of damage gets a name.

`verify(shard_set_root, *, deep=False) -> Verification`. Quick: files, sizes, counts, index, names.
Deep: every hash, every image decoded, every JSON member against its row, labels in range,
duplicates by content, splits that leak.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from shards.build.image import inspect
from shards.cache import file_sha256
from shards.errors import ShardError
from shards.layout import STATE, index_name, key_of
from shards.manifest import MANIFEST, REJECTED, SAMPLES, SPLITS, ShardInfo, ids_hash
from shards.read import ShardSet, open_set
from shards.splits.split import load_split
from shards.tar import read_members

Kind = Literal[
    "manifest",
    "sample-table",
    "missing-shard",
    "shard-size",
    "shard-hash",
    "tar",
    "index",
    "member",
    "image",
    "label",
    "duplicate",
    "split",
    "leftover",
    "expected",
]
_TOLERANCE = 1e-4
_MOST_PER_KIND = 20


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be."""

    kind: Kind
    """What sort of damage."""
    where: str
    """File, shard or sample."""
    text: str
    """What was found, and the way out."""
    is_error: bool = True
    """False for something worth knowing that breaks nothing."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What a verification found."""

    deep: bool
    """Whether every byte was looked at."""
    samples: int
    """Samples of the set, 0 if it could not be opened."""
    findings: tuple[Finding, ...]
    """In the order they were found; at most twenty of a kind."""

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not any(finding.is_error for finding in self.findings)


def verify(
    root: str | Path,
    *,
    deep: bool = False,
    cache: Path | None = None,
    progress: Callable[[int], None] | None = None,
) -> Verification:
    """Check a set.

    Args:
        root: Folder or URL.
        deep: Look at every byte.
        cache: For remote sets, where copies go.
        progress: Called with the number of samples looked at since the last call.

    Raises:
        ShardError: If there is no set at all (exit code 4), or it cannot be reached (exit code
            1). Damage is reported, not raised.
    """
    try:
        shard_set = open_set(root, cache=cache)
    except ShardError as error:
        if error.exit_code != 3:
            raise  # nothing there, or no way to it: that says nothing about the set
        kind: Kind = "sample-table" if SAMPLES in str(error) else "manifest"
        finding = Finding(kind=kind, where=str(root), text=str(error))
        return Verification(deep=deep, samples=0, findings=(finding,))
    check = _Check(shard_set, deep, progress or (lambda samples: None))
    try:
        check.run()
    except ShardError as error:
        check.add("sample-table", str(root), str(error))
    finally:
        shard_set.close()
    return Verification(deep=deep, samples=len(shard_set), findings=tuple(check.findings))


class _Check:
    """One verification under way."""

    def __init__(self, shard_set: ShardSet, deep: bool, progress: Callable[[int], None]) -> None:
        self._set = shard_set
        self._deep = deep
        self._progress = progress
        self._counts: dict[Kind, int] = {}
        self.findings: list[Finding] = []

    def add(self, kind: Kind, where: str, text: str, *, is_error: bool = True) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] <= _MOST_PER_KIND:
            self.findings.append(Finding(kind=kind, where=where, text=text, is_error=is_error))

    def run(self) -> None:
        self._sample_table()
        self._expected()
        for index, shard in enumerate(self._set.manifest.shards):
            self._shard(index, shard)
        self._labels()
        self._leftovers()
        self._splits()
        if self._deep:
            self._duplicates()

    def _sample_table(self) -> None:
        table, manifest = self._set.samples, self._set.manifest
        if file_sha256(table.path_of_file) != manifest.samples_sha256:
            self.add(
                "sample-table",
                SAMPLES,
                "its sha256 is not the manifest's: one of the two was changed; build again",
            )
        column = np.concatenate(
            [batch.column(0).to_numpy() for batch in table.arrow(["id"])] or [np.empty(0)]
        )
        if not np.array_equal(column, table.id):
            self.add("sample-table", SAMPLES, "row i does not have id i; build again")
        if int(table.ok.sum()) != manifest.num_samples:
            self.add(
                "manifest",
                MANIFEST,
                f"says {manifest.num_samples:,} samples, {SAMPLES} has {int(table.ok.sum()):,}",
            )
        names = ids_hash()
        for batch in table.arrow(["path"]):
            lines = "\n".join([*batch.column(0).to_pylist(), ""])
            names.update(lines.encode("utf-8", "surrogateescape"))
        if names.hexdigest() != manifest.ids_sha256:
            self.add("manifest", MANIFEST, f"its ids_sha256 is not that of the names in {SAMPLES}")

    def _expected(self) -> None:
        manifest = self._set.manifest
        expected, labels = manifest.facts.expected, manifest.labels
        if expected.samples is not None and expected.samples != manifest.num_samples:
            self.add(
                "expected",
                MANIFEST,
                f"{manifest.num_samples:,} samples; the complete {manifest.name} has "
                f"{expected.samples:,}",
                is_error=False,
            )
            return
        if labels is None:
            return
        for name, found, wanted in (
            ("lowest", labels.low, expected.low),
            ("highest", labels.high, expected.high),
        ):
            if wanted is not None and abs(found - wanted) > _TOLERANCE:
                self.add(
                    "expected",
                    MANIFEST,
                    f"the {name} score is {found:g}, in the official labels {wanted:g}",
                    is_error=False,
                )

    def _shard(self, index: int, shard: ShardInfo) -> None:
        try:
            path = self._set.shard_path(index)
        except ShardError as error:
            kind: Kind = "missing-shard" if error.exit_code == 4 else "shard-size"
            self.add(kind, shard.name, str(error))
            if kind == "missing-shard":
                return
            folder = self._set.store.folder
            if folder is None:
                return
            path = folder / shard.name
        if self._deep and file_sha256(path) != shard.sha256:
            self.add(
                "shard-hash",
                shard.name,
                f"sha256 is not the manifest's {shard.sha256[:12]}…: bytes were changed or shards "
                "swapped; restore it, or build again",
            )
        self._members(index, shard, path)
        self._dali_index(shard)

    def _members(self, index: int, shard: ShardInfo, path: Path) -> None:
        table = self._set.samples
        rows = np.flatnonzero(table.shard == index).tolist()
        if len(rows) != shard.samples:
            self.add(
                "index",
                shard.name,
                f"{SAMPLES} has {len(rows):,} samples for it, the manifest {shard.samples:,}",
            )
        size_bytes = path.stat().st_size
        found = 0
        with path.open("rb") as stream:
            members = read_members(stream, size_bytes=size_bytes, where=shard.name)
            try:
                for row in rows:
                    self._sample(row, path, iter(members), shard.name)
                    found += 1
                    self._progress(1)
                extra = sum(1 for _ in members)
            except ShardError as error:
                self.add("tar", shard.name, str(error))
                return
            except StopIteration:
                self.add(
                    "member",
                    shard.name,
                    f"ends after {found:,} of {len(rows):,} samples; build again",
                )
                return
        if extra:
            self.add("member", shard.name, f"{extra:,} members more than {SAMPLES} knows")

    def _sample(self, id: int, path: Path, members: Iterator[Any], shard: str) -> None:
        table = self._set.samples
        image, text = next(members), next(members)
        prefix = self._set.name
        where = f"{shard}: sample {id} ({table.path[id]})"
        stem = key_of(prefix, id)
        wanted = (f"{stem}.{table.codec[id]}", f"{stem}.json")
        if (image.name, text.name) != wanted:
            self.add(
                "member",
                where,
                f"members {image.name}, {text.name} stand where {wanted[0]}, {wanted[1]} should: "
                "shards were swapped or rewritten",
            )
            return
        if (image.offset, image.size) != (int(table.offset[id]), int(table.size[id])):
            self.add(
                "index",
                where,
                f"{SAMPLES} says bytes {table.offset[id]:,} + {table.size[id]:,}, the tar has it "
                f"at {image.offset:,} + {image.size:,}; build again",
            )
        if self._deep:
            with path.open("rb") as stream:
                stream.seek(image.offset)
                self._image(id, stream.read(image.size), where)
                stream.seek(text.offset)
                self._json(id, stream.read(text.size), where)

    def _image(self, id: int, data: bytes, where: str) -> None:
        table = self._set.samples
        if hashlib.sha256(data).digest() != table.sha256[id].tobytes():
            self.add("image", where, "its bytes were changed (sha256 differs); build again")
            return
        try:
            info = inspect(data, where=where)
        except ShardError as error:
            self.add("image", where, str(error))
            return
        found = (info.codec, info.width, info.height)
        if found != (table.codec[id], int(table.width[id]), int(table.height[id])):
            self.add("index", where, f"is {found}, {SAMPLES} says otherwise; build again")

    def _json(self, id: int, data: bytes, where: str) -> None:
        table = self._set.samples
        try:
            fields = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError) as error:
            self.add("member", where, f"its JSON member cannot be read ({error}); build again")
            return
        mos = float(table.mos[id])
        stored = fields.get("mos") if isinstance(fields, dict) else None
        same_mos = (stored is None and np.isnan(mos)) or stored == mos
        digest = table.sha256[id].tobytes().hex()
        if not isinstance(fields, dict) or fields.get("id") != id or not same_mos:
            self.add("member", where, "its JSON member says another id or score than the table")
        elif fields.get("sha256") != digest or fields.get("path") != table.path[id]:
            self.add("member", where, "its JSON member describes another image than the table")

    def _dali_index(self, shard: ShardInfo) -> None:
        name = index_name(shard.name)
        if not self._set.store.exists(name):
            return
        lines = self._set.store.read(name).decode("ascii", "replace").splitlines()
        if not lines or lines[0] != f"v1.2 {shard.samples}" or len(lines) != shard.samples + 1:
            self.add("index", name, "is not the index of this shard; build again, or delete it")
            return
        first = int(np.argmax(self._set.samples.shard == self._set.manifest.shards.index(shard)))
        offsets = [line.split()[1] for line in lines[1:] if len(line.split()) > 1]
        position = self._set.manifest.shards.index(shard)
        wanted = self._set.samples.offset[self._set.samples.shard == position]
        if offsets != [str(value) for value in wanted.tolist()]:
            self.add("index", name, f"points elsewhere than {SAMPLES} (first sample {first})")

    def _labels(self) -> None:
        table, score = self._set.samples, self._set.score
        mos = table.mos[table.ok]
        labelled = mos[np.isfinite(mos)]
        stats = self._set.manifest.labels
        if stats is not None and labelled.size:
            found = (labelled.size, float(labelled.min()), float(labelled.max()))
            if found != (stats.count, stats.low, stats.high):
                self.add("label", MANIFEST, f"label statistics are not those of {SAMPLES}: {found}")
        if score is None:
            return
        outside = labelled[
            (labelled < score.low - _TOLERANCE) | (labelled > score.high + _TOLERANCE)
        ]
        if outside.size:
            self.add(
                "label",
                SAMPLES,
                f"{outside.size:,} scores leave the set's range {score.low:g} .. {score.high:g}, "
                f"e.g. {outside[0]:g}",
                is_error=False,
            )

    def _leftovers(self) -> None:
        store = self._set.store
        known = {MANIFEST, SAMPLES, REJECTED}
        for shard in self._set.manifest.shards:
            known |= {shard.name, index_name(shard.name)}
        for name in store.names():
            if name not in known:
                self.add(
                    "leftover",
                    name,
                    "does not belong to the set (an earlier or interrupted build?); delete it",
                )
        if store.names(STATE):
            self.add("leftover", STATE, "records of a build that did not clean up; delete them")

    def _splits(self) -> None:
        for name in self._set.store.names(SPLITS):
            try:
                load_split(self._set, name)
            except ShardError as error:
                self.add("split", name, str(error))

    def _duplicates(self) -> None:
        table = self._set.samples
        ids = self._set.ids()
        digests = np.ascontiguousarray(table.sha256[ids]).view("V32").ravel()
        _, first, counts = np.unique(digests, return_index=True, return_counts=True)
        for position in first[counts > 1].tolist():
            same = ids[digests == digests[position]]
            names = ", ".join(repr(table.path[id]) for id in same[:3].tolist())
            in_groups = np.unique(table.group_key[same]).size
            self.add(
                "duplicate",
                f"samples {', '.join(str(id) for id in same[:3].tolist())}",
                f"{same.size} samples hold the same bytes ({names})"
                + ("; in different groups, so a split may leak" if in_groups > 1 else ""),
                is_error=False,
            )
