"""`lmcl bench contrastive`: time and memory of the loss, forward, backward and both.

On the CPU every case has a process of its own, so that its peak memory is its own; processor time
is the figure to trust on a shared machine. On a GPU all cases share the process and its clock.
"""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from lmcl.bench.contrastive_cases import CASES, SHARE_OF_PAIRS, make_inputs
from lmcl.bench.contrastive_chart import chart
from lmcl.bench.record import Record, append, cpu_seconds, make_record, to_json
from lmcl.utils.kernels import DTYPES

TEMPERATURE = 0.1
PHASES = ("forward", "backward", "both")
PRODUCTS = {"forward": 1, "backward": 2, "both": 3}
"""Matrix products that the work needs at least; TFLOP/s are counted with these for every case."""

_DTYPES = {name: DTYPES[name] for name in ("fp32", "bf16", "fp16")}

AHEAD_CYCLES = 5_000_000
"""How long a GPU is kept asleep (some 3 ms) so that the host has queued a case before it starts:
then events time the work and not Python's launching of it, as in a loop that the GPU holds up."""

Figures = dict[str, list[float]]


def run(
    *,
    m: tuple[int, ...],
    d: int,
    crops: int,
    dtype: str | None,
    cases: tuple[str, ...],
    rounds: int,
    device: str | None,
    output: Path | None,
    chart_path: Path | None,
    as_json: bool,
    no_progress: bool,
) -> None:
    r"""Measure the loss in seven ways, and SupCon, InfoNCE and CLIP in two; needs no data.

    \b
    Example:
      lmcl bench contrastive --rows 10240 --output benchmarks/results/contrastive.jsonl
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or ("bf16" if device == "cuda" else "fp32")
    names = [name for name in cases or CASES if device == "cuda" or name != "fused"]
    work = [(size, name) for size in m or (2560, 10240) for name in names]
    records: list[Record] = []
    peak_rate = matmul_rate(device, dtype)
    for size, name in tqdm(work, unit="case", disable=True if no_progress else None):
        try:
            figures = measure(name, size, d, crops, dtype=dtype, device=device, rounds=rounds)
        except (RuntimeError, MemoryError) as error:
            click.echo(f"{name} at {size} rows: left out, {str(error).splitlines()[0]}", err=True)
            continue
        records += _records(name, size, d, crops, dtype, device, figures, peak_rate)
    if output is not None:
        append(records, output)
    if chart_path is not None:
        chart_path.parent.mkdir(parents=True, exist_ok=True)
        chart_path.write_text(chart(records), encoding="utf-8")
    for record in records:
        click.echo(to_json(record) if as_json else _line(record))


def measure(
    name: str, m: int, d: int, crops: int, *, dtype: str, device: str, rounds: int
) -> Figures:
    """Seconds per round of each phase, processor seconds likewise, and peak bytes.

    Returns:
        `forward`, `backward`, `both` in seconds; the same with `cpu_` before; `peak_bytes`.

    Raises:
        RuntimeError: If the case cannot run here, e.g. for want of memory or a compiler.
    """
    if device == "cuda":
        return _measure_on_gpu(name, m, d, crops, _DTYPES[dtype], rounds)
    # Threads that wait must sleep: on a shared machine spinning would be counted as work.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(sender, name, m, d, crops, dtype, rounds))
    child.start()
    sender.close()
    try:
        answer = receiver.recv()
    except EOFError:
        answer = "its process ended without an answer (out of memory?)"
    child.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    result: Figures = answer
    return result


def _child(
    sender: Connection, name: str, m: int, d: int, crops: int, dtype: str, rounds: int
) -> None:
    try:
        loss = CASES[name]()
        # Libraries, thread pools and compilers wake up before anything is counted; a compiled
        # case needs its own size for that.
        warm = m if "compiled" in name else 4 * crops
        _step(loss, *make_inputs(warm, d, crops, dtype=_DTYPES[dtype], device="cpu"))
        inputs = make_inputs(m, d, crops, dtype=_DTYPES[dtype], device="cpu")
        start = _resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        figures: Figures = {key: [] for phase in PHASES for key in (phase, f"cpu_{phase}")}
        for _ in range(rounds):
            for phase, (wall, cpu) in _step(loss, *inputs).items():
                figures[phase].append(wall)
                figures[f"cpu_{phase}"].append(cpu)
        figures["peak_bytes"] = [_resident_bytes("VmHWM") - start]
        sender.send(figures)
    except Exception as error:
        sender.send(f"{type(error).__name__}: {error}")


def _step(
    loss: Callable[[Tensor, Tensor, Tensor, float], Tensor],
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
) -> dict[str, tuple[float, float]]:
    rows.grad = hubs.grad = None
    marks = [(time.perf_counter(), cpu_seconds())]
    value = loss(rows, hubs, group, TEMPERATURE)
    marks.append((time.perf_counter(), cpu_seconds()))
    value.backward()  # type: ignore[no-untyped-call]
    marks.append((time.perf_counter(), cpu_seconds()))
    spans = {"forward": (0, 1), "backward": (1, 2), "both": (0, 2)}
    return {
        phase: (marks[b][0] - marks[a][0], marks[b][1] - marks[a][1])
        for phase, (a, b) in spans.items()
    }


def _measure_on_gpu(
    name: str, m: int, d: int, crops: int, dtype: torch.dtype, rounds: int
) -> Figures:
    loss = CASES[name]()
    rows, hubs, group = make_inputs(m, d, crops, dtype=dtype, device="cuda")
    for _ in range(3):
        rows.grad = hubs.grad = None
        loss(rows, hubs, group, TEMPERATURE).backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    figures: Figures = {phase: [] for phase in PHASES}
    for _ in range(max(rounds, 10)):
        rows.grad = hubs.grad = None
        marks: list[Any] = [torch.cuda.Event(True) for _ in range(3)]  # type: ignore[no-untyped-call]
        torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        marks[0].record()
        value = loss(rows, hubs, group, TEMPERATURE)
        marks[1].record()
        value.backward()  # type: ignore[no-untyped-call]
        marks[2].record()
        torch.cuda.synchronize()
        figures["forward"].append(marks[0].elapsed_time(marks[1]) / 1e3)
        figures["backward"].append(marks[1].elapsed_time(marks[2]) / 1e3)
        figures["both"].append(marks[0].elapsed_time(marks[2]) / 1e3)
    figures["peak_bytes"] = [float(torch.cuda.max_memory_allocated() - start)]
    return figures


def matmul_rate(device: str, dtype: str) -> float:
    """Floating-point operations per second of a large product of the library, measured."""
    size = 8192 if device == "cuda" else 1536
    left = torch.randn(size, size, device=device).to(_DTYPES[dtype])
    times = []
    for _ in range(4):
        _synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            left @ left
        _synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return 2 * size**3 / min(times)


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _records(
    name: str,
    m: int,
    d: int,
    crops: int,
    dtype: str,
    device: str,
    figures: Figures,
    peak_rate: float,
) -> list[Record]:
    records = []
    pairs = SHARE_OF_PAIRS.get(name, 1.0) * m * m
    for phase in PHASES:
        rate = 2 * PRODUCTS[phase] * pairs * d / statistics.median(figures[phase])
        params: dict[str, int | float | str | bool] = {
            "rows": m,
            "width": d,
            "crops": crops,
            "dtype": dtype,
            "phase": phase,
            "tflops": round(rate / 1e12, 4),
            "share_of_matmul": round(rate / peak_rate, 4),
        }
        cpu = figures.get(f"cpu_{phase}")
        if cpu:
            params["cpu_s"] = round(statistics.median(cpu), 4)
        records.append(
            make_record(
                "contrastive",
                name,
                [value * 1e3 for value in figures[phase]],
                unit="ms",
                params=params,
                cpu_ms_per_image=statistics.median(cpu) * 1e3 * crops / m if cpu else None,
                peak_bytes=int(figures["peak_bytes"][0]),
                device=torch.cuda.get_device_name() if device == "cuda" else None,
            )
        )
    return records


def _line(record: Record) -> str:
    params = record.params
    cpu = f"{params['cpu_s']:9.3f} cpu s" if "cpu_s" in params else ""
    return (
        f"{record.case:17} {params['rows']:6} x {params['width']} {params['phase']:8} "
        f"{record.median:10.2f} ms {cpu} {(record.peak_bytes or 0) / 2**20:9.1f} MiB "
        f"{params['tflops']:8.3f} TFLOP/s {float(params['share_of_matmul']):6.1%} of matmul"
    )


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory needs Linux")
