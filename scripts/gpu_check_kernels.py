"""The kernel steps of scripts/gpu_check.sh; each appends lines to kernels.jsonl.

`--rehearse` runs the same code on a CPU, with tiny sizes and interpreted kernels: it proves that
the script works, and its times mean nothing (they are marked so).
"""

import argparse
import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import io
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
import triton
from gpu_check_book import Book, Figures, Task
from torch import Tensor

from kernels import LossOutput, manifold_contrastive_loss, tuning
from kernels import triton_launch as launch
from lmcl.bench import contrastive as bench
from lmcl.bench.contrastive_cases import CASES, SHARE_OF_PAIRS, make_inputs, ours

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cold": {"temperature": 0.01},
    "learned-infonce-normalize": {
        "learned": True, "include_positive": True, "normalize": True, "intra_weight": "balanced",
    },
    "overlap": {"overlap": True, "intra_weight": 0.5},
    "teacher": {"keys": True},
    "teacher-all": {
        "keys": True, "overlap": True, "include_positive": True, "intra_weight": "balanced",
        "normalize": True,
    },
}  # fmt: skip
AUTOCAST = "autocast"
COMPILED = "compiled"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the steps run and how large they are."""

    device: str
    rows: tuple[int, ...]
    """Rows for correctness; the middle one is odd in every way."""
    widths: tuple[int, ...]
    timed_widths: tuple[int, ...]
    """Checked first, and timed: the study's width and that of a ViT-S."""
    target_rows: tuple[int, int]
    case_rows: tuple[int, ...]
    ladder_rows: tuple[int, ...]
    rounds: int


GPU = Place(
    device="cuda", rows=(1280, 5003, 10240), widths=(128, 256, 384), timed_widths=(256, 384),
    target_rows=(20480, 81920), case_rows=(5120, 10240, 20480),
    ladder_rows=(640, 1280, 2560, 5120, 10240, 40960, 81920), rounds=20,
)  # fmt: skip
REHEARSAL = Place(
    device="cpu", rows=(37,), widths=(48,), timed_widths=(256, 384), target_rows=(40, 60),
    case_rows=(40,), ladder_rows=(40,), rounds=1,
)  # fmt: skip


def correctness_first(place: Place) -> Iterator[Task]:
    """What every timing waits for: bfloat16 at the timed widths, small, odd, and every option."""
    for width in place.timed_widths if place is GPU else place.widths:
        for rows in place.rows[:2]:
            yield from _correct(place, rows, width, "bf16")


def correctness(place: Place, dtype: str) -> Iterator[Task]:
    """Each width, size and option against float64: values, gradients, bits, poisoned buffers."""
    for width in place.widths:
        if dtype == "fp32" and width > tuning.MAX_SINGLE_WIDTH:
            continue
        for rows in place.rows:
            yield from _correct(place, rows, width, dtype)
    if dtype == "fp32":
        return
    for name in (AUTOCAST, COMPILED):
        rows, width = place.rows[len(place.rows) // 2], place.widths[-1]
        yield (
            f"{dtype}-{rows}x{width}-{name}",
            functools.partial(_compare, place, rows, width, dtype, {}, called=name),
        )


def _correct(place: Place, rows: int, width: int, dtype: str) -> Iterator[Task]:
    launch.empty = _poisoned
    for name, options in OPTIONS.items():
        yield (
            f"{dtype}-{rows}x{width}-{name}",
            functools.partial(_compare, place, rows, width, dtype, options),
        )


def warm(place: Place) -> Iterator[Task]:
    """Compile what the next steps launch, in 16 processes: sizes compile nothing of their own."""
    yield "compile", functools.partial(_warm, place)


def _warm(place: Place) -> Figures:
    jobs = [
        (place.device, width, name, "", None) for width in place.timed_widths for name in OPTIONS
    ]
    jobs += [
        (place.device, width, "paper", field, tile)
        for width in place.timed_widths
        for field, tiles in TILES[width].items()
        for tile in tiles
    ]
    # In rehearsal nothing is compiled: one job shows that the way to a process is open.
    jobs = jobs if place is GPU else jobs[:1]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(16, len(jobs)), context) as pool:
        failed = [answer for answer in pool.map(_compile, jobs) if answer]
    # A tile that does not fit is the sweep's to report, not a reason to stop.
    return {"jobs": len(jobs), "failed": failed}


