"""How much packing costs beyond what cannot be avoided: reading, hashing and decoding each file.

Both cases run on the same files, with the same number of processes, in the same run, in turns.
`read_hash_decode` opens each file, hashes it and decodes it fully, and writes nothing; `build` is
`shards.write.build`. Processor time per image is the figure that a busy machine does not spoil.
"""

import concurrent.futures
import hashlib
import io
import multiprocessing
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import click
import numpy as np
from PIL import Image
from tqdm import tqdm

from lmcl.bench.record import Record, append, make_record, timed, to_json
from shards.datasets.demo_contents import render
from shards.datasets.unlabelled import open_unlabelled
from shards.plan import ShardSize
from shards.write import build, default_workers

_CHUNK = 64
_FORMATS = {"jpg": "JPEG", "png": "PNG", "bmp": "BMP"}


@click.command("build")
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="Folder of images.")
@click.option("--codec", type=click.Choice([*_FORMATS]), default="jpg", show_default=True)
@click.option("--images", default=1000, show_default=True, help="Images drawn without --source.")
@click.option("--side", default=512, show_default=True, help="Their side, pixels.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; medians are over them.")
@click.option("--workers", type=click.IntRange(1), help="Processes of both cases. [cores]")
@click.option("--shard-samples", default=2000, show_default=True, help="Images in a shard.")
@click.option("--work", type=click.Path(path_type=Path), help="Where shards are written.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(
    source: Path | None,
    codec: str,
    images: int,
    side: int,
    rounds: int,
    workers: int | None,
    shard_samples: int,
    work: Path | None,
    output: Path | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    """Pack a folder, and read, hash and decode the same files alone, in turns."""
    with tempfile.TemporaryDirectory(prefix="lmcl-bench-", dir=work) as folder:
        if source is None:
            source = draw_images(Path(folder) / "images", codec=codec, count=images, side=side)
        records = compare(
            source,
            Path(folder) / "out",
            rounds=rounds,
            workers=workers or default_workers(),
            shard_samples=shard_samples,
            progress=not no_progress,
        )
    for record in records:
        click.echo(to_json(record) if as_json else _line(record))
    if not as_json:
        alone, packed = records
        cpu = (alone.cpu_ms_per_image or 0.0) / (packed.cpu_ms_per_image or 1.0)
        click.echo(
            f"build reaches {packed.median / alone.median:.1%} of the speed of reading, hashing "
            f"and decoding alone ({cpu:.1%} by processor time)"
        )
    if output is not None:
        append(records, output)


def compare(
    source: Path, output: Path, *, rounds: int, workers: int, shard_samples: int, progress: bool
) -> list[Record]:
    """The two records: `read_hash_decode` and `build`.

    Args:
        source: Folder of images.
        output: Folder that is written and removed every round.
        rounds: How often both run.
        workers: Processes of both.
        shard_samples: Images in a shard.
        progress: Whether to show a bar.
    """
    files = [sample.file for sample in open_unlabelled(source).samples()]
    size_bytes = sum(file.stat().st_size for file in files)
    walls: dict[str, list[float]] = {"read_hash_decode": [], "build": []}
    cpus: dict[str, list[float]] = {"read_hash_decode": [], "build": []}

    def alone() -> None:
        read_hash_decode(files, workers=workers)

    def pack() -> None:
        dataset = open_unlabelled(source)
        build(dataset, output, workers=workers, size=ShardSize(samples=shard_samples))

    alone()  # the files are in memory from here on: disks are not what is compared
    hidden = None if progress else True
    for number in tqdm(range(rounds), "rounds", disable=hidden, file=sys.stderr):
        cases = [("read_hash_decode", alone), ("build", pack)]
        for name, function in cases if number % 2 else reversed(cases):
            wall, cpu = timed(function)
            walls[name].append(wall)
            cpus[name].append(cpu)
            shutil.rmtree(output, ignore_errors=True)
    peak = max(resource.getrusage(who).ru_maxrss for who in _WHO) * 1024
    return [
        make_record(
            "build",
            name,
            [len(files) / wall for wall in walls[name]],
            unit="images/s",
            params={
                "images": len(files),
                "mean_bytes": size_bytes // len(files),
                "workers": workers,
                "shard_samples": shard_samples,
                "ending": files[0].suffix,
            },
            cpu_ms_per_image=float(np.median(cpus[name])) * 1e3 / len(files),
            peak_bytes=peak,
        )
        for name in walls
    ]


_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def draw_images(folder: Path, *, codec: str, count: int, side: int) -> Path:
    """Write `count` different pictures of one codec; returns their folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    contents = [render(kind, height=side, width=side, rng=rng) for kind in range(8)]
    for number in range(count):
        shift = rng.integers(0, side, 2)
        moved = np.roll(contents[number % 8], shift, (0, 1))
        pixels = (moved * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.{codec}", _FORMATS[codec])
    return folder


def read_hash_decode(files: list[Path], *, workers: int) -> None:
    """The least that packing has to do with each file."""
    chunks = [files[start : start + _CHUNK] for start in range(0, len(files), _CHUNK)]
    if workers == 1:
        for chunk in chunks:
            _read_hash_decode(chunk)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for _ in pool.map(_read_hash_decode, chunks):
            pass


def _read_hash_decode(files: list[Path]) -> None:
    for file in files:
        data = file.read_bytes()
        hashlib.sha256(data).digest()
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def _line(record: Record) -> str:
    return (
        f"{record.case:<18} {record.median:8.1f} images/s ({record.p10:.1f} .. {record.p90:.1f}), "
        f"{record.cpu_ms_per_image:.2f} ms of processor time per image"
    )
