"""Packing the same images from tars of others and from Hugging Face's Parquet, in one run."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lmcl.bench.record import Record, paired_records, timed
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.table import open_table
from shards.datasets.wds import open_wds
from shards.progress import progress_bar
from shards.sample import DataSet

_A_FILE = 500
"""Images a tar and a row group, as img2dataset and `datasets` write them by the hundred."""


def compare_sources(
    files: Sequence[Path], work: Path, *, rounds: int, workers: int, size: ShardSize, progress: bool
) -> list[Record]:
    """Records `build_from_tars`, `build_from_parquet`, and the second's share of the first.

    Args:
        files: Images; each is put into a tar with a description, and into a row of a Parquet file.
        work: Folder for both and for what is built; what is built is removed every round.
        rounds: How often both run, in turns.
        workers: Processes of both.
        size: When a shard is full.
        progress: Whether to show a bar.
    """
    tars, table = work / "tars", work / "parquet" / "data.parquet"
    write_tars(files, tars)
    write_parquet(files, table)
    sources: dict[str, Callable[[], DataSet]] = {
        "build_from_tars": lambda: open_wds(tars),
        "build_from_parquet": lambda: open_table(table),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sources}
    for number in progress_bar(range(-1, rounds), desc="sources", unit="round", off=not progress):
        for name in sources if number % 2 else reversed(sources):
            opened, output = sources[name], work / name

            def pack(opened: Callable[[], DataSet] = opened, output: Path = output) -> None:
                build(opened(), output, workers=workers, size=size)

            spent = timed(pack)
            shutil.rmtree(output)
            if number >= 0:  # the first round puts the files into memory
                found[name].append(spent)
    params: dict[str, int | float | str | bool] = {
        "images": len(files),
        "mean_bytes": sum(file.stat().st_size for file in files) // len(files),
        "workers": workers,
        "ending": files[0].suffix,
    }
    return paired_records(
        "build", {**found}, images=len(files), params=params, share="parquet_share"
    )


def write_tars(files: Sequence[Path], folder: Path) -> None:
    """Tars of `KEY.jpg` and `KEY.json` with the key `mos`."""
    folder.mkdir(parents=True)
    for start in range(0, len(files), _A_FILE):
        with tarfile.open(folder / f"{start // _A_FILE:05d}.tar", "w") as out:
            for number, file in enumerate(files[start : start + _A_FILE], start):
                for ending, data in (
                    (file.suffix, file.read_bytes()),
                    (".json", json.dumps({"mos": number % 5}).encode()),
                ):
                    info = tarfile.TarInfo(f"{number:08d}{ending}")
                    info.size = len(data)
                    out.addfile(info, io.BytesIO(data))


def write_parquet(files: Sequence[Path], table: Path) -> None:
    """One file with the columns `image: struct<bytes, path>` and `mos`, as `datasets` writes it."""
    table.parent.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("mos", pa.float64())])
    with pq.ParquetWriter(table, schema) as out:
        for start in range(0, len(files), _A_FILE):
            rows = [
                {
                    "image": {"bytes": file.read_bytes(), "path": f"{number:08d}{file.suffix}"},
                    "mos": float(number % 5),
                }
                for number, file in enumerate(files[start : start + _A_FILE], start)
            ]
            out.write_table(pa.Table.from_pylist(rows, schema=schema))
