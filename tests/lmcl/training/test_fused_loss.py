"""A run whose loss is computed by the Triton kernels, interpreted: beside the chunked one.

What a GPU will do is done here step by step on a CPU: the same run twice, from its configuration to
its report, once with `objective.backend = "triton"`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kernels import triton_launch
from lmcl.training.setup import fit

REPO = Path(__file__).resolve().parents[3]
FUSED = "objective.backend='triton'"
CHUNKED = "objective.backend='chunked'"
BF16 = "objective.precision='bf16'"
TOLERANCES = {"fp32": 2e-5, "bf16": 2e-2}
"""Relative, of a step's loss and gradient norm. bfloat16 has 8 bits (a rounding is up to 4e-3 of a
cosine), float32 24, and the optimiser carries the differences of earlier steps along."""

if not triton_launch.is_interpreted():
    pytest.skip("the kernels are compiled here: tests/kernels/test_gpu.py", allow_module_level=True)


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = (run / "log.jsonl").read_text().splitlines()
    return [entry for line in lines if "grad_norm" in (entry := json.loads(line))]


def assert_same_steps(fused: Path, chunked: Path, *, precision: str) -> None:
    ours, theirs = steps_of(fused), steps_of(chunked)
    assert len(ours) == len(theirs) > 1
    for one, other in zip(ours, theirs, strict=True):
        for figure in ("loss", "contrastive", "grad_norm"):
            assert one[figure] == pytest.approx(other[figure], rel=TOLERANCES[precision]), (
                figure, one["epoch"], one["step"],
            )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "precision"), [([], "fp32"), ([BF16], "bf16")], ids=["auto", "bf16"]
)
def test_a_run_through_the_kernels_is_the_run_through_the_chunks(
    changes: list[str], precision: str, tiny, tmp_path: Path
) -> None:
    fused, chunked = tmp_path / "fused", tmp_path / "chunked"
    fit(tiny(FUSED, *changes), fused, progress=False)
    fit(tiny(CHUNKED), chunked, progress=False)
    assert_same_steps(fused, chunked, precision=precision)
    assert "<svg" in (fused / "report.html").read_text()