@contextlib.contextmanager
def _meeting_once(once: bool) -> Iterator[None]:
    """Each tile of the forward pass once, or twice, whatever the model of its cost says."""
    chosen = tuning.is_once_cheaper
    tuning.is_once_cheaper = lambda *_, **__: once
    try:
        yield
    finally:
        tuning.is_once_cheaper = chosen


def _compile(job: tuple[str, int, str, str, tuning.Tile | None]) -> str:
    device, width, name, field, tile = job
    if tile is not None:
        tuning.make_plan = functools.partial(_replan, tuning.make_plan, field, tile)
    try:
        for once in (False, True):
            with _meeting_once(once):
                _run(_ragged_batch(73, width, device), torch.bfloat16, "triton", OPTIONS[name])
    except Exception as error:
        return f"{width}-{name}-{tile}: {error}"[:300]
    return ""


def sanitized(place: Place) -> Iterator[Task]:
    """What compute-sanitizer watches: small and odd, every kernel and every flag once."""
    for width in (place.widths[0], place.widths[-1]):
        for name, options in OPTIONS.items():
            batch = _ragged_batch(73, width, place.device)
            yield f"{width}-{name}", functools.partial(_finite, batch, options)


def _finite(batch: dict[str, Tensor], options: dict[str, Any]) -> Figures:
    found = _run(batch, torch.bfloat16, "triton", options)
    return {"wrong": [name for name, value in found.items() if not bool(value.isfinite().all())]}


def _compare(
    place: Place, m: int, d: int, dtype: str, options: dict[str, Any], *, called: str = ""
) -> Figures:
    batch = _ragged_batch(m, d, place.device)
    if dtype == "fp32":
        # Kernels of float32 rows are TF32 unless torch says otherwise; compare like with like.
        torch.set_float32_matmul_precision("high")
    temperature = options.get("temperature", 0.1)
    fused, again = (_run(batch, DTYPES[dtype], "triton", options, called=called) for _ in range(2))
    plain = _run(batch, DTYPES[dtype], "dense", options)
    truth = _run(batch, torch.float64, "dense", options)
    eps = 2.0**-11 if dtype == "fp32" else torch.finfo(DTYPES[dtype]).eps
    tolerance = 8 * eps * max(1.0, 0.1 / temperature)
    sizes = {"loss": 1 / temperature, "d_temperature": 1 / temperature**2}
    worst, wrong = {}, []
    for key, exact in truth.items():
        far = float((fused[key].double() - exact).abs().max())
        allowed = float((plain[key].double() - exact).abs().max())
        scale = max(float(exact.abs().max()), sizes.get(key, 1 / (temperature * m)))
        worst[key] = far / scale
        if not far <= allowed + tolerance * scale:
            wrong.append(f"{key}: off by {far:.3g}, plain torch by {allowed:.3g}")
        if not torch.equal(fused[key], again[key]):
            wrong.append(f"{key}: two runs differ")
    return {"rows": m, "width": d, "dtype": dtype, "wrong": wrong, "error": worst}


def _ragged_batch(m: int, d: int, device: str) -> dict[str, Tensor]:
    """Images of 10 crops, with some of 1, 3 and 17 among them; M need not be a multiple of 10."""
    generator = torch.Generator().manual_seed(m + d)
    counts, left = [], m
    for wanted in (10, 10, 3, 1, 10, 17) * m:
        if left:
            counts.append(min(wanted, left))
            left -= counts[-1]

    def unit(count: int) -> Tensor:
        values = F.normalize(torch.randn(count, d, generator=generator), dim=1)
        return values.bfloat16().to(device)

    return {
        "rows": unit(m),
        "hubs": unit(len(counts)),
        "keys": unit(m),
        "group": torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(device),
        "overlap": torch.rand(m, 17, generator=generator).to(device),
    }


