"""One shard's work: read, check, hash, decode and pack its samples. The same for every engine.

A job depends on its arguments and the files they name, and on nothing else; that is why the bytes
of a shard do not depend on the number of workers, the engine or the machine.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from shards.build.decode_budget import Decoding, PixelBudget, lock_file
from shards.build.image import (
    BMP_TO_PNG_PICTURES,
    ImageInfo,
    bmp_to_png,
    inspect,
)
from shards.datasets.pictures import read_picture
from shards.errors import MOST_PROBLEMS, ShardError, several_problems
from shards.layout import STATE, index_line, key_of, shard_stem
from shards.limits import MAX_PIXELS
from shards.manifest import NOTED, ShardInfo
from shards.picture_notes import join_notes, too_small
from shards.sample import Sample
from shards.sample_table import NO_LEVEL, SampleRow, described_row, group_key, to_arrow
from shards.source_files import read_regular
from shards.store import Store
from shards.tar import TarWriter
from shards.text import printable

_RECORD = b"lmcl-record"
_WAY_OUT = "; replace the file, or leave it out with `--on-error skip`"

OnError = Literal["fail", "skip"]


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What changes the bytes of a shard, or what happens to an image that cannot be packed."""

    on_error: OnError = "fail"
    """`skip` leaves an unreadable image out and lists it in `rejected.jsonl`."""
    bmp_to_png: bool = False
    """Store BMP files as PNG, checked pixel for pixel."""
    max_pixels: int = MAX_PIXELS
    """Refuse larger images without decoding them."""
    min_side: int = 0
    """Refuse images with a shorter side, pixels."""


def hashed(options: PackOptions) -> dict[str, object]:
    """Options as they go into hashes: what earlier versions did not know is there if it is used."""
    fields = dataclasses.asdict(options)
    return {name: fields[name] for name in fields if name != "min_side" or fields[name]}


@dataclass(frozen=True, kw_only=True)
class ShardJob:
    """Everything one shard is made from."""

    root: str
    """Folder or URL of the set being built."""
    set_name: str
    """Short name, the first part of keys and file names."""
    index: int
    """Number of the shard in its file name."""
    first_id: int
    """Id of the first sample; the others follow."""
    samples: tuple[Sample, ...]
    """The samples, in order of their ids."""
    options: PackOptions
    """How to pack."""
    fingerprint: str
    """Hash of samples, file sizes, file times and options; decides whether a record is reused."""
    pixels_at_once: int
    """Decoded at once by all workers of this set on a machine; changes no byte."""
    budget: str
    """Token of the budget they share (`decode_budget.new_token`); changes no byte."""

    @property
    def stem(self) -> str:
        """File name of the shard without its ending."""
        return shard_stem(self.set_name, self.index)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """One line of `rejected.jsonl`."""

    id: int
    path: str
    file: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Noted:
    """One line of `noted.jsonl`: an image that was packed and should be looked at."""

    id: int
    path: str
    note: str


_NOTED = msgspec.json.Decoder(Noted)


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """What is remembered about a finished shard until the manifest is written."""

    fingerprint: str | None
    """The job's fingerprint; None for a shard taken over from a finished set."""
    first_id: int
    rows: int
    shard: ShardInfo | None
    """None if every image was rejected: no empty shard is ever written."""
    rejected: tuple[Rejected, ...]
    noted: tuple[Noted, ...] = ()


def pack_shard(job: ShardJob, *, progress: Callable[[int], None]) -> ShardRecord:
    """Write one shard, its index, its rows and, last, its record.

    Args:
        job: What to pack and where.
        progress: Called with the number of images finished since the last call.

    Raises:
        ShardError: If an image cannot be packed and the options say `fail`.
    """
    store = Store(job.root)
    rows: list[SampleRow] = []
    rejected: list[Rejected] = []
    failed: list[ShardError] = []
    noted: list[Noted] = []
    index_lines: list[str] = []
    budget = PixelBudget(lock_file(job.budget), pixels=job.pixels_at_once)
    with contextlib.closing(budget), store.writing(f"{job.stem}.tar", durable="bytes") as out:
        tar = TarWriter(out)
        for id, sample in enumerate(job.samples, start=job.first_id):
            try:
                data, info = _read_checked(sample, job.options, budget.hold)
            except ShardError as error:
                if job.options.on_error == "fail":
                    # The others are looked at too: one bad image a run would be a long way.
                    failed.append(error)
                    if len(failed) == MOST_PROBLEMS:
                        break
                    continue
                rejected.append(_rejected(id, sample, error))
                rows.append(rejected_row(id, sample))
            else:
                if failed:
                    continue
                row, line = _add(tar, job, id, sample, data, info)
                rows.append(row)
                index_lines.append(line)
                if info.notes:
                    noted.append(Noted(id=id, path=sample.path, note=join_notes(info.notes)))
            progress(1)
        if failed:
            raise _all_of(failed)
        sha256 = tar.close()
    record = _record(store, job, rows, rejected, index_lines, (tar.size_bytes, sha256))
    record = dataclasses.replace(record, noted=tuple(noted))
    write_record(store, job.stem, record, to_arrow(rows))
    return record


def _all_of(failed: list[ShardError]) -> ShardError:
    if len(failed) == 1:
        return failed[0]
    reasons = [str(error).removesuffix(_WAY_OUT) for error in failed]
    return several_problems(reasons, len(failed), what="of the images of one shard")


