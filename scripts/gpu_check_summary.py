"""What scripts/gpu_check.sh found, against the targets; exit code 1 if anything is amiss.

A part without a line has not been asked for and is not judged; a figure that is missing in a part
that has lines counts as missed.
"""

import argparse
import operator
import statistics
from collections.abc import Callable
from pathlib import Path

from gpu_check_book import Book, Figures

SIZES = {False: (20480, 81920), True: (40, 60)}
"""Rows of the two kernel targets, on a GPU and in rehearsal."""
MILLION = 1_000_000
COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, "<": operator.lt,
}  # fmt: skip

# What an H200 has to reach with bf16; docs/kernels.md and docs/benchmarks.md say the same.
TARGETS: dict[str, dict[str, tuple[str, float]]] = {
    "kernels": {
        "forward TFLOP/s at M = 20,480": (">=", 400),
        "backward TFLOP/s at M = 20,480": (">=", 430),
        "forward and backward at M = 20,480, ms": ("<=", 1.6),
        "forward TFLOP/s at M = 20,480, D = 384": (">=", 400),
        "backward TFLOP/s at M = 20,480, D = 384": (">=", 430),
        "most times a bare product, M = 640 to 81,920": ("<=", 1.6),
        "times faster than naive AMP": (">=", 10),
        "times faster than compiled careful eager": (">=", 1.4),
        "times less peak memory than naive AMP": (">=", 60),
        "forward and backward at M = 81,920, ms": ("<=", 25),
        "peak memory at M = 81,920, GiB": ("<", 0.3),
        "share of a training step (uncompiled encoder)": ("<", 0.01),
    },
    "loader": {"times webdataset with Pillow and torchvision, images/s": (">=", 10)},
    "step": {
        "share of the measured matmul peak, compiled, best batch": (">=", 0.45),
        "data wait": ("<", 0.02),
        "loss": ("<", 0.01),
        "saliency pass": ("<", 0.1),
        "times the usual loop, crops/s": (">=", 8),
    },
    "score": {},
    "photos": {
        "squeezenet-vit, SRCC on the test part": (">=", 0.79),
        "squeezenet-vit, SRCC within ss02": (">=", 0.45),
    },
}


def kernels(lines: list[Figures], *, rehearsed: bool) -> dict[str, float]:
    """Figures of the loss by the names of their targets."""
    small, large = SIZES[rehearsed]
    found = {(line.get("step"), line.get("key")): line for line in lines}
    figures: dict[str, float] = {}
    if "both_ms" in (line := found.get(("targets", f"fused-{small}x256"), {})):
        figures["forward TFLOP/s at M = 20,480"] = line["forward_tflops"]
        figures["backward TFLOP/s at M = 20,480"] = line["backward_tflops"]
        figures["forward and backward at M = 20,480, ms"] = line["both_ms"]
    if "both_ms" in (line := found.get(("targets", f"fused-{small}x384"), {})):
        figures["forward TFLOP/s at M = 20,480, D = 384"] = line["forward_tflops"]
        figures["backward TFLOP/s at M = 20,480, D = 384"] = line["backward_tflops"]
    ratios = [line["times_product"] for line in lines if "times_product" in line]
    if ratios:
        figures["most times a bare product, M = 640 to 81,920"] = max(ratios)
    if "both_ms" in (line := found.get(("targets", f"fused-{large}x256"), {})):
        figures["forward and backward at M = 81,920, ms"] = line["both_ms"]
        figures["peak memory at M = 81,920, GiB"] = line["peak_bytes"] / 2**30
    if "share" in (line := found.get(("share", "vit-s16"), {})):
        figures["share of a training step (uncompiled encoder)"] = line["share"]
    ours = found.get(("cases", f"fused-{small}"), {})
    for case, name in (
        ("naive_eager", "times faster than naive AMP"),
        ("careful_compiled", "times faster than compiled careful eager"),
    ):
        other = found.get(("cases", f"{case}-{small}"), {})
        if "both_ms" in ours and "both_ms" in other:
            figures[name] = other["both_ms"] / ours["both_ms"]
        if case == "naive_eager" and "peak_bytes" in other and ours.get("peak_bytes"):
            figures["times less peak memory than naive AMP"] = (
                other["peak_bytes"] / ours["peak_bytes"]
            )
    return figures


def loader(lines: list[Figures], *, rehearsed: bool) -> dict[str, float]:
    """Images per second of the best decoder, in multiples of what the field uses."""
    rates = {line["key"]: line["images_per_s"] for line in lines if "images_per_s" in line}
    ours = [rate for key, rate in rates.items() if key.startswith("decode_")]
    usual = rates.get("webdataset_float")
    if not ours or not usual:
        return {}
    return {"times webdataset with Pillow and torchvision, images/s": max(ours) / usual}


