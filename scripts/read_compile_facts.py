"""Judge the lines that scripts/compile_kernels.py printed; exit code 1 if a rule is broken."""

import argparse
import json
from pathlib import Path
from typing import Any

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512
"""Columns that sm_100 has. A kernel that needs more compiles to nothing and cannot be launched."""
HEAVY = ("log_sums", "symmetric_sums", "mean_columns", "pair_gradient")
FINISHING = (
    "finish_rows", "finish_gradient", "finish_grouped_rows", "finish_grouped_gradient",
)  # fmt: skip
MOST_LOOP_SPILLS = 10
"""In the loop of a heavy kernel on sm_90: a hundredth of the time its wgmma take, and cheaper than
a tile that spills nothing and serialises its products (docs/kernels.md)."""
MOST_SPILLS = 150
"""Of such a kernel in all; what lies outside the loop is paid once a program."""


def faults(facts: dict[str, Any]) -> list[str]:
    """What is wrong with one compiled kernel, as sentences; empty if nothing is."""
    name = facts["variant"].partition("-")[0]
    found = []
    is_hopper_loop = name in HEAVY and facts["capability"] == 90 and facts["dtype"] != "fp32"
    if facts["loop_spills"] > (MOST_LOOP_SPILLS if is_hopper_loop else 0):
        found.append(f"{facts['loop_spills']} spill instructions in the loop")
    if facts["spills"] > (MOST_SPILLS if is_hopper_loop else 0):
        found.append(f"{facts['spills']} spill instructions, {facts['stack_bytes']} stack bytes")
    if facts["shared_bytes"] > SHARED_LIMIT[facts["capability"]]:
        found.append(f"{facts['shared_bytes']} bytes of shared memory are more than the chip has")
    if facts["tensor_memory"] > TENSOR_MEMORY:
        found.append(
            f"{facts['tensor_memory']} columns of tensor memory are more than the chip has"
        )
    if facts["transposed_dot_results"]:
        found.append("a transposed dot result is fed to a dot (miscompiled by Triton 3.4-3.7.0)")
    if name in (*HEAVY, *FINISHING) and not facts["mma"]:
        found.append("no tensor-core instruction")
    # float32 tiles read their columns through registers, so there is nothing to copy ahead.
    if name in HEAVY and facts["dtype"] != "fp32":
        if not facts["async_copies"]:
            found.append("no asynchronous copy")
        if facts["capability"] == 90:
            found += _hopper_faults(facts)
    return found


def _hopper_faults(facts: dict[str, Any]) -> list[str]:
    """What keeps the tensor cores of sm_90 waiting in a heavy kernel."""
    if not facts["wgmma"]:
        return ["no wgmma"]
    found = []
    if facts["waits"] > facts["wgmma"] / 4:
        found.append(f"{facts['wgmma']} wgmma are waited for {facts['waits']} times: serialised")
    if facts["warp_rows"] > facts["tile"][0]:
        found.append(
            f"warps are laid out over {facts['warp_rows']} rows of a tile of {facts['tile'][0]}: "
            "they compute the same twice"
        )
    return found


def main() -> None:
    """Print one line per broken rule and a summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--triton", help="Version that must have compiled every line.")
    asked = parser.parse_args()
    lines = [json.loads(line) for line in asked.file.read_text().splitlines()]
    broken = 0
    for facts in lines:
        sentences = faults(facts)
        if asked.triton and facts["triton"] != asked.triton:
            sentences.append(f"compiled by Triton {facts['triton']}, not {asked.triton}")
        for sentence in sentences:
            broken += 1
            print(f"{facts['variant']} sm_{facts['capability']} {facts['dtype']} "
                  f"D={facts['width']}: {sentence}")  # fmt: skip
    version = lines[0]["triton"] if lines else "?"
    print(f"Triton {version}: {len(lines)} kernels compiled, {broken} rules broken")
    raise SystemExit(bool(broken or not lines))


if __name__ == "__main__":
    main()