def _run(
    batch: dict[str, Tensor],
    dtype: torch.dtype,
    backend: str,
    options: dict[str, Any],
    *,
    called: str = "",
) -> dict[str, Tensor]:
    """Value, figures and gradients; `called` is how the fused loss is called: "" is directly."""
    # Under autocast the rows arrive as float32, and the operation rounds them itself.
    given = torch.float32 if called == AUTOCAST else dtype
    rows, hubs = (batch[name].to(given, copy=True).requires_grad_() for name in ("rows", "hubs"))
    chosen = dict(options)
    learned = chosen.pop("learned", False)
    temperature: float | Tensor = chosen.pop("temperature", 0.1)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    if learned:
        temperature = torch.tensor(
            temperature, dtype=precise, device=rows.device, requires_grad=True
        )
    for name in ("keys", "overlap"):
        if chosen.get(name):
            chosen[name] = batch[name].to(given)

    def loss(rows: Tensor, hubs: Tensor, group: Tensor) -> Any:
        return manifold_contrastive_loss(
            rows, hubs, group, temperature=temperature, backend=backend, **chosen
        )

    if called == COMPILED:
        maker = "inductor" if rows.is_cuda else "aot_eager"
        loss = torch.compile(loss, fullgraph=True, backend=maker)
    context: Any = contextlib.nullcontext()
    if called == AUTOCAST:
        context = torch.autocast(rows.device.type, dtype=dtype)
    with context:
        out = loss(rows, hubs, batch["group"])
    out.loss.backward()
    result = {
        name: value.detach() for name, value in out._asdict().items() if isinstance(value, Tensor)
    }
    assert rows.grad is not None
    assert hubs.grad is not None
    result |= {"d_rows": rows.grad, "d_hubs": hubs.grad}
    if isinstance(temperature, Tensor) and temperature.grad is not None:
        result["d_temperature"] = temperature.grad
    return result


def _poisoned(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options)


def targets(place: Place) -> Iterator[Task]:
    """The fused loss alone at the sizes and widths of the targets, bf16."""
    for width in place.timed_widths:
        for rows in place.target_rows:
            yield f"fused-{rows}x{width}", functools.partial(_timed, "fused", rows, width, place)
    yield "matmul", functools.partial(_matmul, place)


def ladder(place: Place) -> Iterator[Task]:
    """Every size beside a bare product of as many operations: none may fall out."""
    for width in place.timed_widths:
        for rows in place.ladder_rows:
            yield f"fused-{rows}x{width}", functools.partial(_beside_product, rows, width, place)


def _beside_product(rows: int, width: int, place: Place) -> Figures:
    line = _timed("fused", rows, width, place)
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    table = torch.randn(rows, width, device=place.device).to(dtype)
    product_ms = bench.PRODUCTS["both"] * _on_its_own(lambda: table @ table.T, place)
    return line | {"product_ms": product_ms, "times_product": line["both_ms"] / product_ms}


def _matmul(place: Place) -> Figures:
    dtype = "bf16" if place.device == "cuda" else "fp32"
    return {"tflops": bench.matmul_rate(place.device, dtype) / 1e12}


def cases(place: Place) -> Iterator[Task]:
    """All ways of computing the loss, medians and peaks, the largest size first."""
    for rows in sorted(place.case_rows, reverse=True):
        for name in CASES:
            yield f"{name}-{rows}", functools.partial(_timed, name, rows, 256, place)