def step(lines: list[Figures], *, rehearsed: bool) -> dict[str, float]:
    """Figures of the compiled loop at the batch size with the most crops per second."""
    own = "ours" if rehearsed else "ours_compiled"
    runs = [line for line in lines if line.get("case") == own]
    if not runs:
        return {}
    best = max(runs, key=lambda line: line["median"])
    batch = best["params"]["batch"]
    here = {line["case"]: line for line in lines if line.get("params", {}).get("batch") == batch}
    figures = {"share of the measured matmul peak, compiled, best batch": best["params"]["mfu"]}
    for part, name in (("data_wait", "data wait"), ("objective", "loss"),
                       ("saliency", "saliency pass")):  # fmt: skip
        if line := here.get(f"{own}_part_{part}"):
            figures[name] = line["params"]["share"]
    if line := here.get(f"ratio_{own}_to_plain_loop"):
        figures["times the usual loop, crops/s"] = line["median"]
    return figures


def photos(lines: list[Figures], *, rehearsed: bool) -> dict[str, float]:
    """Rank correlations of squeezenet-vit, whose targets are those of its pretrained stem."""
    run = next((line for line in lines if line.get("step") == "squeezenet-vit"), None)
    if run is None or run["weights"] == "random":
        return {}
    found = {
        "squeezenet-vit, SRCC on the test part": run["srcc"],
        "squeezenet-vit, SRCC within ss02": run["subsets"].get("ss02", {}).get("srcc"),
    }
    return {name: value for name, value in found.items() if value is not None}


def report(part: str, lines: list[Figures], *, rehearsed: bool) -> bool:
    """Print a part's verdicts; True if nothing is wrong and every target is met."""
    wrong = [line for line in lines if line.get("wrong")]
    checked = [line for line in lines if str(line.get("step", "")).startswith("correctness")]
    if part == "kernels":
        print(f"correctness: {len(checked)} configurations")
    for line in wrong:
        print(f"WRONG {part}/{line['step']}/{line['key']}: {'; '.join(line['wrong'])}")
    for line in lines:
        if line.get("left_out") and not line.get("wrong"):
            print(f"left out: {part}/{line['step']}/{line['key']}: {line['left_out']}")
        if part == "loader" and "images_per_s" in line:
            print(f"loader, {line['key']}: {line['images_per_s']:.0f} images/s")
        if part == "score" and line.get("case") == "lmcl_score":
            _print_score(line)
        if part == "photos" and "srcc" in line and line["step"] != "ladder":
            _print_run(line)
    if part == "photos":
        _print_ladder([line for line in lines if line.get("step") == "ladder"])
    reader = {"kernels": kernels, "loader": loader, "step": step, "photos": photos}.get(part)
    figures = reader(lines, rehearsed=rehearsed) if reader else {}
    met = True
    for name, (sign, bound) in TARGETS[part].items():
        value = figures.get(name)
        good = value is not None and COMPARE[sign](value, bound)
        met = met and good
        shown = "not measured" if value is None else f"{value:.4g}"
        verdict = "" if rehearsed else ": met" if good else ": MISSED"
        print(f"{part}, {name}: {shown} (target {sign} {bound:g}){verdict}")
    return not wrong and (met or rehearsed) and bool(part != "kernels" or checked)


def _print_score(line: Figures) -> None:
    params = line["params"]
    rate = line["median"] / params["crops"]
    hours = MILLION / rate / 3600
    print(f"score, {params['precision']}: {rate:.1f} images/s, {hours:.2f} h for a million images")


def _print_run(line: Figures) -> None:
    subsets = ", ".join(f"{name} {_four(one['srcc'])}" for name, one in line["subsets"].items())
    print(
        f"photos, {line['step']} ({line['weights']} weights, {line['epochs']} epochs of "
        f"{line['trained_on']}): SRCC {_four(line['srcc'])}, PLCC {_four(line['plcc'])} on "
        f"{line['n']} of {line['set']}; {line['seconds']:.0f} s, "
        f"{line['images_per_s']:.0f} images/s"
    )
    if subsets:
        print(f"photos, {line['step']}, SRCC within: {subsets}")


def _print_ladder(lines: list[Figures]) -> None:
    rungs: dict[str, list[Figures]] = {}
    for line in lines:
        if line["srcc"] is not None and line["plcc"] is not None:
            rungs.setdefault(line["key"].split("/")[0], []).append(line)
    for name, runs in sorted(rungs.items()):
        values = [run["srcc"] for run in runs]
        rate = statistics.mean(run["images_per_s"] for run in runs)
        print(
            f"photos, ladder {name}: SRCC {_four(statistics.mean(values))} in the mean of "
            f"{len(runs)} seeds [{_four(min(values))} .. {_four(max(values))}], "
            f"PLCC {_four(statistics.mean(run['plcc'] for run in runs))}; {rate:.0f} images/s"
        )


def _four(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def main() -> None:
    """Judge every part that has results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    good = True
    for part in TARGETS:
        lines = Book(asked.folder / f"{part}.jsonl").lines()
        if lines:
            good = report(part, lines, rehearsed=asked.rehearse) and good
    if asked.rehearse:
        print("rehearsal on a CPU: the figures above mean nothing")
    raise SystemExit(not good)


if __name__ == "__main__":
    main()
