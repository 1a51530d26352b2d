"""A finished set becomes its next version: other labels, more images, fewer images, no rebuild.

`update_set(root, dataset=..., withdraw=...) -> Updated`. No byte of a shard is touched: labels are
changed in a new sample table, new images go into new shards, a withdrawn image keeps its row
(`ok` is False) and its bytes. The manifest is replaced last; the one before, and its table, stay
below `versions/` and are opened as `ROOT@v1`. Ids never move, so splits can be extended.
"""

import dataclasses
import datetime
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.build.build import Labels, default_workers, version_text
from shards.build.card import write_card
from shards.build.decode_budget import lock_file, new_token
from shards.build.executor import run_jobs
from shards.build.output import hold_output, remove_leftovers
from shards.build.pack import PackOptions, ShardJob, ShardRecord, read_rows
from shards.build.plan import ShardSize, cut_into_shards, fingerprint
from shards.build.score_check import ScoreCheck
from shards.datasets.files import folded
from shards.errors import ShardError
from shards.layout import index_name
from shards.limits import PIXELS_AT_ONCE
from shards.manifest import (
    MANIFEST,
    NOTED,
    REJECTED,
    SAMPLES,
    Manifest,
    Version,
    encode,
    ids_hash,
    version_file,
)
from shards.read import ShardSet, open_set
from shards.sample import DataSet, Sample
from shards.sample_table import NO_LEVEL, SCHEMA, group_key, write_parquet
from shards.score_scale import ScoreScale
from shards.source_files import is_regular
from shards.store import Store
from shards.text import printable

