"""Compile the loss's device code without a GPU and print what the cubins say, one JSON line each.

Needs Triton and nothing else, so that scripts/check_triton36.sh can run it under an unpacked wheel
of another version. TRITON_INTERPRET must not be set.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "log_sums": ("log_sums", {"FIXED": True}),
    "log_sums-online": ("log_sums", {"FIXED": False, "LEARNED": True}),
    "symmetric_sums": ("symmetric_sums", {}),
    "mean_columns": ("mean_columns", {"FIXED": True}),
    "mean_columns-online": ("mean_columns", {"FIXED": False, "LEARNED": True}),
    "pair_gradient": ("pair_gradient", {"FIXED": True}),
    "pair_gradient-online": ("pair_gradient", {"FIXED": False, "LEARNED": True}),
    "finish_rows": ("finish_rows", {"FIXED": False, "INCLUDE_POSITIVE": True}),
    "finish_gradient": ("finish_gradient", {"STUDENT": True, "NORMALIZE": True}),
    "finish_gradient-teacher": ("finish_gradient", {"STUDENT": False, "NORMALIZE": True}),
    "hub_gradient": ("hub_gradient", {"NORMALIZE": True}),
    "normalize_rows": ("normalize_rows", {}),
    "find_images": ("find_images", {}),
    "sum_figures": ("sum_figures", {}),
    "finish_grouped_rows": ("finish_grouped_rows", {"FIXED": False}),
    "finish_grouped_gradient": ("finish_grouped_gradient", {}),
    "finish_gradient-half": ("finish_gradient", {"STUDENT": True, "NORMALIZE": True}),
    "normalize_rows-half": ("normalize_rows", {}),
}
"""A caller's tables and gradients are float32, as in a run; in `-half` they are half precision."""

SPILL = r"\b(?:STL|LDL)\b"
DEFAULTS = {
    "LEARNED": False, "WIDEN": False, "PRECISION": "tf32", "HAS_OVERLAP": True,
    "INCLUDE_POSITIVE": False, "BALANCED": True, "NORMALIZE": True, "HAS_TABLE": True,
    "FIXED": False, "HAS_SELF": True, "AS_ROW": True, "AS_COLUMN": True, "WHOLE": True,
    "BLOCK": 1024,
}  # fmt: skip
HALF_POINTERS = ("p_rows", "p_columns", "p_hubs", "p_out")
CALLER_POINTERS = ("p_d_rows", "p_d_hubs", "p_in")
INT_POINTERS = ("p_first", "p_end", "p_image", "p_starts", "p_itself", "p_place")


def load(name: str) -> ModuleType:
    """A module of `kernels` without the package's own import, which would want torch."""
    package = sys.modules.setdefault("kernels", ModuleType("kernels"))
    package.__path__ = [str(ROOT / "kernels")]
    return importlib.import_module(f"kernels.{name}")


