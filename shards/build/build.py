"""A data set becomes shards, a sample table and, last, a manifest.

`build(dataset, output, *, workers=None, engine="local", options=PackOptions(), size=ShardSize(),
retry_failed=False, overwrite=False, progress=None) -> Manifest`

A build that was killed goes on where it was when the same call is made again; whatever was half
written has a temporary name and is not looked at. A folder is finished when it has a manifest. One
build at a time works on a folder; files that no build wrote there are never replaced.
"""

import contextlib
import functools
import hashlib
import importlib.metadata
import io
import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.build.card import write_card
from shards.build.decode_budget import lock_file, new_token
from shards.build.difference import describe_difference
from shards.build.executor import Engine, run_jobs
from shards.build.output import (
    begin,
    begin_again,
    hold_output,
    read_starts,
    refuse_foreign,
    remove_leftovers,
)
from shards.build.pack import (
    Noted,
    PackOptions,
    Rejected,
    ShardJob,
    ShardRecord,
    read_record,
    read_rows,
)
from shards.build.plan import Plan, ShardSize, jobs_of, make_plan
from shards.build.retry import keep_good_shards
from shards.errors import ShardError, several_problems
from shards.layout import STATE, index_name, shard_stem
from shards.limits import PIXELS_AT_ONCE
from shards.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    NOTED,
    REJECTED,
    SAMPLES,
    LabelStats,
    Manifest,
    decode,
    encode,
)
from shards.processes import usable_cores
from shards.sample import DataSet
from shards.sample_table import SCHEMA, write_parquet
from shards.store import Store

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")


def build(
    dataset: DataSet,
    output: str | Path,
    *,
    workers: int | None = None,
    engine: Engine = "local",
    options: PackOptions | None = None,
    size: ShardSize | None = None,
    pixels_at_once: int = PIXELS_AT_ONCE,
    retry_failed: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
    tell: Callable[[Plan], None] | None = None,
) -> Manifest:
    """Pack a data set into `output`, a folder or an fsspec URL.

    Args:
        dataset: From one of `shards.datasets`.
        output: Made if it is not there. A finished set of the same source is left as it is.
        workers: Shards packed at a time; default: one per core of this process.
        engine: `local` processes or `ray`; the bytes are the same.
        options: How to pack; default `PackOptions()`.
        size: When a shard is full; default `ShardSize()`.
        pixels_at_once: Decoded at once by all workers on a machine, about four bytes of memory
            each; a larger picture goes alone.
        retry_failed: Try the images again that an earlier build rejected.
        overwrite: Replace a finished set of another source.
        progress: Called with (images finished since the last call, images in all).
        tell: Called with the plan before anything is packed.

    Returns:
        The manifest that was written.

    Raises:
        ShardError: If the source or the output does not allow it; the message says which and why.
    """
    options, size = options or PackOptions(), size or ShardSize()
    _check_name(dataset.name)
    store = Store(output)

    def planned() -> Plan:
        plan = make_plan(dataset, options=options, size=size, starts=read_starts(store))
        refuse_missing(plan, options)
        if tell is not None:
            tell(plan)
        return plan

    retry = retry_failed and store.exists(MANIFEST)
    # Looked at before anything is written, the lock included: the set may be read-only.
    plan = None if retry else planned()
    if plan is not None:
        finished = _finished(store, plan, dataset, overwrite=overwrite)
        if finished is not None and not store.names(STATE):
            return finished
    with hold_output(store):
        if plan is None:
            refuse_foreign(store, dataset.name)
            begin_again(store, keep_good_shards(store, dataset))
            plan = planned()
        finished = _finished(store, plan, dataset, overwrite=overwrite)
        if finished is not None:
            remove_leftovers(store, finished.shards, finished.name)
            return finished
        begin(store, plan, check_space=not options.bmp_to_png)
        run = functools.partial(run_jobs, engine=engine, workers=_processes(store, plan, workers))
        budget = new_token()
        jobs = jobs_of(
            dataset,
            plan,
            root=store.root,
            options=options,
            pixels_at_once=pixels_at_once,
            budget=budget,
        )
        try:
            records = _pack(jobs, plan, store, run, retry_failed=retry_failed, progress=progress)
        finally:
            lock_file(budget).unlink(missing_ok=True)
        return _finish(dataset, plan, store, records)


