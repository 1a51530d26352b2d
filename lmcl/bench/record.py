"""One benchmark figure as one JSON line: what was measured, how, where, on which commit."""

import dataclasses
import json
import os
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lmcl.utils.environment import git_state, installed_versions, processor_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One case of one benchmark (docs/benchmarks.md explains the fields)."""

    bench: str
    """The benchmark: loader, contrastive, step, score, build."""
    case: str
    """What was run, e.g. `dali` or `chunked`."""
    params: dict[str, int | float | str | bool]
    """Sizes and settings of the case."""
    median: float
    """Median over the rounds, in `unit`."""
    p10: float
    """10th percentile over the rounds."""
    p90: float
    """90th percentile over the rounds."""
    unit: str
    """Unit of the three figures, e.g. `ms` or `images/s`."""
    rounds: int
    """How many rounds the percentiles are taken over."""
    cpu_ms_per_image: float | None = None
    """Processor time of all threads per image, where that has a meaning."""
    peak_bytes: int | None = None
    """Peak memory above the start of the case."""
    crop_share: float | None = None
    """Share of the images' crops that a scoring looked at."""
    agreement: float | None = None
    """SRCC of a scoring's order of the images with that of all crops in float32 by PyTorch."""
    commit: str = ""
    """Git commit, empty outside a checkout."""
    dirty: bool = False
    """True if tracked files differed from the commit."""
    device: str = ""
    """Processor or GPU."""
    engines: str = ""
    """The line a run begins with, where the case is one: device, what decodes, what computes the
    loss, and why where one fell back. Lines of earlier versions have none."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of what the figure depends on."""


def make_record(
    bench: str,
    case: str,
    values: Sequence[float],
    *,
    unit: str,
    params: dict[str, int | float | str | bool],
    cpu_ms_per_image: float | None = None,
    peak_bytes: int | None = None,
    device: str | None = None,
    engines: str = "",
    crop_share: float | None = None,
    agreement: float | None = None,
) -> Record:
    """Summarise the rounds of one case and stamp it with commit, device and versions."""
    commit, dirty = git_state()
    return Record(
        bench=bench,
        case=case,
        params=params,
        median=float(np.median(values)),
        p10=float(np.percentile(values, 10)),
        p90=float(np.percentile(values, 90)),
        unit=unit,
        rounds=len(values),
        cpu_ms_per_image=cpu_ms_per_image,
        peak_bytes=peak_bytes,
        crop_share=crop_share,
        agreement=agreement,
        commit=commit,
        dirty=dirty,
        device=device or f"{os.cpu_count()} x {processor_name()}",
        engines=engines,
        versions=installed_versions(),
    )


def append(records: Sequence[Record], path: Path) -> None:
    """Append one JSON line per record; the folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        for record in records:
            out.write(to_json(record) + "\n")


def to_json(record: Record) -> str:
    """The record as one line of JSON."""
    return json.dumps(dataclasses.asdict(record), sort_keys=False)


def cpu_seconds() -> float:
    """Processor seconds of all threads of this process and its finished children so far."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def timed(function: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    function()
    return time.perf_counter() - wall, cpu_seconds() - cpu


def paired_records(
    bench: str,
    rounds: dict[str, Sequence[tuple[float, float]]],
    *,
    images: int,
    params: dict[str, int | float | str | bool],
    share: str,
    peaks: dict[str, int] | None = None,
) -> list[Record]:
    """Records of two ways of doing the same with images, and the second's share of the first.

    Args:
        bench: Name of the benchmark.
        rounds: Wall and processor seconds of every round, the first way's and the second's.
        images: Images a round.
        params: Of both.
        share: Begins the names of the shares: `<share>_by_wall_time`, `<share>_by_processor_time`.
        peaks: Peak bytes, where they were looked at.
    """
    records = [
        make_record(
            bench,
            name,
            [images / wall for wall, _ in spent],
            unit="images/s",
            params=params,
            cpu_ms_per_image=float(np.median([cpu for _, cpu in spent])) * 1e3 / images,
            peak_bytes=(peaks or {}).get(name),
        )
        for name, spent in rounds.items()
    ]
    first, second = rounds.values()
    for place, clock in enumerate(("wall", "processor")):
        shares = [a[place] / b[place] for a, b in zip(first, second, strict=True)]
        case = f"{share}_by_{clock}_time"
        records.append(make_record(bench, case, shares, unit="ratio", params=params))
    return records
