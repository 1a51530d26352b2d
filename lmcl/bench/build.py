"""How much packing costs beyond what cannot be avoided: reading, hashing and decoding each file.

Both cases run on the same files, with the same number of processes, in the same run, in turns; a
share is taken within a round, so that a busy minute spoils both. `read_hash_decode` opens each
file, hashes it, decodes it fully and writes nothing; its processes are started before the clock
is, and only the seconds inside its loop are counted. `build` is `shards.build.build.build`, counted
whole: planning, starting processes, packing, waiting for the disk, tables and manifest. Then the
same images are packed from tars of others and from Hugging Face's Parquet.
"""

import concurrent.futures
import hashlib
import io
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from lmcl.bench.build_sources import compare_sources
from lmcl.bench.record import Record, append, paired_records, timed, to_json
from shards.build.build import build, default_workers
from shards.build.plan import ShardSize
from shards.datasets.demo_contents import render
from shards.datasets.unlabelled import open_unlabelled

_CHUNK = 32
_DIFFERENT = 2000
_SAMPLED_EVERY_S = 0.02
_FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}


def run(
    *,
    source: Path | None,
    codecs: tuple[str, ...],
    images: int,
    side: int,
    rounds: int,
    workers: int | None,
    shard_samples: int | None,
    work: Path | None,
    output: Path | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Pack a folder, and read, hash and decode the same files alone, in turns."""
    for codec in codecs if source is None else ("",):
        with tempfile.TemporaryDirectory(prefix="lmcl-bench-", dir=work) as folder:
            files = source or Path(folder) / "images"
            if source is None:
                draw_images(files, codec=codec, count=images, side=side)
            records = compare(
                files,
                Path(folder) / "out",
                rounds=rounds,
                workers=workers or default_workers(),
                size=ShardSize(samples=shard_samples),
                progress=not no_progress,
            )
            records += compare_sources(
                [sample.file for sample in open_unlabelled(files).samples()],
                Path(folder),
                rounds=rounds,
                workers=workers or default_workers(),
                size=ShardSize(samples=shard_samples),
                progress=not no_progress,
            )
        for record in records:
            click.echo(to_json(record) if as_json else _line(record))
        if output is not None:
            append(records, output)


def compare(
    source: Path, output: Path, *, rounds: int, workers: int, size: ShardSize, progress: bool
) -> list[Record]:
    """Records `read_hash_decode`, `build`, and build's share of it by wall and processor time.

    Args:
        source: Folder of images.
        output: Folder that is written and removed every round.
        rounds: How often both run.
        workers: Processes of both.
        size: When a shard is full.
        progress: Whether to show a bar.
    """
    files = [sample.file for sample in open_unlabelled(source).samples()]
    alone: list[tuple[float, float]] = []
    packed: list[tuple[float, float]] = []

    def pack() -> None:
        build(open_unlabelled(source), output, workers=workers, size=size)

    hidden = None if progress else True
    # Both have run once before they are timed: the files are in memory from here on.
    peak = _peak_bytes_of(pack)
    shutil.rmtree(output)
    with _readers(workers) as pool:
        read_hash_decode(files, pool)
        for number in tqdm(range(rounds), "rounds", disable=hidden, file=sys.stderr):
            for name in ("alone", "build") if number % 2 else ("build", "alone"):
                if name == "alone":
                    alone.append(read_hash_decode(files, pool))
                    continue
                packed.append(timed(pack))
                shutil.rmtree(output)
    params: dict[str, int | float | str | bool] = {
        "images": len(files),
        "mean_bytes": sum(file.stat().st_size for file in files) // len(files),
        "workers": workers,
        "shard_samples": size.samples_of(len(files)),
        "ending": files[0].suffix,
    }
    return paired_records(
        "build",
        {"read_hash_decode": alone, "build": packed},
        images=len(files),
        params=params,
        share="share",
        peaks={"build": peak},
    )


def draw_images(folder: Path, *, codec: str, count: int, side: int) -> None:
    """Write `count` files of one codec into a new folder: at most 2,000 pictures, linked again.

    Ten thousand files is what a set has (KonIQ-10k, KADID-10k, SPAQ); drawing each would take
    minutes, and reading a link costs what reading its file does.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents = [
        (render(kind, height=side, width=side, rng=rng) * 255).astype(np.uint8) for kind in range(8)
    ]
    for number in range(min(count, _DIFFERENT)):
        moved = np.roll(contents[number % 8], rng.integers(0, side, 2), (0, 1))
        Image.fromarray(moved).save(folder / f"{number:05d}.{codec}", _FORMATS[codec])
    for number in range(_DIFFERENT, count):
        os.link(folder / f"{number % _DIFFERENT:05d}.{codec}", folder / f"{number:05d}.{codec}")


def read_hash_decode(
    files: list[Path], pool: concurrent.futures.ProcessPoolExecutor
) -> tuple[float, float]:
    """Wall and processor seconds of the least that packing has to do with each file."""
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    start = time.perf_counter()
    cpu = sum(pool.map(_read_hash_decode, chunks))
    return time.perf_counter() - start, cpu


def _read_hash_decode(files: list[Path]) -> float:
    start = time.process_time()
    for file in files:
        data = file.read_bytes()
        hashlib.sha256(data).digest()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    return time.process_time() - start


@contextmanager
def _readers(workers: int) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Processes that run and have loaded everything they need."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        list(pool.map(_read_hash_decode, [[] for _ in range(workers)]))
        yield pool


def _peak_bytes_of(function: Callable[[], object]) -> int:
    """The most memory this process and its children held during a call, sampled.

    Resident bytes, added up: pages that processes share count once for each of them.
    """
    done, peak = threading.Event(), 0

    def watch() -> None:
        nonlocal peak
        while not done.wait(_SAMPLED_EVERY_S):
            peak = max(peak, sum(_resident_bytes(pid) for pid in (os.getpid(), *_children())))

    # Not in a timed round: looking costs processor time of this process.
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        function()
    finally:
        done.set()
        watcher.join()
    return peak


def _children() -> list[int]:
    # Not multiprocessing.active_children: it reaps, which belongs to the thread that builds.
    found: list[int] = []
    for task in Path("/proc/self/task").glob("*/children"):
        with suppress(OSError):
            found += [int(pid) for pid in task.read_text("ascii").split()]
    return found


def _resident_bytes(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
    except (OSError, IndexError, ValueError):
        return 0  # it ended between listing and reading, or this is no Linux
    return pages * os.sysconf("SC_PAGE_SIZE")


def _line(record: Record) -> str:
    spread = f"({record.p10:.3f} .. {record.p90:.3f})"
    if record.unit == "ratio":
        return f"{record.case:<24} {record.median:8.1%} {spread}"
    text = f"{record.case:<24} {record.median:8.1f} images/s ({record.p10:.1f} .. {record.p90:.1f})"
    text += f", {record.cpu_ms_per_image:.3f} ms of processor time per image"
    if record.peak_bytes is not None:
        text += f", {record.peak_bytes / 1e6:.0f} MB at most"
    return text