def write_record(store: Store, stem: str, record: ShardRecord, table: pa.Table) -> None:
    """Remember a finished shard and its rows.

    Lost in a power failure it costs packing one shard again; damaged, it is not believed.
    """
    told = table.replace_schema_metadata({_RECORD: msgspec.json.encode(record)})
    with store.writing(f"{STATE}/{stem}.parquet", durable="nothing") as out:
        pq.write_table(told, out)


def read_rows(store: Store, stem: str) -> pa.Table:
    """The rows of a finished shard."""
    return pq.read_table(pa.BufferReader(store.read(f"{STATE}/{stem}.parquet")))


def read_record(store: Store, stem: str) -> ShardRecord | None:
    """The record of a shard, or None if there is none that can be trusted."""
    if not store.exists(f"{STATE}/{stem}.parquet"):
        return None
    try:
        told = (read_rows(store, stem).schema.metadata or {}).get(_RECORD, b"")
        record = msgspec.json.decode(told, type=ShardRecord)
    except (msgspec.DecodeError, pa.ArrowException, OSError, ValueError):
        return None
    if record.shard is None:
        return record
    if not store.exists(record.shard.name):
        return None
    return record if store.size_bytes(record.shard.name) == record.shard.size_bytes else None


def read_noted(store: Store) -> tuple[Noted, ...]:
    """The lines of `noted.jsonl`; none where there is no such file, or no readable one."""
    if not store.exists(NOTED):
        return ()
    try:
        return tuple(_NOTED.decode_lines(store.read(NOTED)))
    except (msgspec.DecodeError, ShardError, ValueError):
        return ()


def rejected_row(id: int, sample: Sample) -> SampleRow:
    """The row of an image that was left out: its labels, and no bytes."""
    empty = ImageInfo(codec="", width=0, height=0)
    return _row(id, sample, empty, shard=-1, offset=-1, size=0, sha256=bytes(32), ok=False)


def _read_checked(
    sample: Sample, options: PackOptions, decoding: Decoding
) -> tuple[bytes, ImageInfo]:
    if sample.problem:
        raise ShardError(sample.problem, exit_code=3)
    try:
        # The one reader of files that others name; plain system calls, as a buffered stream costs
        # three times as much, 22 us of 900 an image.
        if sample.embedded is not None:
            data = read_picture(sample.file, sample.embedded)
        else:
            data = read_regular(sample.file, offset=sample.offset, size=sample.size)
    except ShardError as error:
        raise ShardError(
            f"{error}; the labels name it: put a readable image there, or leave it out with "
            "`--on-error skip`",
            exit_code=3,
        ) from error
    where = str(sample.file) if sample.size is None else f"{sample.file}: {sample.path}"
    info = inspect(data, where=where, max_pixels=options.max_pixels, decoding=decoding)
    if problem := too_small(info.width, info.height, options.min_side):
        raise ShardError(f"{printable(where)}: {problem}", exit_code=3)
    if options.bmp_to_png and info.codec == "bmp":
        with decoding(BMP_TO_PNG_PICTURES * info.width * info.height):
            data = bmp_to_png(data, where=where)
        info = dataclasses.replace(info, codec="png")
    return data, info


def _add(
    tar: TarWriter, job: ShardJob, id: int, sample: Sample, data: bytes, info: ImageInfo
) -> tuple[SampleRow, str]:
    key = key_of(job.set_name, id)
    image = tar.add(f"{key}.{info.codec}", data)
    row = _row(
        id,
        sample,
        info,
        shard=job.index,
        offset=image.offset,
        size=image.size,
        sha256=hashlib.sha256(data).digest(),
        ok=True,
    )
    described = json.dumps(described_row(job.set_name, row), ensure_ascii=True, allow_nan=False)
    text = tar.add(f"{key}.json", described.encode("ascii"))
    return row, index_line(image, text)


def _row(
    id: int,
    sample: Sample,
    info: ImageInfo,
    *,
    shard: int,
    offset: int,
    size: int,
    sha256: bytes,
    ok: bool,
) -> SampleRow:
    return SampleRow(
        id=id,
        ok=ok,
        shard=shard,
        offset=offset,
        size=size,
        width=info.width,
        height=info.height,
        codec=info.codec,
        mos=math.nan if sample.mos is None else sample.mos,
        mos_std=math.nan if sample.mos_std is None else sample.mos_std,
        group=sample.group,
        group_key=group_key(sample.group),
        distortion=sample.distortion,
        level=NO_LEVEL if sample.level is None else sample.level,
        subset=sample.subset,
        part=sample.part,
        path=sample.path,
        sha256=sha256,
    )


def _rejected(id: int, sample: Sample, error: ShardError) -> Rejected:
    return Rejected(id=id, path=sample.path, file=str(sample.file), error=str(error))


def _record(
    store: Store,
    job: ShardJob,
    rows: list[SampleRow],
    rejected: list[Rejected],
    index_lines: list[str],
    tar: tuple[int, str],
) -> ShardRecord:
    shard = None
    if index_lines:
        text = "\n".join([f"v1.2 {len(index_lines)}", *index_lines]) + "\n"
        with store.writing(f"{job.stem}.idx", durable="nothing") as out:
            out.write(text.encode("ascii"))
        size_bytes, sha256 = tar
        shard = ShardInfo(
            name=f"{job.stem}.tar",
            size_bytes=size_bytes,
            sha256=sha256,
            samples=len(index_lines),
            first_id=job.first_id,
            rows=len(rows),
        )
    else:
        store.remove(f"{job.stem}.tar")
    return ShardRecord(
        fingerprint=job.fingerprint,
        first_id=job.first_id,
        rows=len(rows),
        shard=shard,
        rejected=tuple(rejected),
    )