def _processes(store: Store, plan: Plan, workers: int | None) -> int:
    if store.root.startswith("memory:"):
        return 1  # another process has another memory
    return min(workers or default_workers(), len(plan.starts))


def refuse_missing(plan: Plan, options: PackOptions) -> None:
    """Stop before any work if labels name files that are not there, or samples are incomplete.

    Raises:
        ShardError: Naming the first few, unless the options say `skip`.
    """
    if options.on_error == "skip":
        return
    if plan.num_problems:
        raise several_problems(
            plan.problems, plan.num_problems, what=f"{plan.name}: of its samples"
        )
    if plan.num_missing == 0:
        return
    raise ShardError(
        f"{plan.name}: {plan.num_missing:,} of {plan.rows:,} labelled images are not there, first "
        f"{', '.join(plan.missing)}; complete the folder, or leave them out with "
        "`--on-error skip`",
        exit_code=3,
    )


def default_workers() -> int:
    """Cores this process may use."""
    return usable_cores()


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ShardError(
            f"{name!r} cannot be the name of a set: a-z, 0-9, - and _, at most 41 characters; "
            "give another with `--name`",
            exit_code=2,
        )


def _finished(store: Store, plan: Plan, dataset: DataSet, *, overwrite: bool) -> Manifest | None:
    if not store.exists(MANIFEST):
        return None
    try:
        manifest = decode(store.read(MANIFEST), where=f"{store.root}/{MANIFEST}")
    except ShardError as error:
        if not overwrite:
            # The sentence advises to build again, which is what was asked for.
            raise ShardError(
                f"{error}; `--overwrite` replaces the set", exit_code=error.exit_code
            ) from error
        return None
    if (manifest.source_sha256, manifest.name) == (plan.source_sha256, dataset.name):
        return manifest
    if overwrite:
        return None
    raise ShardError(
        f"{store.root}: holds a finished set {manifest.name!r} of {manifest.num_samples:,} images "
        f"made from another source or with other options: {describe_difference(store, dataset)}; "
        "choose another `--output`, replace it with `--overwrite`, or give it other labels and "
        f"more images by `lmcl-shard update {store.shown} TABLE`",
        exit_code=3,
    )


def _pack(
    jobs: Iterator[ShardJob],
    plan: Plan,
    store: Store,
    run: Callable[..., Generator[ShardRecord, None, None]],
    *,
    retry_failed: bool,
    progress: Callable[[int, int], None] | None,
) -> list[ShardRecord]:
    records: dict[int, ShardRecord] = {}
    tell = progress or (lambda images, total: None)

    def left() -> Iterator[ShardJob]:
        for job in jobs:
            record = read_record(store, job.stem)
            if record is not None and _reusable(record, job, retry_failed):
                records[record.first_id] = record
                tell(record.rows, plan.rows)
            else:
                yield job

    running = run(left(), progress=lambda images: tell(images, plan.rows))
    # Closed at once when this is interrupted: workers end before the lock of the folder does.
    with contextlib.closing(running):
        for record in running:
            records[record.first_id] = record
    return [records[start] for start in plan.starts]


def _reusable(record: ShardRecord, job: ShardJob, retry_failed: bool) -> bool:
    if record.first_id != job.first_id or record.rows != len(job.samples):
        return False
    if retry_failed and record.rejected:
        return False
    if record.shard is not None and record.shard.name != f"{job.stem}.tar":
        return False
    return record.fingerprint in (None, job.fingerprint)