def _timed(name: str, rows: int, width: int, place: Place) -> Figures:
    line: Figures = {"case": name, "rows": rows, "width": width, "rehearsal": place is REHEARSAL}
    if place.device == "cuda":
        figures = bench._measure_on_gpu(name, rows, width, 10, torch.bfloat16, place.rounds)
    elif "compiled" in name:
        return line | {"left_out": "compilers are not rehearsed"}
    else:
        figures = _rehearsed(name, rows, width)
    pairs = SHARE_OF_PAIRS.get(name, 1.0) * rows**2
    for phase in bench.PHASES:
        seconds = statistics.median(figures[phase])
        line[f"{phase}_ms"] = seconds * 1e3
        line[f"{phase}_tflops"] = 2 * bench.PRODUCTS[phase] * pairs * width / seconds / 1e12
    line |= _made_with(width, place) if name == "fused" else {}
    return line | {"peak_bytes": figures["peak_bytes"][0]}


def _made_with(width: int, place: Place) -> Figures:
    """What a figure of the kernels depends on beside the code: tiles, compiler, driver."""
    plan = tuning.make_plan(width, "bf16", launch.capability(torch.device(place.device)))
    shapes = {
        name: "x".join(str(size) for size in dataclasses.astuple(getattr(plan, name)))
        for name in ("sums", "pairs")
    }
    return {"tile": shapes, "triton": triton.__version__, "driver": _driver()}


@functools.cache
def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("\n")[0]


def _rehearsed(name: str, rows: int, width: int) -> bench.Figures:
    inputs = make_inputs(rows, width, 10, dtype=torch.float32, device="cpu")
    spans = bench._step(CASES[name](), *inputs)
    return {phase: [wall] for phase, (wall, _) in spans.items()} | {"peak_bytes": [1.0]}


def _tile(rows: int, columns: int, warps: int, stages: int) -> tuning.Tile:
    return tuning.Tile(rows=rows, columns=columns, warps=warps, stages=stages)


TILES: dict[int, dict[str, list[tuning.Tile]]] = {
    256: {
        "sums": [_tile(128, 64, 8, 3), _tile(128, 128, 8, 2), _tile(64, 64, 4, 2)],
        "pairs": [_tile(128, 64, 8, 3), _tile(128, 64, 8, 2), _tile(64, 64, 4, 2)],
    },
    384: {
        "sums": [_tile(128, 64, 8, 2), _tile(128, 32, 8, 3), _tile(64, 64, 4, 2)],
        "pairs": [_tile(128, 32, 8, 2), _tile(64, 32, 4, 2), _tile(64, 64, 8, 2)],
    },
}
"""What the sweep tries: the shipped tiles first, then those that compile facts speak for."""


def sweep(place: Place) -> Iterator[Task]:
    """Other tiles than the shipped ones, by the shipped sizes: is the table still right?"""
    for width in place.timed_widths:
        for field, tiles in TILES[width].items():
            for chosen in tiles[:1] if place is REHEARSAL else tiles:
                shape = "x".join(str(size) for size in dataclasses.astuple(chosen))
                task = functools.partial(_with_tile, field, chosen, width, place)
                yield f"{field}-{width}-{shape}", task


def _with_tile(field: str, chosen: tuning.Tile, width: int, place: Place) -> Figures:
    make_plan = tuning.make_plan
    tuning.make_plan = functools.partial(_replan, make_plan, field, chosen)
    try:
        return {"kernel": field} | _timed("fused", place.case_rows[-1], width, place)
    finally:
        tuning.make_plan = make_plan


def _replan(
    make_plan: Callable[[int, str, int], tuning.Plan],
    field: str,
    tile: tuning.Tile,
    d: int,
    dtype: str,
    capability: int,
) -> tuning.Plan:
    plan = make_plan(d, dtype, capability)
    return (
        dataclasses.replace(plan, sums=tile)
        if field == "sums"
        else dataclasses.replace(plan, pairs=tile)
    )


def graph(place: Place) -> Iterator[Task]:
    """A CUDA graph of a small forward and backward, beside the same calls launched singly."""
    yield "small", functools.partial(_graph, place)


