"""The steps of scripts/gpu_check.sh; each appends JSON lines to a file of its own name.

`--rehearse` runs the same code on a CPU, with tiny sizes and interpreted kernels: it proves that
the script works, and its times mean nothing (they are marked so).
"""

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from kernels import launch, manifold_contrastive_loss, tuning
from lmcl.bench import contrastive as bench
from lmcl.bench.contrastive_cases import CASES, make_inputs, ours

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "cold": {"temperature": 0.01},
    "learned-infonce-normalize": {
        "learned": True, "include_positive": True, "normalize": True, "intra_weight": "balanced",
    },
    "overlap": {"overlap": True, "intra_weight": 0.5},
    "teacher": {"keys": True},
}  # fmt: skip

# docs/kernels.md, item 7: what an H200 has to reach with bf16 rows of width 256.
TARGETS: dict[str, tuple[str, float]] = {
    "forward_tflops": (">=", 400),
    "backward_tflops": (">=", 430),
    "total_ms_20480": ("<=", 1.6),
    "times_naive_amp": (">=", 10),
    "times_careful_compiled": (">=", 1.4),
    "memory_times_naive_20480": (">=", 60),
    "total_ms_81920": ("<=", 25),
    "peak_gib_81920": ("<", 0.3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where the steps run and how large they are."""

    device: str
    rows: tuple[int, ...]
    """Rows for correctness; the second is odd in every way."""
    widths: tuple[int, ...]
    target_rows: tuple[int, int]
    case_rows: tuple[int, ...]
    rounds: int


GPU = Place(
    device="cuda", rows=(1280, 5003, 10240), widths=(128, 256, 384), target_rows=(20480, 81920),
    case_rows=(5120, 10240, 20480), rounds=20,
)  # fmt: skip
REHEARSAL = Place(
    device="cpu", rows=(40, 73), widths=(32, 48), target_rows=(60, 120), case_rows=(40, 60),
    rounds=1,
)  # fmt: skip


def correctness(place: Place, dtype: str) -> Iterator[dict[str, Any]]:
    """Each width, size and option against float64: values, gradients, bits, poisoned buffers."""
    launch.empty = _poisoned
    for width in place.widths:
        if dtype == "fp32" and width > tuning.MAX_SINGLE_WIDTH:
            continue
        for rows in place.rows:
            for name, options in OPTIONS.items():
                yield _compare(place, rows, width, dtype, name, options)


def _compare(
    place: Place, m: int, d: int, dtype: str, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    batch = _ragged_batch(m, d, place.device)
    if dtype == "fp32":
        # Kernels of float32 rows are TF32 unless torch says otherwise; compare like with like.
        torch.set_float32_matmul_precision("high")
    temperature = options.get("temperature", 0.1)
    fused, again = (_run(batch, DTYPES[dtype], "triton", options) for _ in range(2))
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
    return {
        "rows": m, "width": d, "dtype": dtype, "options": name, "wrong": wrong, "error": worst,
    }  # fmt: skip


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
    batch: dict[str, Tensor], dtype: torch.dtype, backend: str, options: dict[str, Any]
) -> dict[str, Tensor]:
    rows, hubs = (batch[name].to(dtype, copy=True).requires_grad_() for name in ("rows", "hubs"))
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
            chosen[name] = batch[name].to(dtype)
    out = manifold_contrastive_loss(
        rows, hubs, batch["group"], temperature=temperature, backend=backend, **chosen
    )
    out.loss.backward()  # type: ignore[no-untyped-call]
    result = {name: value.detach() for name, value in out._asdict().items()}
    assert rows.grad is not None
    assert hubs.grad is not None
    result |= {"d_rows": rows.grad, "d_hubs": hubs.grad}
    if isinstance(temperature, Tensor) and temperature.grad is not None:
        result["d_temperature"] = temperature.grad
    return result


def _poisoned(*shape: int, **options: Any) -> Tensor:
    return torch.full(shape, torch.nan, **options)


def targets(place: Place) -> Iterator[dict[str, Any]]:
    """The fused loss alone at the two sizes of the targets, width 256, bf16."""
    for rows in place.target_rows:
        yield _timed("fused", rows, place)


def cases(place: Place) -> Iterator[dict[str, Any]]:
    """All ways of computing the loss, medians and peaks; one that fails says why."""
    for rows in place.case_rows:
        for name in CASES:
            yield _timed(name, rows, place)


def _timed(name: str, rows: int, place: Place) -> dict[str, Any]:
    line: dict[str, Any] = {"case": name, "rows": rows, "rehearsal": place is REHEARSAL}
    try:
        if place.device == "cuda":
            figures = bench._measure_on_gpu(name, rows, 256, 10, torch.bfloat16, place.rounds)
        elif "compiled" in name:
            return line | {"left_out": "compilers are not rehearsed"}
        else:
            figures = _rehearsed(name, rows)
    except RuntimeError as error:
        return line | {"left_out": str(error).splitlines()[0]}
    for phase in bench.PHASES:
        seconds = statistics.median(figures[phase])
        line[f"{phase}_ms"] = seconds * 1e3
        line[f"{phase}_tflops"] = 2 * bench.PRODUCTS[phase] * rows**2 * 256 / seconds / 1e12
    return line | {"peak_bytes": figures["peak_bytes"][0]}


def _rehearsed(name: str, rows: int) -> bench.Figures:
    inputs = make_inputs(rows, 256, 10, dtype=torch.float32, device="cpu")
    spans = bench._step(CASES[name](), *inputs)
    return {phase: [wall] for phase, (wall, _) in spans.items()} | {"peak_bytes": [1.0]}


def sweep(place: Place) -> Iterator[dict[str, Any]]:
    """Other tiles than the shipped ones, by the shipped sizes: is the table still right?"""
    tile = tuning.Tile
    sums = [
        tile(rows=128, columns=128, warps=8, stages=2),
        tile(rows=128, columns=64, warps=8, stages=3),
        tile(rows=64, columns=64, warps=4, stages=2),
    ]
    pairs = [
        tile(rows=128, columns=64, warps=8, stages=2),
        tile(rows=64, columns=64, warps=4, stages=2),
        tile(rows=64, columns=64, warps=8, stages=2),
    ]
    make_plan = tuning.make_plan
    for field, tiles in (("sums", sums), ("pairs", pairs)):
        for chosen in tiles:
            tuning.make_plan = functools.partial(_replan, make_plan, field, chosen)
            yield {"kernel": field, "tile": dataclasses.astuple(chosen)} | _timed(
                "fused", place.case_rows[-1], place
            )
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


def graph(place: Place) -> Iterator[dict[str, Any]]:
    """A CUDA graph of a small forward and backward, beside the same calls launched singly."""
    rows = min(1280, place.case_rows[0])
    loss = ours("triton")
    dtype = torch.bfloat16 if place.device == "cuda" else torch.float32
    inputs = make_inputs(rows, 256, 10, dtype=dtype, device=place.device)

    def step() -> None:
        loss(*inputs, 0.1).backward()  # type: ignore[no-untyped-call]

    step()
    line = {"rows": rows, "launched_ms": _clock(step, place), "rehearsal": place is REHEARSAL}
    if place.device != "cuda":
        yield line | {"left_out": "a CPU has no CUDA graphs"}
        return
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        step()
    yield line | {"graph_ms": _clock(captured.replay, place)}


def _clock(function: Callable[[], None], place: Place) -> float:
    times = []
    for _ in range(place.rounds):
        bench._synchronize(place.device)
        start = time.perf_counter()
        function()
        bench._synchronize(place.device)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def summarise(folder: Path, place: Place) -> bool:
    """Print what was wrong and every target with its figure; True if all is well."""
    checked = [line for dtype in DTYPES for line in _read(folder / f"correctness-{dtype}.jsonl")]
    wrong = [line for line in checked if line["wrong"]]
    print(f"correctness: {len(checked)} configurations, {len(wrong)} wrong")
    for line in wrong:
        place_of = f"{line['dtype']} {line['rows']} x {line['width']} {line['options']}"
        print(f"  {place_of}: {line['wrong']}")
    figures = _figures(folder, place)
    met = True
    for name, (sign, bound) in TARGETS.items():
        if name not in figures:
            print(f"{name}: not measured (see the logs)")
            met = False
            continue
        value = figures[name]
        good = value >= bound if sign == ">=" else value <= bound
        met = met and good
        print(f"{name}: {value:.4g} (target {sign} {bound:g}) {'met' if good else 'MISSED'}")
    if place is REHEARSAL:
        print("rehearsal on a CPU: the figures above mean nothing")
        return bool(checked) and not wrong
    return met and bool(checked) and not wrong


def _figures(folder: Path, place: Place) -> dict[str, float]:
    small, large = place.target_rows
    fused = {line["rows"]: line for line in _read(folder / "targets.jsonl") if "both_ms" in line}
    others = {
        line["case"]: line
        for line in _read(folder / "cases.jsonl")
        if line["rows"] == place.case_rows[-1] and "both_ms" in line
    }
    figures = {}
    if small in fused:
        line = fused[small]
        figures["forward_tflops"] = line["forward_tflops"]
        figures["backward_tflops"] = line["backward_tflops"]
        figures["total_ms_20480"] = line["both_ms"]
    if large in fused:
        figures["total_ms_81920"] = fused[large]["both_ms"]
        figures["peak_gib_81920"] = fused[large]["peak_bytes"] / 2**30
    if "fused" in others:
        ours_ms = others["fused"]["both_ms"]
        for name, case in (
            ("times_naive_amp", "naive_eager"),
            ("times_careful_compiled", "careful_compiled"),
        ):
            if case in others:
                figures[name] = others[case]["both_ms"] / ours_ms
        if "naive_eager" in others:
            figures["memory_times_naive_20480"] = (
                others["naive_eager"]["peak_bytes"] / others["fused"]["peak_bytes"]
            )
    return figures


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Run one step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    names = ["correctness", "targets", "cases", "sweep", "graph", "summary"]
    parser.add_argument("step", choices=names)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    asked = parser.parse_args()
    place = REHEARSAL if asked.rehearse else GPU
    if asked.step == "summary":
        raise SystemExit(not summarise(asked.output, place))
    steps: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "correctness": lambda: correctness(place, asked.dtype),
        "targets": lambda: targets(place),
        "cases": lambda: cases(place),
        "sweep": lambda: sweep(place),
        "graph": lambda: graph(place),
    }
    suffix = f"-{asked.dtype}" if asked.step == "correctness" else ""
    failed = False
    with (asked.output / f"{asked.step}{suffix}.jsonl").open("a", encoding="utf-8") as out:
        for line in steps[asked.step]():
            failed = failed or bool(line.get("wrong"))
            out.write(json.dumps(line) + "\n")
            out.flush()
            print(json.dumps(line), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
