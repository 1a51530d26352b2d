"""A data set becomes shards, a sample table and, last, a manifest.

`build(dataset, output, *, workers=None, engine="local", options=PackOptions(), size=ShardSize(),
retry_failed=False, overwrite=False, progress=None) -> Manifest`

A build that was killed goes on where it was when the same call is made again; whatever was half
written has a temporary name and is not looked at. A folder is finished when it has a manifest. One
build at a time works on a folder; files that no build wrote there are never replaced.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa

from shards.build.decode_budget import PIXELS_AT_ONCE, lock_file, new_token
from shards.build.executor import Engine, run_jobs
from shards.build.pack import (
    PackOptions,
    Rejected,
    ShardJob,
    ShardRecord,
    read_record,
    read_rows,
)
from shards.build.plan import Plan, ShardSize, jobs_of, make_plan
from shards.build.retry import keep_good_shards
from shards.cache import cache_root
from shards.errors import ShardError
from shards.files import remove_stale_temporaries
from shards.layout import STATE, index_name, shard_stem
from shards.lock import lock_at, lock_folder
from shards.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    REJECTED,
    SAMPLES,
    Count,
    LabelStats,
    Manifest,
    ShardInfo,
    decode,
    encode,
)
from shards.sample import DataSet
from shards.sample_table import SCHEMA, write_parquet
from shards.store import Store

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}")
_PLAN = f"{STATE}/plan.json"
_STARTED = f"{STATE}/started"
_STATE_FILE = re.compile(
    re.escape(STATE) + r"/([a-z0-9][a-z0-9_-]{0,40}-\d{6,}\.parquet|plan\.json|started)"
)
# Headers, the JSON member, padding and the row, for an estimate.
_BYTES_BESIDE_IMAGE = 2500


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

    Returns:
        The manifest that was written.

    Raises:
        ShardError: If the source or the output does not allow it; the message says which and why.
    """
    options, size = options or PackOptions(), size or ShardSize()
    _check_name(dataset.name)
    store = Store(output)
    retry = retry_failed and store.exists(MANIFEST)
    plan = None
    if not retry:
        # Looked at before anything is written, the lock included: the set may be read-only.
        plan = make_plan(dataset, options=options, size=size, starts=_read_starts(store))
        refuse_missing(plan, options)
        finished = _finished(store, plan, overwrite=overwrite)
        if finished is not None and not store.names(STATE):
            return finished
    with _lock(store):
        if retry:
            _refuse_foreign(store, dataset.name)
            _write_starts(store, keep_good_shards(store, dataset))
            store.write(_STARTED, b"retry")
            store.remove(MANIFEST)
        if plan is None:
            plan = make_plan(dataset, options=options, size=size, starts=_read_starts(store))
            refuse_missing(plan, options)
        finished = _finished(store, plan, overwrite=overwrite)
        if finished is not None:
            remove_leftovers(store, finished.shards, finished.name)
            return finished
        _begin(store, plan, options)
        budget = new_token()
        jobs = jobs_of(
            dataset,
            plan,
            root=store.root,
            options=options,
            pixels_at_once=pixels_at_once,
            budget=budget,
        )
        tell = progress or (lambda images, total: None)
        try:
            records = _pack(jobs, plan, store, engine, workers, retry_failed, tell)
        finally:
            lock_file(budget).unlink(missing_ok=True)
        return _finish(dataset, plan, store, records)


def _begin(store: Store, plan: Plan, options: PackOptions) -> None:
    _refuse_foreign(store, plan.name)
    if not options.bmp_to_png:
        _need_space(store, plan)
    # From here on the folder is an unfinished build, even if nothing else is ever written to it.
    store.write(_STARTED, plan.source_sha256.encode())
    store.remove(MANIFEST)


@contextlib.contextmanager
def _lock(store: Store) -> Iterator[None]:
    """Let one build work on a folder; of a remote one, one of this user on this machine.

    Raises:
        ShardError: If another one does (exit code 2).
    """
    if store.folder is None:
        name = hashlib.sha256(store.shown.encode()).hexdigest()
        file = cache_root() / "locks" / f"{name}.lock"
        with lock_at(file, "building", what=store.shown):
            yield
        return
    is_new = not store.folder.exists()
    try:
        with lock_folder(store.folder, "building"):
            yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):
                store.folder.rmdir()  # nothing was written, as if nothing had been asked


def _refuse_foreign(store: Store, name: str) -> None:
    """Stop before files are replaced that no build put there.

    Raises:
        ShardError: Naming the first of them (exit code 2).
    """
    if store.exists(_STARTED):
        return
    known = set[str]()
    if store.exists(MANIFEST):
        try:
            manifest = decode(store.read(MANIFEST), where=f"{store.root}/{MANIFEST}")
        except ShardError:
            return  # damaged, and it was asked to be replaced
        known = {SAMPLES, REJECTED, *(shard.name for shard in manifest.shards)}
        known |= {index_name(shard.name) for shard in manifest.shards}
    taken = re.compile(rf"{_shard_files(name)}|{re.escape(SAMPLES)}|{re.escape(REJECTED)}")
    foreign = [file for file in store.names() if taken.fullmatch(file) and file not in known]
    if foreign:
        raise ShardError(
            f"{store.root}: holds {foreign[0]}, which no build wrote there and this one would "
            f"replace ({len(foreign):,} such files); choose another `--output`",
            exit_code=2,
        )


def _shard_files(name: str) -> str:
    return re.escape(name) + r"-\d{6,}\.(tar|idx)"