def _graph(place: Place) -> Figures:
    rows = min(1280, place.case_rows[0])
    loss = ours("triton")
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    inputs = make_inputs(rows, 256, 10, dtype=dtype, device=place.device)

    def step() -> None:
        loss(*inputs, 0.1).backward()  # type: ignore[no-untyped-call]

    step()
    line = {"rows": rows, "launched_ms": _clock(step, place), "rehearsal": place is REHEARSAL}
    if place.device != "cuda":
        return line | {"left_out": "a CPU has no CUDA graphs"}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    return line | {"graph_ms": _clock(captured.replay, place)}


def share(place: Place) -> Iterator[Task]:
    """The loss's share of a training step: ViT-S/16 in bf16, 128 images of 10 crops and a hub."""
    yield "vit-s16", functools.partial(_share, place)


def _share(place: Place) -> Figures:
    """Encoder forward and backward, and the loss on what comes out, each by itself.

    The encoder runs uncompiled; the step part has the share of a compiled step with everything in
    it. A smaller model or a faster one makes the loss's share larger.
    """
    import timm

    on_gpu = place.device == "cuda"
    name = "deit3_small_patch16_224" if on_gpu else "test_vit"
    images, side = (128, 224) if on_gpu else (2, 160)
    model = timm.create_model(name, num_classes=0).to(place.device)
    pixels = torch.randn(images * 11, 3, side, side, device=place.device)
    group = torch.arange(images, device=place.device).repeat_interleave(10)
    precise = torch.autocast(place.device, dtype=torch.bfloat16)
    with torch.no_grad(), precise:
        embedded = model(pixels[:22])
    width = embedded.shape[1]
    tables = F.normalize(torch.randn(images * 11, width, device=place.device), dim=1)
    upstream = torch.randn(images * 11, width, device=place.device, dtype=embedded.dtype)

    def encode() -> None:
        model.zero_grad()
        with precise:
            model(pixels).backward(upstream)

    def compare() -> LossOutput:
        # As the objective of a run calls it: float32 tables, outside autocast.
        leaves = tables.clone().requires_grad_()
        out = manifold_contrastive_loss(
            leaves[: images * 10], leaves[images * 10 :], group, temperature=0.1,
            precision="auto", validate=False,
        )  # fmt: skip
        out.loss.backward()
        return out

    said = compare()
    if on_gpu and said.backend != "triton":
        raise RuntimeError(f"the loss of a default step took {said.backend}: {said.reason}")
    encode_ms, compare_ms = (_on_its_own(work, place) for work in (encode, compare))
    return {
        "encoder": name, "images": images, "width": width, "encoder_ms": encode_ms,
        "loss_ms": compare_ms, "share": compare_ms / (compare_ms + encode_ms),
        "backend": said.backend, "precision": said.precision,
        "rehearsal": not on_gpu,
    }  # fmt: skip