_LABELS = ("mos", "mos_std", "group", "group_key", "distortion", "level", "subset", "part")


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What an update did."""

    manifest: Manifest
    """Of the version that holds now."""
    relabelled: int
    """Images with another label than before."""
    added: int
    """Images that were packed."""
    withdrawn: int
    """Images that no longer belong to the set."""
    kept: int
    """Images that the table does not name, which stay as they were."""
    rejected: int = 0
    """New images that could not be packed and were left out."""
    out: int = 0
    """Images that the table names and that were withdrawn or rejected before; they stay out."""

    @property
    def is_new(self) -> bool:
        """Whether there was anything to do."""
        return bool(self.relabelled or self.added or self.withdrawn)


def update_set(
    root: str | Path,
    *,
    dataset: DataSet | None = None,
    withdraw: Sequence[str] = (),
    score: ScoreScale | None = None,
    workers: int | None = None,
    options: PackOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Updated:
    """Make the next version of a set.

    Args:
        root: Folder or URL of a finished set.
        dataset: Labels by image: those of images in the set replace theirs, other images are added.
        withdraw: Names of images that no longer belong to the set.
        score: Another scale of the scores; default: the set's.
        workers: Shards packed at a time.
        options: How to pack new images.
        progress: Called with (images finished since the last call, images to be packed).

    Raises:
        ShardError: If an image to be withdrawn is not in the set, a new one is not there, a score
            leaves the scale, or nothing would be left.
    """
    store = Store(root)
    with hold_output(store):
        old = open_set(root, share_columns=False)
        scale = score or old.score or (dataset.score if dataset is not None else None)
        changes = _Changes(old, scale)
        for sample in dataset.samples() if dataset is not None else ():
            changes.relabel(sample)
        for name in withdraw:
            changes.withdraw(name)
        changes.refuse()
        found = changes.table()
        is_same = changes.is_empty and scale == old.score
        if is_same:
            return _updated(old.manifest, changes, ())
        records = _pack(store, old, changes.new, workers, options or PackOptions(), progress)
        manifest = _write(store, old, found, records, scale, changes)
        remove_leftovers(store, manifest.shards, manifest.name)
    return _updated(manifest, changes, records)


def _updated(manifest: Manifest, changes: "_Changes", records: Sequence[ShardRecord]) -> Updated:
    rejected = sum(len(record.rejected) for record in records)
    return Updated(
        manifest=manifest,
        relabelled=len(changes.labels),
        added=len(changes.new) - rejected,
        withdrawn=len(changes.gone),
        kept=changes.unnamed,
        rejected=rejected,
        out=changes.num_out,
    )


class _Changes:
    """What is going to be different, found out before anything is written."""

    def __init__(self, old: ShardSet, scale: ScoreScale | None) -> None:
        self._old = old
        self._paths = {str(path): id for id, path in enumerate(old.samples.path)}
        self._folded = {folded(path): id for path, id in self._paths.items()}
        self._check = ScoreCheck(scale) if scale is not None else None
        self._named: set[int] = set()
        self.labels: dict[int, dict[str, Any]] = {}
        self.new: list[Sample] = []
        self.gone: set[int] = set()
        self.num_out = 0
        """Images that a label names and that do not belong to the set any more."""
        self._added: set[str] = set()
        self._twice: list[str] = []
        self._strange: list[str] = []

    @property
    def is_empty(self) -> bool:
        """Whether nothing is different."""
        return not (self.labels or self.new or self.gone)

    @property
    def unnamed(self) -> int:
        """Images of the set that no label names."""
        return int(self._old.ids().size) - len(self._named) if self._named or self.new else 0

    def find(self, name: str) -> int | None:
        """The row of an image by its name in the set, in any case."""
        return self._paths.get(name, self._folded.get(folded(name)))

    def relabel(self, sample: Sample) -> None:
        """Take over a label, or remember a new image."""
        if self._check is not None:
            self._check.add(sample)
        id = self.find(sample.path)
        if id is None:
            if sample.path in self._added:
                self._twice.append(sample.path)
            self._added.add(sample.path)
            self.new.append(sample)
            return
        if not self._old.samples.ok[id]:
            self.num_out += 1
            return
        if id in self._named:
            self._twice.append(sample.path)
        self._named.add(id)
        # A group that is only the image's own name is no group that was given.
        row = self._old.samples.row(id)
        group = row.group if sample.group == sample.path else sample.group
        values = {
            "mos": np.nan if sample.mos is None else sample.mos,
            "mos_std": np.nan if sample.mos_std is None else sample.mos_std,
            "group": group,
            "group_key": group_key(group),
            "distortion": sample.distortion,
            "level": NO_LEVEL if sample.level is None else sample.level,
            "subset": sample.subset,
            "part": sample.part,
        }
        if any(not _same(values[name], getattr(row, name)) for name in _LABELS):
            self.labels[id] = values

    def withdraw(self, name: str) -> None:
        """Remember an image that goes."""
        id = self.find(name)
        if id is None:
            self._strange.append(name)
        elif self._old.samples.ok[id]:
            self.gone.add(id)

    def refuse(self) -> None:
        """Stop if something cannot be done.

        Raises:
            ShardError: Naming the first few.
        """
        where = self._old.store.shown
        if self._strange:
            first = ", ".join(printable(name, 80) for name in self._strange[:3])
            raise ShardError(
                f"{where}: {len(self._strange):,} images to be withdrawn are not in the set, first "
                f"{first}; give names as `samples.parquet` has them",
                exit_code=3,
            )
        if self._twice:
            raise ShardError(
                f"{where}: {printable(self._twice[0], 80)!r} is listed more than once, the first "
                f"of {len(self._twice):,}; keep one row for each image",
                exit_code=3,
            )
        missing = [s for s in self.new if s.embedded is None and not is_regular(s.file)]
        if missing:
            first = ", ".join(printable(sample.path, 80) for sample in missing[:3])
            raise ShardError(
                f"{where}: {len(missing):,} labelled images are neither in the set nor there to be "
                f"added, first {first} in {printable(missing[0].file.parent)}; name their folder "
                "with `--images`, or correct the table",
                exit_code=3,
            )
        if len(self.gone) == self._old.ids().size and not self.new:
            raise ShardError(f"{where}: no image would be left; delete the folder", exit_code=2)
        if self._check is not None:
            self._check.refuse_outside(where)

    def table(self) -> pa.Table:
        """The old rows with their new labels."""
        found = pq.read_table(self._old.samples.path_of_file).select(SCHEMA.names)
        if self.labels:
            for name in _LABELS:
                values = found.column(name).to_pylist()
                for id, new in self.labels.items():
                    values[id] = new[name]
                place = SCHEMA.get_field_index(name)
                found = found.set_column(
                    place, SCHEMA.field(name), pa.array(values, SCHEMA.field(name).type)
                )
        if self.gone:
            ok = np.array(found.column("ok"))
            ok[sorted(self.gone)] = False
            place = SCHEMA.get_field_index("ok")
            found = found.set_column(place, SCHEMA.field("ok"), pa.array(ok))
        return found.cast(SCHEMA)


def _same(new: Any, old: Any) -> bool:
    return bool(new == old or (new != new and old != old))


def _pack(
    store: Store,
    old: ShardSet,
    samples: Sequence[Sample],
    workers: int | None,
    options: PackOptions,
    progress: Callable[[int, int], None] | None,
) -> list[ShardRecord]:
    if not samples:
        return []
    sizes = [sample.size or sample.file.stat().st_size for sample in samples]
    starts = cut_into_shards(sizes, ShardSize())
    first_index = 1 + max((_index_of(s.name) for s in old.manifest.shards), default=-1)
    budget = new_token()

    def jobs() -> Iterator[ShardJob]:
        ends = (*starts[1:], len(samples))
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            taken, first_id = tuple(samples[start:end]), len(old.samples) + start
            yield ShardJob(
                root=store.root,
                set_name=old.name,
                index=first_index + number,
                first_id=first_id,
                samples=taken,
                options=options,
                fingerprint=fingerprint(taken, first_id, options),
                pixels_at_once=PIXELS_AT_ONCE,
                budget=budget,
            )

    tell = progress or (lambda images, total: None)
    count = (
        1 if store.root.startswith("memory:") else min(workers or default_workers(), len(starts))
    )
    try:
        running = run_jobs(
            jobs(), engine="local", workers=count, progress=lambda n: tell(n, len(samples))
        )
        return sorted(running, key=lambda record: record.first_id)
    finally:
        lock_file(budget).unlink(missing_ok=True)


def _index_of(shard: str) -> int:
    return int(shard.removesuffix(".tar").rpartition("-")[2])


def _write(
    store: Store,
    old: ShardSet,
    table: pa.Table,
    records: Sequence[ShardRecord],
    scale: ScoreScale | None,
    changes: _Changes,
) -> Manifest:
    before = _keep_version(store, old)
    tables, shards = [table], list(old.manifest.shards)
    for record in records:
        stem = record.shard.name.removesuffix(".tar") if record.shard is not None else None
        if stem is None:
            raise ShardError(f"{store.root}: none of the new images could be packed", exit_code=3)
        rows = read_rows(store, stem).cast(SCHEMA)
        number = pa.array(np.where(np.array(rows.column("ok")), len(shards), -1).astype(np.int32))
        place = SCHEMA.get_field_index("shard")
        tables.append(rows.set_column(place, SCHEMA.field("shard"), number))
        assert record.shard is not None
        shards.append(record.shard)
    every = pa.concat_tables(tables)
    manifest = _next(before, every, tuple(shards), scale, changes, records)
    data = io.BytesIO()
    write_parquet(pa.PythonFile(data, "w"), [every])
    content = data.getvalue()
    manifest = dataclasses.replace(manifest, samples_sha256=hashlib.sha256(content).hexdigest())
    _add_lines(store, REJECTED, [line for record in records for line in record.rejected])
    _add_lines(store, NOTED, [line for record in records for line in record.noted])
    store.write(manifest.samples, content)
    store.settle(index_name(shard.name) for shard in shards)
    write_card(store, manifest, pc.unique(every.column("codec")).to_pylist())
    store.write(MANIFEST, encode(manifest))
    # For whoever reads the table without the manifest: the newest one, once it holds.
    store.write(SAMPLES, content)
    return manifest


def _add_lines(store: Store, name: str, lines: Sequence[Any]) -> None:
    import msgspec

    if not lines:
        return
    held = store.read(name) if store.exists(name) else b""
    store.write(name, held + b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def _keep_version(store: Store, old: ShardSet) -> Manifest:
    """The manifest that holds now, with its table under a name that stays."""
    manifest = old.manifest
    name = version_file(manifest.version, "parquet")
    if manifest.samples != name:
        store.write(name, old.samples.path_of_file.read_bytes())
        manifest = dataclasses.replace(manifest, samples=name)
    store.write(version_file(manifest.version, "json"), encode(manifest))
    return manifest


def _next(
    before: Manifest,
    table: pa.Table,
    shards: tuple[Any, ...],
    scale: ScoreScale | None,
    changes: _Changes,
    records: Sequence[ShardRecord],
) -> Manifest:
    version = before.version + 1
    names = ids_hash()
    for path in table.column("path").to_pylist():
        names.update(path.encode("utf-8", "surrogateescape") + b"\n")
    labels = Labels()
    labels.add(table)
    ok = pc.sum(table.column("ok")).as_py() or 0
    rejected = before.num_rejected + sum(len(record.rejected) for record in records)
    what = (
        f"{len(changes.labels):,} relabelled, {len(changes.new):,} added, {len(changes.gone):,} "
        "withdrawn"
    )
    history = before.history or (_entry(before, "", "built"),)
    new = dataclasses.replace(
        before,
        producer=f"lmcl {version_text()}",
        version=version,
        score=scale,
        num_samples=ok,
        num_rejected=rejected,
        num_withdrawn=table.num_rows - ok - rejected,
        shards=shards,
        samples=version_file(version, "parquet"),
        ids_sha256=names.hexdigest(),
        source_sha256=hashlib.sha256(f"{before.source_sha256}/{version}".encode()).hexdigest(),
        labels=labels.stats(),
    )
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return dataclasses.replace(new, history=(*history, _entry(new, date, what)))


def _entry(manifest: Manifest, date: str, what: str) -> Version:
    return Version(
        version=manifest.version,
        date=date,
        what=what,
        num_samples=manifest.num_samples,
        num_rows=manifest.num_rows,
        ids_sha256=manifest.ids_sha256,
        source_sha256=manifest.source_sha256,
    )