def _need_space(store: Store, plan: Plan) -> None:
    """Compare what is to be written with what is free; shards that are there are written already.

    Raises:
        ShardError: If it cannot fit.
    """
    if store.folder is None:
        return
    ours = re.compile(_shard_files(plan.name))
    held = sum(store.size_bytes(file) for file in store.names() if ours.fullmatch(file))
    needed = plan.size_bytes + _BYTES_BESIDE_IMAGE * plan.rows - held
    free = shutil.disk_usage(store.folder).free
    if needed > free:
        raise ShardError(
            f"{store.root}: about {needed / 1e9:,.1f} GB are to be written, {free / 1e9:,.1f} GB "
            "are free there; make room, or choose another `--output`"
        )


def refuse_missing(plan: Plan, options: PackOptions) -> None:
    """Stop before any work if labels name files that are not there.

    Raises:
        ShardError: Naming the first few, unless the options say `skip`.
    """
    if plan.num_missing == 0 or options.on_error == "skip":
        return
    raise ShardError(
        f"{plan.name}: {plan.num_missing:,} of {plan.rows:,} labelled images are not there, first "
        f"{', '.join(plan.missing)}; complete the folder, or leave them out with "
        "`--on-error skip`",
        exit_code=3,
    )


def default_workers() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ShardError(
            f"{name!r} cannot be the name of a set: a-z, 0-9, - and _, at most 41 characters; "
            "give another with `--name`",
            exit_code=2,
        )


def _finished(store: Store, plan: Plan, *, overwrite: bool) -> Manifest | None:
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
    if manifest.source_sha256 == plan.source_sha256:
        return manifest
    if overwrite:
        return None
    raise ShardError(
        f"{store.root}: holds a finished set {manifest.name!r} of {manifest.num_samples:,} images "
        "made from another source or with other options; choose another `--output`, or replace it "
        "with `--overwrite`",
        exit_code=3,
    )


def _pack(
    jobs: Iterator[ShardJob],
    plan: Plan,
    store: Store,
    engine: Engine,
    workers: int | None,
    retry_failed: bool,
    progress: Callable[[int, int], None],
) -> list[ShardRecord]:
    records: dict[int, ShardRecord] = {}

    def left() -> Iterator[ShardJob]:
        for job in jobs:
            record = read_record(store, job.stem)
            if record is not None and _reusable(record, job, retry_failed):
                records[record.first_id] = record
                progress(record.rows, plan.rows)
            else:
                yield job

    count = min(workers or default_workers(), len(plan.starts))
    if store.root.startswith("memory:"):
        count = 1  # another process has another memory
    running = run_jobs(
        left(), engine=engine, workers=count, progress=lambda images: progress(images, plan.rows)
    )
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
    labels = _Labels()
    sha256 = _write_samples(store, dataset.name, records, labels)
    _write_rejected(store, rejected)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        producer=f"lmcl {_version()}",
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
    store.write(MANIFEST, encode(manifest))
    remove_leftovers(store, shards, dataset.name)
    return manifest


def remove_leftovers(store: Store, shards: Sequence[ShardInfo], name: str) -> None:
    """Remove the records of the build, and shards of an earlier one that no longer belong."""
    kept = {shard.name for shard in shards}
    kept |= {index_name(shard.name) for shard in shards}
    ours = re.compile(_shard_files(name))
    for file in store.names():
        if ours.fullmatch(file) and file not in kept:
            store.remove(file)
    for file in store.names(STATE):
        if _STATE_FILE.fullmatch(file):
            store.remove(file)
    if store.folder is not None:
        remove_stale_temporaries(store.folder)
        remove_stale_temporaries(store.folder / STATE)
        with contextlib.suppress(OSError):
            (store.folder / STATE).rmdir()  # unless somebody else's files are in it


class _Labels:
    """Running statistics of the raw scores of usable images."""

    def __init__(self) -> None:
        self._count = 0
        self._sum = self._squares = 0.0
        self._low, self._high = math.inf, -math.inf

    def add(self, table: pa.Table) -> None:
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
        if self._count == 0:
            return None
        mean = self._sum / self._count
        variance = max(0.0, self._squares / self._count - mean**2)
        return LabelStats(
            count=self._count, low=self._low, high=self._high, mean=mean, std=math.sqrt(variance)
        )


def _write_samples(store: Store, name: str, records: Sequence[ShardRecord], labels: _Labels) -> str:
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


def _write_rejected(store: Store, rejected: Sequence[Rejected]) -> None:
    if not rejected:
        store.remove(REJECTED)
        return
    store.write(REJECTED, b"".join(msgspec.json.encode(line) + b"\n" for line in rejected))


def _write_starts(store: Store, starts: tuple[int, ...]) -> None:
    store.write(_PLAN, msgspec.json.encode(starts))


def _read_starts(store: Store) -> tuple[int, ...] | None:
    if not store.exists(_PLAN):
        return None
    try:
        starts = msgspec.json.decode(store.read(_PLAN), type=tuple[Count, ...])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise ShardError(
            f"{store.root}/{_PLAN}: is damaged ({error}); choose another `--output`", exit_code=3
        ) from error
    if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise ShardError(
            f"{store.root}/{_PLAN}: is no list of first ids; choose another `--output`", exit_code=3
        )
    return starts


def _version() -> str:
    try:
        return importlib.metadata.version("lmcl")
    except importlib.metadata.PackageNotFoundError:
        return "0"