def _on_its_own(work: Callable[[], object], place: Place) -> float:
    """Milliseconds of the GPU, with the host kept ahead of it as in a training loop."""
    for _ in range(3 if place.device == "cuda" else 1):
        work()
    if place.device != "cuda":
        return _clock(work, place)
    times = []
    for _ in range(place.rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(bench.AHEAD_CYCLES)
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def stages(place: Place) -> Iterator[Task]:
    """Where the fused loss spends its time: milliseconds of each kernel, by torch's profiler."""
    for width in place.timed_widths:
        for rows in place.target_rows:
            yield f"fused-{rows}x{width}", functools.partial(_stages, rows, width, place)
        yield f"twice-{place.target_rows[0]}x{width}", functools.partial(_twice, width, place)


def _twice(width: int, place: Place) -> Figures:
    """The same with every tile of the forward pass formed twice (decision 0111)."""
    with _meeting_once(False):
        return _stages(place.target_rows[0], width, place)


def _stages(rows: int, width: int, place: Place) -> Figures:
    on_gpu = place.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    inputs = make_inputs(rows, width, 10, dtype=dtype, device=place.device)
    loss = ours("triton")
    activity = torch.profiler.ProfilerActivity
    kinds = [activity.CPU, *([activity.CUDA] if on_gpu else [])]
    loss(*inputs, 0.1).backward()  # type: ignore[no-untyped-call]
    with torch.profiler.profile(activities=kinds) as profile:
        for _ in range(place.rounds):
            loss(*inputs, 0.1).backward()  # type: ignore[no-untyped-call]
        bench._synchronize(place.device)
    spent = {
        event.key: (event.device_time_total if on_gpu else event.cpu_time_total)
        / place.rounds / 1e3
        for event in profile.key_averages()
    }  # fmt: skip
    longest = dict(sorted(spent.items(), key=lambda item: -item[1])[:16])
    products = {"log_sums": 1, "symmetric_sums": 1, "pair_gradient": 2}
    rates = {
        name: 2 * count * rows**2 * width / (longest[name] / 1e3) / 1e12
        for name, count in products.items()
        if longest.get(name)
    }
    return {
        "rows": rows, "width": width, "ms": longest, "tflops": rates, "rehearsal": not on_gpu,
    } | _made_with(width, place)  # fmt: skip


NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "launch__registers_per_thread",
    "launch__occupancy_limit_shared_mem",
    "smsp__warp_issue_stalled_math_pipe_throttle_per_warp_active.pct",
    "smsp__warp_issue_stalled_barrier_per_warp_active.pct",
    "smsp__warp_issue_stalled_long_scoreboard_per_warp_active.pct",
)


def counters(place: Place) -> Iterator[Task]:
    """Hardware counters of the two heavy kernels, where ncu is there and may read them."""
    yield "ncu", functools.partial(_counters, place)


def _counters(place: Place) -> Figures:
    tool = shutil.which("ncu")
    if tool is None or place.device != "cuda":
        return {"left_out": "ncu is not on this machine, or there is no GPU"}
    done = subprocess.run(
        [tool, "--csv", "--clock-control", "none", "--metrics", ",".join(NCU_METRICS),
         "--kernel-name", "regex:_sums|pair_gradient", "--launch-count", "4",
         sys.executable, "-W", "ignore", __file__, "--book", "unused", "once"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    text = done.stdout[done.stdout.find('"ID"') :] if '"ID"' in done.stdout else ""
    if not text:
        tail = (done.stdout + done.stderr).strip().splitlines()[-3:]
        return {"left_out": f"ncu gave no counters: {' '.join(tail)}"}
    table = [
        {key: row[key] for key in ("ID", "Kernel Name", "Metric Name", "Metric Value")}
        for row in csv.DictReader(io.StringIO(text))
    ]
    return {"counters": table}


def run_once(place: Place) -> None:
    """One forward and backward at the first target's size: what ncu looks at."""
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    inputs = make_inputs(place.target_rows[0], 256, 10, dtype=dtype, device=place.device)
    ours("triton")(*inputs, 0.1).backward()  # type: ignore[no-untyped-call]
    bench._synchronize(place.device)


def _clock(function: Callable[[], object], place: Place) -> float:
    times = []
    for _ in range(place.rounds):
        bench._synchronize(place.device)
        start = time.perf_counter()
        function()
        bench._synchronize(place.device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--book", type=Path, required=True, help="File of results.")
    parser.add_argument("--rehearse", action="store_true")
    steps: dict[str, Callable[[Place], Iterator[Task]]] = {
        "warm": warm,
        "correctness-first": correctness_first,
        **{f"correctness-{dtype}": functools.partial(correctness, dtype=dtype) for dtype in DTYPES},
        "sanitized": sanitized,
        "targets": targets,
        "ladder": ladder,
        "share": share,
        "cases": cases,
        "stages": stages,
        "sweep": sweep,
        "graph": graph,
        "counters": counters,
    }
    parser.add_argument("step", choices=[*steps, "once"])
    asked = parser.parse_args()
    place = REHEARSAL if asked.rehearse else GPU
    if asked.step == "once":
        run_once(place)
        return
    good = Book(asked.book).fill(asked.step, steps[asked.step](place))
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