def launches_of(variant: str, plan: Any) -> list[tuple[str, dict[str, Any], int, int]]:
    """Kernel, compile-time arguments, warps and stages, as kernels/triton_launch.py passes them."""
    name = VARIANTS[variant][0]
    if name in ("find_images", "sum_figures"):
        return [(name, {"BLOCK_N": DEFAULTS["BLOCK"]}, 8, 3)]
    if name in ("hub_gradient", "normalize_rows"):
        wide = triton.next_power_of_2(plan.width)
        rows = 16 if name == "hub_gradient" else max(1, 4096 // wide)
        sizes = {"D": plan.width, "D_OUT": plan.width, "BLOCK_D": wide, "BLOCK_N": rows}
        return [(name, sizes, 4, 3)]
    tiles = {
        "log_sums": plan.sums,
        "log_sums-online": plan.sums,
        "symmetric_sums": plan.sums,
        "mean_columns": plan.means,
        "mean_columns-online": plan.means,
        "pair_gradient": plan.pairs,
        "pair_gradient-online": plan.online_pairs,
    }
    tile = tiles.get(variant, plan.finish)
    widths = {"D0": plan.widths[0], "D1": plan.widths[1]}
    launches = plan.launches(tile) if name in ("mean_columns", "pair_gradient") else [(0, tile)]
    return [
        (
            name,
            widths | {"PART": part, "STAGES": tile.stages}
            | {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns},
            tile.warps,
            3,
        )
        for part, tile in launches
    ]  # fmt: skip


def compile_one(
    device: ModuleType,
    variant: str,
    plan: Any,
    dtype: str,
    capability: int,
    launch: tuple[str, dict[str, Any], int, int],
) -> dict[str, Any]:
    """Compile one launch and read registers, spills, shared memory and instructions back."""
    name, sizes, warps, stages = launch
    kernel = getattr(load("_grouped_triton") if "grouped" in name else device, name)
    constants = DEFAULTS | sizes | VARIANTS[variant][1]
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    caller = dtype if variant.endswith("-half") else "fp32"
    signature = {key: _type_of(key, dtype, caller, constants) for key in kernel.arg_names}
    places = {key: index for index, key in enumerate(kernel.arg_names)}
    aligned = {
        (places[key],): [["tt.divisibility", 16]]
        for key, kind in signature.items()
        if kind.startswith("*")
    }
    source = ASTSource(
        kernel,
        signature=signature,
        constexprs={(places[key],): value for key, value in constants.items()},
        attrs=aligned,
    )
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    sass, usage = _disassemble(compiled.asm["cubin"])
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0]
    return {
        "variant": variant,
        "capability": capability,
        "dtype": dtype,
        "width": plan.width,
        "part": sizes.get("PART", 0),
        "tile": [sizes["BLOCK_N"], sizes.get("BLOCK_M", 0), warps],
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": len(re.findall(SPILL, sass)),
        "loop_spills": loop_spills(sass),
        "waits": len(re.findall(r"\bWARPGROUP\.DEPBAR\b", sass)),
        "warp_rows": warp_rows(compiled.asm["ttgir"]),
        "shared_bytes": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", 0),
        "wgmma": len(re.findall(r"\bHGMMA\b", sass)),
        "mma": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA|UTCMMA)\b", sass)),
        "async_copies": len(re.findall(r"\bLDGSTS\b", sass)),
        "transposed_dot_results": transposed_dot_results(compiled.asm["ttgir"]),
        "triton": triton.__version__,
    }


def loop_spills(sass: str) -> int:
    """Spill instructions inside loops that multiply: those that are paid again for every tile."""
    lines = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+([^;]*);", sass)
    ]
    worst = 0
    for address, text in lines:
        target = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text)
        if target is None or int(target[1], 16) >= address:
            continue
        body = [line for at, line in lines if int(target[1], 16) <= at <= address]
        if any(re.search(r"\b(?:H|HG|UTCH)MMA\b", line) for line in body):
            worst = max(worst, sum(bool(re.search(SPILL, line)) for line in body))
    return worst


def warp_rows(ir: str) -> int:
    """Most rows that the warps of a Hopper product are laid out over; 0 without such a product.

    More than the tile has means that warps compute the same numbers twice.
    """
    layouts = re.findall(r"nvidia_mma<\{versionMajor = 3.*?warpsPerCTA = \[(\d+), \d+\]", ir)
    return max((16 * int(warps) for warps in layouts), default=0)


def transposed_dot_results(ir: str) -> int:
    """Dot results that reach another dot transposed: the pattern Triton 3.4-3.7.0 miscompiles.

    It shows as shared memory allocated from a value in a `#linear` layout (the transpose of an
    accumulator's layout).
    """
    return len(re.findall(r"local_alloc %\S+ : \(tensor<[^>]*#linear", ir))


def _type_of(name: str, dtype: str, caller: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in CALLER_POINTERS:
        return f"*{caller}"
    if name in HALF_POINTERS:
        return f"*{dtype}"
    if name in INT_POINTERS:
        return "*i32"
    if name == "p_group":
        return "*i64"
    if name.startswith("p_"):
        return "*fp32"
    return "i32" if name.isupper() else "fp32"


def _disassemble(cubin: bytes) -> tuple[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def tool(flag: str) -> str:
            run = subprocess.run(
                [str(TOOL), flag, str(path)], capture_output=True, text=True, check=True
            )
            return run.stdout

        return tool("-sass"), tool("-res-usage")


def main() -> None:
    """Compile the asked-for product of variants, widths, element types and chips."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--dtype", nargs="+", default=["bf16"])
    parser.add_argument("--width", type=int, nargs="+", default=[128, 256, 384])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS))
    asked = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set, so there is no compiler to run; unset it")
    device, tuning = load("_contrastive_triton"), load("tuning")
    for capability in asked.capability:
        for dtype in asked.dtype:
            for width in asked.width:
                plan = tuning.make_plan(width, dtype, capability)
                for variant in asked.variant:
                    for launch in launches_of(variant, plan):
                        facts = compile_one(device, variant, plan, dtype, capability, launch)
                        print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
