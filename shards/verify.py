"""Is a packed set what its manifest says? Every kind of damage gets a name.

`verify(shard_set_root, *, deep=False) -> Verification`. Quick: files, sizes, counts, index, names.
Deep: every hash, every image decoded, every JSON member against its row, labels in range,
duplicates by content, splits that leak. The sample table is read from its own file, never from
columns that were kept; whatever can be computed again (indices, group keys, statistics) is.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from shards.build.image import inspect
from shards.cache import file_sha256
from shards.errors import ShardError
from shards.layout import STATE, index_line, index_name, key_of
from shards.lock import LOCK_NAME
from shards.manifest import (
    CARD,
    MANIFEST,
    NOTED,
    REJECTED,
    SAMPLES,
    SPLITS,
    ShardInfo,
    decode,
    ids_hash,
)
from shards.picture_counts import PictureCounts, size_sentences
from shards.read import ShardSet, open_set
from shards.sample_table import described_row, group_key
from shards.splits.split import load_split, read_split
from shards.tar import Member, read_members
from shards.text import bounded_message, printable, redact_url

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
CODECS = ("jpg", "png", "bmp", "webp")
_NONE = object()
_LABELS = frozenset({"mos", "mos_std", "group", "distortion", "level", "subset", "part"})
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
    remarks: tuple[str, ...] = ()
    """Of a deep check: what should be known about the pictures, and is no damage."""

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
        shard_set = open_set(root, cache=cache, share_columns=False)
    except ShardError as error:
        if error.exit_code != 3:
            raise  # nothing there, or no way to it: that says nothing about the set
        kind: Kind = "sample-table" if SAMPLES in str(error) else "manifest"
        finding = Finding(kind=kind, where=redact_url(root), text=str(error))
        return Verification(deep=deep, samples=0, findings=(finding,))
    check = _Check(shard_set, deep, progress or (lambda samples: None))
    try:
        check.run()
    finally:
        shard_set.close()
    return Verification(
        deep=deep,
        samples=len(shard_set),
        findings=tuple(check.findings),
        remarks=tuple(check.remarks()),
    )


class _Check:
    """One verification under way."""

    def __init__(self, shard_set: ShardSet, deep: bool, progress: Callable[[int], None]) -> None:
        self._set = shard_set
        self._deep = deep
        self._progress = progress
        self._counts: dict[Kind, int] = {}
        self._pictures = PictureCounts()
        self._sizes: tuple[str, ...] = ()
        self.findings: list[Finding] = []

    def add(self, kind: Kind, where: str, text: str, *, is_error: bool = True) -> None:
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if self._counts[kind] <= _MOST_PER_KIND:
            shown = Finding(
                kind=kind,
                where=printable(where),
                text=bounded_message(redact_url(text)),
                is_error=is_error,
            )
            self.findings.append(shown)

    def remarks(self) -> Iterator[str]:
        """What should be known about the pictures that were looked at."""
        yield from self._sizes
        yield from self._pictures.sentences()

    def _count_sizes(self) -> None:
        table, ids = self._set.samples, self._set.ids()
        self._sizes = tuple(size_sentences(table.width[ids], table.height[ids]))

    def run(self) -> None:
        self._step("sample-table", SAMPLES, self._sample_table)
        self._step("sample-table", SAMPLES, self._rows)
        self._step("manifest", MANIFEST, self._expected)
        for index, shard in enumerate(self._set.manifest.shards):
            self._step("tar", shard.name, functools.partial(self._shard, index, shard))
        self._step("label", SAMPLES, self._labels)
        if "sample-table" not in self._counts:
            # A damaged column is a finding already.
            self._step("sample-table", SAMPLES, self._count_sizes)
        if self._is_newest():
            self._step("leftover", "", self._leftovers)
            self._step("split", SPLITS, self._splits)
        if self._deep:
            self._step("duplicate", SAMPLES, self._duplicates)

    def _is_newest(self) -> bool:
        """Files of later versions, and their splits, are nothing that an earlier one can judge."""
        store = self._set.store
        newest = decode(store.read(MANIFEST), where=f"{store.root}/{MANIFEST}")
        return newest.version == self._set.manifest.version

    def _step(self, kind: Kind, where: str, step: Callable[[], None]) -> None:
        """One part of the check; what it stumbles over is a finding, and the next one is made."""
        try:
            step()
        except ShardError as error:
            self.add("sample-table" if SAMPLES in str(error) else kind, where, str(error))
        except Exception as error:
            # Hostile bytes reach Arrow and numpy here, whose exceptions are not listed anywhere.
            self.add(kind, where, f"cannot be checked ({type(error).__name__}: {error})")

    def _sample_table(self) -> None:
        table, manifest = self._set.samples, self._set.manifest
        if file_sha256(table.path_of_file) != manifest.samples_sha256:
            self.add(
                "sample-table",
                SAMPLES,
                "its sha256 is not the manifest's: one of the two was changed; build again",
            )
        if not np.array_equal(table.stored_ids(), table.id):
            self.add("sample-table", SAMPLES, "row i does not have id i; build again")
        if int(table.ok.sum()) != manifest.num_samples:
            self.add(
                "manifest",
                MANIFEST,
                f"says {manifest.num_samples:,} samples, {SAMPLES} has {int(table.ok.sum()):,}",
            )
        names = ids_hash()
        for batch in table.arrow(["path"]):
            if batch.column(0).null_count:
                self.add("sample-table", SAMPLES, "a path is missing; build again")
                return
            lines = "\n".join([*batch.column(0).to_pylist(), ""])
            names.update(lines.encode("utf-8", "surrogateescape"))
        if names.hexdigest() != manifest.ids_sha256:
            self.add("manifest", MANIFEST, f"its ids_sha256 is not that of the names in {SAMPLES}")

    def _rows(self) -> None:
        """What columns must be to each other; group keys are computed again."""
        table = self._set.samples
        ok, codec = table.ok, table.codec
        has_place = (table.shard >= 0) & (table.offset >= 0) & (table.size > 0)
        has_pixels = (table.width > 0) & (table.height > 0) & np.isin(codec, CODECS)
        has_none = (table.shard == -1) & (table.offset == -1) & (table.size == 0)
        self._no_row(ok & ~has_place, "has no place in a shard")
        self._no_row(ok & ~has_pixels, "has no size, or a codec that no image has")
        withdrawn = ~ok & has_place
        self._no_row(~ok & ~has_none & ~withdrawn, "was rejected and has bytes all the same")
        if int(withdrawn.sum()) != self._set.manifest.num_withdrawn:
            self.add(
                "manifest",
                MANIFEST,
                f"says {self._set.manifest.num_withdrawn:,} images were withdrawn, the table "
                f"{int(withdrawn.sum()):,}",
            )
        self._no_row(np.isinf(table.mos) | np.isinf(table.mos_std), "has an infinite score")
        groups, first, inverse = np.unique(
            table.group.astype(str), return_index=True, return_inverse=True
        )
        keys = np.array([group_key(table.group[k]) for k in first.tolist()], np.int64)
        if groups.size:
            self._no_row(keys[inverse] != table.group_key, "has a group key of another group")

    def _no_row(self, wrong: NDArray[np.bool_], text: str) -> None:
        rows = np.flatnonzero(wrong)
        if rows.size:
            others = f", like {rows.size - 1:,} others" if rows.size > 1 else ""
            self.add("sample-table", f"sample {rows[0]}", f"{text}{others}; build again")

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
            if kind == "missing-shard" or self._set.store.folder is None:
                return
            # Of another length than it should be, its members can still be told; a link cannot.
            path = self._set.store.local_path(shard.name)
        if self._deep and file_sha256(path) != shard.sha256:
            self.add(
                "shard-hash",
                shard.name,
                f"sha256 is not the manifest's {shard.sha256[:12]}…: bytes were changed or shards "
                "swapped; restore it, or build again",
            )
        lines = self._members(index, shard, path)
        self._dali_index(shard, lines)

    def _members(self, index: int, shard: ShardInfo, path: Path) -> list[str] | None:
        """Compare a tar with its rows; returns what its index should say, if it can be read."""
        table = self._set.samples
        rows = np.flatnonzero(table.shard == index).tolist()
        if len(rows) != shard.samples:
            self.add(
                "index",
                shard.name,
                f"{SAMPLES} has {len(rows):,} samples for it, the manifest {shard.samples:,}",
            )
        size_bytes = path.stat().st_size
        found, lines = 0, list[str]()
        with path.open("rb") as stream:
            members = read_members(stream, size_bytes=size_bytes, where=shard.name)
            try:
                for row in rows:
                    lines.append(self._sample(row, path, iter(members), shard.name))
                    found += 1
                    self._progress(1)
                extra = sum(1 for _ in members)
            except ShardError as error:
                self.add("tar", shard.name, str(error))
                return None
            except StopIteration:
                self.add(
                    "member",
                    shard.name,
                    f"ends after {found:,} of {len(rows):,} samples; build again",
                )
                return None
        if extra:
            self.add("member", shard.name, f"{extra:,} members more than {SAMPLES} knows")
        return lines

    def _sample(self, id: int, path: Path, members: Iterator[Member], shard: str) -> str:
        table = self._set.samples
        image, text = next(members), next(members)
        line = index_line(image, text)
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
            return line
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
        return line

    def _image(self, id: int, data: bytes, where: str) -> None:
        table = self._set.samples
        if hashlib.sha256(data).digest() != table.sha256[id].tobytes():
            self.add("image", where, "its bytes were changed (sha256 differs); build again")
            return
        self._pictures.add(data)
        try:
            info = inspect(data, where=where)
        except ShardError as error:
            self.add("image", where, str(error))
            return
        found = (info.codec, info.width, info.height)
        if found != (table.codec[id], int(table.width[id]), int(table.height[id])):
            self.add("index", where, f"is {found}, {SAMPLES} says otherwise; build again")

    def _json(self, id: int, data: bytes, where: str) -> None:
        try:
            fields = msgspec.json.decode(data)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self.add("member", where, f"its JSON member cannot be read ({error}); build again")
            return
        expected = described_row(self._set.name, self._set.samples.row(id))
        if not isinstance(fields, dict):
            self.add("member", where, "its JSON member is no object; build again")
            return
        # An update changes labels in the table alone: shards keep those they were packed with.
        free = _LABELS if self._set.manifest.version > 1 else frozenset[str]()
        wrong = [
            name
            for name, value in expected.items()
            if name not in free and fields.get(name, _NONE) != value
        ]
        if wrong:
            self.add(
                "member",
                where,
                f"its JSON member says another {', '.join(wrong)} than {SAMPLES}; one of the two "
                "was edited, build again",
            )

    def _dali_index(self, shard: ShardInfo, lines: list[str] | None) -> None:
        name, store = index_name(shard.name), self._set.store
        if lines is None or not store.exists(name):
            return
        wanted = "\n".join([f"v1.2 {len(lines)}", *lines, ""]).encode()
        if store.size_bytes(name) != len(wanted) or store.read(name) != wanted:
            self.add("index", name, "is not the index of this shard; build again, or delete it")

    def _labels(self) -> None:
        table, score = self._set.samples, self._set.score
        mos = table.mos[table.ok]
        labelled = mos[np.isfinite(mos)]
        stats = self._set.manifest.labels
        if stats is not None and labelled.size:
            found = (labelled.size, float(labelled.min()), float(labelled.max()))
            moments = np.isclose(
                [labelled.mean(), labelled.std()], [stats.mean, stats.std], rtol=1e-4, atol=1e-6
            )
            if found != (stats.count, stats.low, stats.high) or not moments.all():
                self.add("label", MANIFEST, f"label statistics are not those of {SAMPLES}: {found}")
        elif (stats is None) != (labelled.size == 0):
            self.add("label", MANIFEST, f"{labelled.size:,} labels, and statistics of others")
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

    def _strange(self, known: set[str]) -> None:
        """Entries of the set's folders that are no files: they are not followed and not opened."""
        folder = self._set.store.folder
        if folder is None:
            return
        for place in (folder, folder / SPLITS):
            if not place.is_dir() or (place != folder and place.is_symlink()):
                continue
            for path in sorted(place.iterdir()):
                name = path.relative_to(folder).as_posix()
                if (place == folder and name not in known) or path.is_file():
                    continue
                self.add("leftover", name, "is not a regular file; delete it, or build again")

    def _leftovers(self) -> None:
        store = self._set.store
        known = {MANIFEST, SAMPLES, REJECTED, NOTED, LOCK_NAME, CARD}
        for shard in self._set.manifest.shards:
            known |= {shard.name, index_name(shard.name)}
        self._strange(known)
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
                self.add("split", name, str(error), is_error=not self._is_of_earlier(name))

    def _is_of_earlier(self, name: str) -> bool:
        """Whether a split is whole, and of a version that this one has replaced."""
        try:
            split, _ = read_split(self._set, name)
        except ShardError:
            return False
        history = self._set.manifest.history[:-1]
        return any(version.ids_sha256 == split.ids_sha256 for version in history)

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
