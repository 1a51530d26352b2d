"""`lmcl bench loader`: what an image's crops cost, beside what they cost otherwise.

All cases of one process run in turn in every round, and the ratio of two cases is taken within a
round: on a shared machine that is the figure to trust. Wall-clock figures need a quiet machine.
"""

import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from lmcl.bench.loader_cases import (
    Case,
    Setup,
    hand_over,
    paired_cases,
    take,
    worker_batches,
)
from lmcl.bench.loader_chart import chart
from lmcl.bench.loader_data import KINDS, make_set
from lmcl.bench.loader_limits import StageCosts, limit_cases, nearest_limit
from lmcl.bench.record import Record, append, make_record, to_json
from pipeline.normalize import normalize
from pipeline.shard_reader import ShardReader

# Targets of the design on two cores, in multiples of this loader's processor time per image.
# For JPEG the images are of KonIQ-10k's size, for PNG and BMP of TID2013's.
CPU_TARGETS = {
    "jpg": {
        "decode_alone": 1 / 1.12,
        "decode_rows_alone": 1 / 1.08,
        "tvio_slices_uint8": 1.25,
        "pil_slices_uint8": 1.3,
        "pil_tv2_float": 3.5,
        "dali_reader_op_per_crop": 1.6,
        "files_pil_decode_per_crop": 8.0,
    },
    "png": {"decode_rows_alone": 1 / 1.08, "tvio_slices_uint8": 1.4, "pil_slices_uint8": 1.4},
    "bmp": {"pil_slices_uint8": 1.2},
}
WALL_TARGETS = {"webdataset_tvio_uint8": 1.3, "webdataset_pil_float": 4.0}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def run(
    *,
    codec: str,
    images: int,
    batch: int,
    crops: int,
    size: int,
    rounds: int,
    threads: int,
    workers: int,
    work: Path | None,
    output: Path | None,
    chart_path: Path | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    r"""Measure the loader, its stages and the usual alternatives; needs no data.

    \b
    Example:
      lmcl bench loader --codec all --output benchmarks/results/loader.jsonl
    """
    records: list[Record] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in KINDS if codec == "all" else [codec]:
            count = max(images // batch, 1) * batch
            setup = Setup(
                shard_set=make_set(work or Path(temporary), KINDS[name], count),
                codec=name,
                count=count,
                batch=batch,
                crops=crops,
                size=size,
                threads=threads,
                workers=workers,
            )
            measured = measure_loader(setup, rounds=rounds, show=not no_progress)
            records += measured
            # Each kind at once: a run that is stopped leaves what it has.
            if output is not None:
                append(measured, output)
            for record in measured:
                click.echo(to_json(record) if as_json else _line(record))
    if chart_path is not None:
        chart_path.parent.mkdir(parents=True, exist_ok=True)
        chart_path.write_text(chart(records), encoding="utf-8")


def measure_loader(setup: Setup, *, rounds: int, show: bool) -> list[Record]:
    """All figures of one kind of image: cases, ratios to their targets, stages."""
    torch.set_num_threads(1)
    with ExitStack() as stack:
        cases = paired_cases(setup, stack)
        cases |= _stage_cases(setup, stack) | limit_cases(setup)
        workers = {
            name: stack.enter_context(_Workers(setup, uint8=name.endswith("uint8")))
            for name in WALL_TARGETS
            if setup.workers and not (setup.codec == "bmp" and name.endswith("uint8"))
        }
        cpu: dict[str, list[float]] = {name: [] for name in [*cases, *workers]}
        wall: dict[str, list[float]] = {name: [] for name in [*cases, *workers]}
        with tqdm(total=rounds + 1, unit="round", disable=None if show else True) as bar:
            for number in range(rounds + 1):
                for name, (case, count) in cases.items():
                    spent, took = _spent(case)
                    if number:
                        cpu[name].append(spent / count * 1e3)
                        wall[name].append(took / count)
                for name, worker in workers.items():
                    spent, took = worker.round()
                    if number:
                        cpu[name].append(spent / setup.count * 1e3)
                        wall[name].append(took / setup.count)
                bar.update()
    return [*_case_records(setup, cpu, wall), *_ratio_records(setup, cpu, wall)]


def _stage_cases(setup: Setup, stack: ExitStack) -> dict[str, tuple[Case, int]]:
    """What can be run by itself; decoding and cutting follow by subtraction."""
    reader = stack.enter_context(ShardReader(setup.shard_set))
    starts = range(0, setup.count, setup.batch)
    batches = [setup.ids[start : start + setup.batch] for start in starts]
    buffer = np.empty(max(reader.buffer_bytes(ids) for ids in batches), dtype=np.uint8)
    shape = (setup.batch, setup.crops, setup.size, setup.size, 3)
    crops = torch.randint(0, 256, shape, dtype=torch.uint8)

    def read() -> None:
        for ids in batches:
            reader.read(ids, into=buffer)

    def scale() -> None:
        normalize(crops, mean=_MEAN, std=_STD)

    return {
        "stage_read": (read, setup.count),
        "stage_normalise": (scale, setup.batch),
        "stage_copy": (hand_over(setup), setup.batch),
    }


def _spent(case: Case) -> tuple[float, float]:
    """Processor seconds of all threads of this process, and wall seconds, of one call."""
    began, wall = time.process_time(), time.perf_counter()
    case()
    return time.process_time() - began, time.perf_counter() - wall


class _Workers:
    """Worker processes that stay; their processor time is read from the system."""

    def __init__(self, setup: Setup, *, uint8: bool) -> None:
        self._steps = setup.count // setup.batch
        self._iterator: Any = iter(worker_batches(setup, uint8=uint8))
        # What workers have made in advance must not count as this round's work.
        self._ahead = 2 * setup.workers

    def __enter__(self) -> "_Workers":
        take(self._iterator, self._ahead)
        # Else they fill their queues meanwhile, and the next round finds its batches made.
        self._signal("STOP")
        return self

    def __exit__(self, *error: object) -> None:
        self._signal("CONT")
        self._iterator._shutdown_workers()

    def round(self) -> tuple[float, float]:
        """Processor seconds of workers and this process, and wall seconds, of one round.

        Workers go on for a while after a round; they are stopped between rounds, so that other
        cases have the machine to themselves and no batch is made outside of the clock.
        """
        self._signal("CONT")
        took = time.perf_counter()
        spent = self._cpu_seconds()
        take(self._iterator, self._steps)
        spent = self._cpu_seconds() - spent
        took = time.perf_counter() - took
        self._signal("STOP")
        return spent, took

    def _pids(self) -> list[int]:
        return [worker.pid for worker in self._iterator._workers]

    def _signal(self, name: str) -> None:
        for pid in self._pids():
            os.kill(pid, getattr(signal, f"SIG{name}"))

    def _cpu_seconds(self) -> float:
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
            ticks += sum(int(field) for field in fields.split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def _params(setup: Setup, **more: int | float | str | bool) -> dict[str, Any]:
    return {
        "codec": setup.codec,
        "images": setup.count,
        "batch": setup.batch,
        "crops": setup.crops,
        "size": setup.size,
        "threads": setup.threads,
        "workers": setup.workers,
    } | more


def _case_records(
    setup: Setup, cpu: dict[str, list[float]], wall: dict[str, list[float]]
) -> Iterator[Record]:
    costs = _stage_costs(setup, cpu)
    for name in cpu:
        if name.startswith("stage_"):
            continue
        rates = [1 / took for took in wall[name]]
        spent = float(np.median(cpu[name]))
        decodes = setup.crops if name == "files_pil_decode_per_crop" else 1
        yield make_record(
            "loader",
            name,
            rates,
            unit="images/s",
            params=_params(
                setup,
                crops_per_s=round(float(np.median(rates)) * setup.crops, 1),
                limit=nearest_limit(spent, costs, decodes=decodes),
            ),
            cpu_ms_per_image=round(spent, 4),
        )
    read, decode, whole = (
        np.array(cpu[name]) for name in ("stage_read", "decode_rows_alone", "dali")
    )
    if setup.codec == "bmp":
        # Its crops come from the file's bytes, which are only put in order.
        decode = read + np.array(cpu["stage_entropy"])
    stages = {
        "read": read,
        "decode": decode - read,
        # With it all that surrounds a batch: order, boxes, the feeding of DALI.
        "cut": whole - decode,
        "normalise": np.array(cpu["stage_normalise"]),
        "copy": np.array(cpu["stage_copy"]),
        "cut_alone": np.array(cpu["stage_cut_alone"]),
        "entropy": np.array(cpu.get("stage_entropy", [0.0])),
    }
    for name, values in stages.items():
        yield make_record(
            "loader", f"stage_{name}", values.tolist(), unit="ms", params=_params(setup),
            cpu_ms_per_image=round(float(np.median(values)), 4),
        )  # fmt: skip


def _stage_costs(setup: Setup, cpu: dict[str, list[float]]) -> StageCosts:
    """What the stages cost in this run, for the limits; reading is in a decoder's case too."""
    median = {name: float(np.median(values)) for name, values in cpu.items()}
    return StageCosts(
        codec=setup.codec,
        read=median["stage_read"],
        entropy=median.get("stage_entropy", 0.0),
        decode=max(median["decode_rows_alone"] - median["stage_read"], 0.0),
        cut=median["stage_cut_alone"],
    )


def _ratio_records(
    setup: Setup, cpu: dict[str, list[float]], wall: dict[str, list[float]]
) -> Iterator[Record]:
    """How many times more than ours each other case takes, per round, beside its target."""
    wall_targets = WALL_TARGETS if setup.codec == "jpg" else dict.fromkeys(WALL_TARGETS)
    cpu_targets = dict.fromkeys(CPU_TARGETS["jpg"]) | CPU_TARGETS[setup.codec]
    for kind, figures, targets in (("cpu", cpu, cpu_targets), ("wall", wall, wall_targets)):
        for name, target in targets.items():
            if name not in figures:
                continue
            ratios = np.array(figures[name]) / np.array(figures["dali"])
            verdict: dict[str, float | bool] = (
                {"target": round(target, 3), "met": bool(np.median(ratios) >= target)}
                if target is not None
                else {}
            )
            yield make_record(
                "loader",
                f"{kind}_ratio_{name}",
                ratios.tolist(),
                unit="x",
                params=_params(setup, **verdict),
            )


def _line(record: Record) -> str:
    middle = f"{record.median:10.3f} {record.unit:8} [{record.p10:.3f} .. {record.p90:.3f}]"
    extra = ""
    if "target" in record.params:
        verdict = "met" if record.params["met"] else "MISSED"
        extra = f"  target {record.params['target']}: {verdict}"
    elif record.cpu_ms_per_image is not None:
        extra = f"  {record.cpu_ms_per_image:.3f} ms of processor time per image"
        if limit := record.params.get("limit"):
            extra += f", {limit}"
    return f"{record.params['codec']:4} {record.case:38} {middle}{extra}"