def _finish(dataset: DataSet, plan: Plan, store: Store, records: Sequence[ShardRecord]) -> Manifest:
    rejected = [line for record in records for line in record.rejected]
    shards = tuple(record.shard for record in records if record.shard is not None)
    if not shards:
        raise ShardError(
            f"{dataset.name}: none of the {plan.rows:,} images could be packed, first: "
            f"{rejected[0].error}",
            exit_code=3,
        )
    labels = Labels()
    sha256 = _write_samples(store, dataset.name, records, labels)
    _write_lines(store, REJECTED, rejected)
    _write_lines(store, NOTED, [line for record in records for line in record.noted])
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        producer=f"lmcl {version_text()}",
        name=dataset.name,
        score=dataset.score,
        num_samples=sum(shard.samples for shard in shards),
        num_rejected=len(rejected),
        shards=shards,
        samples_sha256=sha256,
        ids_sha256=plan.ids_sha256,
        source_sha256=plan.source_sha256,
        facts=dataset.facts,
        labels=labels.stats(),
        members=dataset.members,
    )
    # All that the manifest vouches for is on disk before the manifest is.
    store.settle(index_name(shard.name) for shard in shards)
    write_card(store, manifest, labels.codecs)
    store.write(MANIFEST, encode(manifest))
    remove_leftovers(store, shards, dataset.name)
    return manifest


class Labels:
    """Running statistics of the raw scores of usable images, and the codecs of all."""

    def __init__(self) -> None:
        self.codecs: set[str] = set()
        """Of the images that have bytes."""
        self._count = 0
        self._sum = self._squares = 0.0
        self._low, self._high = math.inf, -math.inf

    def add(self, table: pa.Table) -> None:
        """Look at some rows."""
        self.codecs |= {name for name in pc.unique(table.column("codec")).to_pylist() if name}
        mos = table.column("mos").to_numpy()[table.column("ok").to_numpy()]
        mos = mos[np.isfinite(mos)]
        if mos.size == 0:
            return
        self._count += int(mos.size)
        self._sum += float(mos.sum())
        self._squares += float((mos**2).sum())
        self._low = min(self._low, float(mos.min()))
        self._high = max(self._high, float(mos.max()))

    def stats(self) -> LabelStats | None:
        """What was seen; None if nothing is labelled."""
        if self._count == 0:
            return None
        mean = self._sum / self._count
        variance = max(0.0, self._squares / self._count - mean**2)
        return LabelStats(
            count=self._count, low=self._low, high=self._high, mean=mean, std=math.sqrt(variance)
        )


def _write_samples(store: Store, name: str, records: Sequence[ShardRecord], labels: Labels) -> str:
    def tables() -> Iterator[pa.Table]:
        position = 0
        for index, record in enumerate(records):
            stem = shard_stem(name, index)
            table = read_rows(store, stem)
            # The column counts shards that exist; a shard of rejected images only does not.
            number = np.where(table.column("ok").to_numpy(), position, -1).astype(np.int32)
            place = SCHEMA.get_field_index("shard")
            table = table.cast(SCHEMA).set_column(place, SCHEMA.field("shard"), [number])
            labels.add(table)
            position += record.shard is not None
            yield table

    with store.writing(SAMPLES) as out:
        hashing = _Hashing(out)
        write_parquet(pa.PythonFile(hashing, "w"), tables())
    return hashing.sha256.hexdigest()


class _Hashing(io.RawIOBase):
    """A stream that hashes what is written through it, in order."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return self._out.write(data)

    def tell(self) -> int:
        return self._out.tell()


def _write_lines(store: Store, name: str, lines: Sequence[Rejected | Noted]) -> None:
    if not lines:
        store.remove(name)
        return
    store.write(name, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def version_text() -> str:
    """The installed version of this program."""
    try:
        return importlib.metadata.version("lmcl")
    except importlib.metadata.PackageNotFoundError:
        return "0"
