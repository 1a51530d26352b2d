"""The embedded demo set: made on the spot, never downloaded, the same bytes for the same seed.

`write_demo(folder, *, contents=60, seed=123, workers=1) -> Path` writes `images/` and
`labels.csv` into a folder and returns the CSV; `open_demo(folder) -> DataSet` reads that folder;
`shards.build.build.build(open_demo(folder), output)` packs it. Six contents take about a second.

The written rule of its score (synthetic; no person was asked): a picture of content c, damaged by
one family at level L in 1..5, has the true quality 4.6 - 0.7 L on a scale from 1 to 5, and an
undamaged one 4.6, for every family alike. Twenty simulated observers each see it with an error of
standard deviation 0.5 and answer within 1..5; `score` is their mean and `std` their sample
standard deviation.
"""

import concurrent.futures
import csv
import io
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from shards.datasets.demo_contents import KIND_NAMES, Rng, render
from shards.datasets.demo_distortions import FAMILIES, LEVELS, distort
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.files import atomic_write
from shards.lock import lock_folder
from shards.processes import end_with_parent
from shards.sample import DataSet, Facts
from shards.score_scale import ScoreScale
from shards.source_files import is_regular, read_text

SCORE = ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True)
FACTS = Facts(
    title="Embedded demo set: synthetic pictures, synthetic scores",
    licence="made by this project; no restriction",
    citation="shards/datasets/demo.py",
    source="labels.csv, made by a written rule (no person was asked)",
)
LABELS = "labels.csv"
IMAGES = "images"

_MADE = "demo.txt"
_MOST_NOTE_BYTES = 4096
_VERSION = "demo v1"
_OBSERVERS = 20
_OBSERVER_SPREAD = 0.5
_BEST, _PER_LEVEL = 4.6, 0.7
_SIDES = (160, 320)
_HEADER = ("path", "score", "std", "group", "distortion", "level", "subset")
# Of ten versions of a content six are JPEG, three PNG and one BMP, in an order that rotates.
_CODECS = ("jpg", "png", "jpg", "jpg", "bmp", "jpg", "png", "jpg", "png", "jpg")


@dataclass(frozen=True, kw_only=True)
class _Version:
    """One picture of a content."""

    name: str
    family: str
    level: int
    score: float
    std: float
    data: bytes


def write_demo(folder: Path, *, contents: int = 60, seed: int = 123, workers: int = 1) -> Path:
    """Write the demo set as a folder of images and a CSV.

    Args:
        folder: Made if it is not there. A demo set of the same size and seed is left as it is; one
            that was not finished is drawn to its end.
        contents: How many contents, each with ten versions: nine families at a level, one pristine.
        seed: Of everything drawn.
        workers: Processes; the bytes do not depend on it.

    Returns:
        Path of the CSV, which is written last.

    Raises:
        ShardError: If the folder holds another demo set, or images or labels that no demo wrote
            (exit code 3).
        LockedError: If another process draws into it (exit code 2).
    """
    if contents < 1:
        raise ShardError(f"a demo set needs at least one content, got {contents}", exit_code=2)
    made = f"{_VERSION} contents={contents} seed={seed}"
    # Looked at before anything is written, the lock included: the folder may be read-only.
    if not _is_finished(folder, made):
        with lock_folder(folder, "drawing the demo set"):
            if not _is_finished(folder, made):
                _draw(folder, made, _all_contents(contents, seed, workers))
    return folder / LABELS


def _is_finished(folder: Path, made: str) -> bool:
    """Whether the folder holds this demo set, whole.

    Raises:
        ShardError: If it holds anything else under the names that a demo set uses.
    """
    note, labels, images = folder / _MADE, folder / LABELS, folder / IMAGES
    if is_regular(note):
        found = read_text(note, limit_bytes=_MOST_NOTE_BYTES)
        if found == made:
            return labels.is_file()
        raise ShardError(
            f"{folder}: holds another demo set ({found}); choose another folder, or delete it",
            exit_code=3,
        )
    for path in (note, labels, images):
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise ShardError(
                f"{path}: is there already, and no demo wrote it (there is no {note}), so nothing "
                "is replaced; choose another folder",
                exit_code=3,
            )
    return False


def _draw(folder: Path, made: str, contents: Iterable[tuple[int, list[_Version]]]) -> None:
    images = folder / IMAGES
    with atomic_write(folder / _MADE, "w") as out:
        out.write(made)
    images.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[object, ...]] = []
    for content, versions in contents:
        for version in versions:
            (images / version.name).write_bytes(version.data)
            rows.append(
                (
                    version.name,
                    f"{version.score:.4f}",
                    f"{version.std:.4f}",
                    f"content-{content:04d}",
                    version.family,
                    version.level,
                    KIND_NAMES[content % len(KIND_NAMES)],
                )
            )
    _write_csv(folder / LABELS, rows)


def open_demo(folder: Path) -> DataSet:
    """Read a folder that `write_demo` wrote.

    Raises:
        ShardError: If it is missing or incomplete.
    """
    table = open_table(folder / LABELS, images=folder / IMAGES, name="demo", score=SCORE)
    return replace(table, facts=FACTS)


def make_content(content: int, seed: int) -> list[_Version]:
    """All versions of one content; a pure function of its arguments."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, content])))
    height, width = (int(side) for side in rng.integers(_SIDES[0] // 8, _SIDES[1] // 8 + 1, 2) * 8)
    pixels = render(content, height=height, width=width, rng=rng)
    versions = []
    for number, (family, level) in enumerate(_schedule(content)):
        score, std = _opinion(level, rng)
        codec = _CODECS[(number + content) % len(_CODECS)]
        damaged = distort(pixels, family=family, level=level, rng=rng)
        versions.append(
            _Version(
                name=f"c{content:04d}-{family}-{level}.{codec}",
                family=family,
                level=level,
                score=score,
                std=std,
                data=_encode(damaged, codec),
            )
        )
    return versions


def _schedule(content: int) -> list[tuple[str, int]]:
    """Nine of the ten families, each at a level that walks with the content; then pristine."""
    left_out = content % len(FAMILIES)
    turn = content // len(FAMILIES)
    chosen = [
        (family, (number * 2 + content + turn) % LEVELS + 1)
        for number, family in enumerate(FAMILIES)
        if number != left_out
    ]
    return [*chosen, ("pristine", 0)]


def _opinion(level: int, rng: Rng) -> tuple[float, float]:
    seen = _BEST - _PER_LEVEL * level + rng.standard_normal(_OBSERVERS) * _OBSERVER_SPREAD
    answers = np.clip(seen, SCORE.low, SCORE.high)
    return float(answers.mean()), float(answers.std(ddof=1))


def _encode(pixels: "np.typing.NDArray[np.uint8]", codec: str) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(pixels)
    if codec == "jpg":
        image.save(stream, "JPEG", quality=95, subsampling=0)
    elif codec == "png":
        image.save(stream, "PNG", compress_level=4)
    else:
        image.save(stream, "BMP")
    return stream.getvalue()


def _all_contents(contents: int, seed: int, workers: int) -> Iterator[tuple[int, list[_Version]]]:
    if workers == 1 or contents < 2:
        for content in range(contents):
            yield content, make_content(content, seed)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=end_with_parent
    ) as pool:
        made = pool.map(make_content, range(contents), [seed] * contents, chunksize=4)
        yield from enumerate(made)


def _write_csv(path: Path, rows: list[tuple[object, ...]]) -> None:
    with atomic_write(path, "w") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(_HEADER)
        writer.writerows(rows)
