"""What a very large set costs before a pixel is read: opening it, drawing a split, loading that.

The set is a sample table and a manifest without shards' bytes: every image its own group, random
scores, 2,000 images a shard. Memory is the most this process held so far, the table's making
included (it is written in pieces of 131,072 rows).
"""

import hashlib
import resource
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import pyarrow as pa

from lmcl.bench.record import Record, append, make_record, timed, to_json
from shards.cache import file_sha256
from shards.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SAMPLES,
    LabelStats,
    Manifest,
    ShardInfo,
    encode,
)
from shards.read import ShardSet, open_set
from shards.sample import Facts
from shards.sample_table import SCHEMA, write_parquet
from shards.score_scale import ScoreScale
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split

_PER_SHARD = 2000
_PER_PIECE = 131_072
_BYTES = 100_000
_LOADED = ("ok", "shard", "offset", "size", "width", "height", "mos", "group_key")


def run(*, samples: int, work: Path | None, output: Path | None, as_json: bool) -> None:
    """Open a synthetic set of many samples, draw a split of it, write it and load it."""
    with tempfile.TemporaryDirectory(prefix="lmcl-bench-", dir=work) as folder:
        write_synthetic(Path(folder), samples=samples)
        records = measure(Path(folder))
    for record in records:
        click.echo(to_json(record) if as_json else _line(record))
    if output is not None:
        append(records, output)


def measure(root: Path) -> list[Record]:
    """Records `load`, `split`, `write_split`, `load_split` and `ten_splits`, in seconds."""
    records: list[Record] = []
    opened: list[ShardSet] = []

    def load() -> None:
        opened.append(open_set(root))
        for name in _LOADED:
            getattr(opened[0].samples, name)

    def step(name: str, function: Callable[[], object]) -> None:
        wall, cpu = timed(function)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        rows = len(opened[0].samples)
        record = make_record(
            "manifest",
            name,
            [wall],
            unit="s",
            params={"samples": rows, "cpu_s": round(cpu, 3)},
            peak_bytes=peak,
        )
        records.append(record)

    step("load", load)
    shard_set = opened[0]
    drawn = make_splits(shard_set, repeats=1)
    step("split", lambda: make_splits(shard_set, repeats=1, seed=7))
    step("write_split", lambda: write_split(root, drawn[0]))
    step("load_split", lambda: load_split(shard_set, drawn[0].name))
    step("ten_splits", lambda: _ten(shard_set))
    return records


def _ten(shard_set: ShardSet) -> None:
    # One after another, as a machine with little memory would: a split is 8 bytes an image.
    for seed in range(10):
        make_splits(shard_set, repeats=1, seed=seed)


def write_synthetic(root: Path, *, samples: int) -> None:
    """Write `samples.parquet` and `manifest.json` of a set whose shards do not exist."""
    write_parquet(root / SAMPLES, _pieces(samples))
    shards = tuple(
        ShardInfo(
            name=f"synthetic-{index:06d}.tar",
            size_bytes=_PER_SHARD * _BYTES,
            sha256="0" * 64,
            samples=min(_PER_SHARD, samples - start),
            first_id=start,
            rows=min(_PER_SHARD, samples - start),
        )
        for index, start in enumerate(range(0, samples, _PER_SHARD))
    )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        producer="lmcl bench manifest",
        name="synthetic",
        score=ScoreScale(kind="mos", low=0.0, high=100.0, higher_is_better=True),
        num_samples=samples,
        num_rejected=0,
        shards=shards,
        samples_sha256=file_sha256(root / SAMPLES),
        ids_sha256=hashlib.sha256(str(samples).encode()).hexdigest(),
        source_sha256="0" * 64,
        facts=Facts(title="Synthetic manifest"),
        labels=LabelStats(count=samples, low=0.0, high=100.0, mean=50.0, std=28.9),
        members=(),
    )
    (root / MANIFEST).write_bytes(encode(manifest))


def _pieces(samples: int) -> Iterator[pa.Table]:
    rng = np.random.default_rng(0)
    for start in range(0, samples, _PER_PIECE):
        ids = np.arange(start, min(start + _PER_PIECE, samples))
        names = [f"photo/{id:010d}.jpg" for id in ids.tolist()]
        same = {
            "codec": "jpg",
            "distortion": "",
            "subset": "",
            "part": "",
        }
        columns = {
            "id": ids,
            "ok": np.ones(ids.size, bool),
            "shard": ids // _PER_SHARD,
            "offset": ids % _PER_SHARD * _BYTES + 512,
            "size": rng.integers(_BYTES // 2, _BYTES, ids.size),
            "width": np.full(ids.size, 1024),
            "height": np.full(ids.size, 768),
            "mos": rng.uniform(0, 100, ids.size),
            "mos_std": np.full(ids.size, np.nan),
            "group": names,
            "group_key": rng.integers(-(2**63), 2**63 - 1, ids.size),
            "level": np.full(ids.size, -1),
            "path": names,
            "sha256": pa.FixedSizeBinaryArray.from_buffers(
                pa.binary(32), ids.size, [None, pa.py_buffer(rng.bytes(32 * ids.size))]
            ),
            **{name: pa.repeat(value, ids.size) for name, value in same.items()},
        }
        arrays = [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA]
        yield pa.Table.from_arrays(arrays, schema=SCHEMA)


def _line(record: Record) -> str:
    return (
        f"{record.case:<12} {record.median:8.2f} s, {record.params['cpu_s']:.2f} s of processor "
        f"time, {(record.peak_bytes or 0) / 1e9:.2f} GB"
    )
