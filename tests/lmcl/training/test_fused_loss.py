"""A run whose loss is computed by the Triton kernels, interpreted: beside the chunked one.

What a GPU will do is done here step by step on a CPU: the same run twice, from its configuration to
its report, once with `objective.backend = "triton"`.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kernels import triton_launch
from lmcl.training.setup import fit
from lmcl.training.signals import InterruptedRunError
from lmcl.training.trainer import Trainer
from tests import warm

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
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        # Weights drift apart by the roundings of all steps before: with bf16 gradients are
        # comparable in the first step alone.
        norms = ("grad_norm",) if precision == "fp32" or number == 0 else ()
        for figure in ("loss", "contrastive", *norms):
            assert one[figure] == pytest.approx(other[figure], rel=TOLERANCES[precision]), (
                figure, one["epoch"], one["step"],
            )  # fmt: skip


def train(world: int, shards: Path, run: Path, *changes: str) -> None:
    """`lmcl train --config configs/smoke.toml` on `world` gloo ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lmcl", "train", "--config", "configs/smoke.toml"]
    command += ["--output", str(run), "--no-progress", "--set", f"data.root='{shards}'"]
    command += [word for change in changes for word in ("--set", change)]
    ranks = []
    for rank in range(world):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        names = place | address if world > 1 else {}
        environment = {name: str(value) for name, value in names.items()}
        ranks.append(
            warm.start(command, cwd=REPO, env=os.environ | environment, stderr=subprocess.PIPE)
        )
    errors = [process.communicate()[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0] * world, "\n".join(errors)[-3000:]
    assert sum("loss triton" in error for error in errors) == (FUSED in changes)


def test_a_run_through_the_kernels_stops_and_goes_on_as_the_run_through_the_chunks(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, chunked = tmp_path / "fused", tmp_path / "chunked"
    fit(tiny(CHUNKED), chunked, progress=False)
    taken, step = [], Trainer.step

    def stop_after_three(trainer: Trainer, batch: object) -> object:
        taken.append(batch)
        trainer.stop.requested = len(taken) == 3
        return step(trainer, batch)

    monkeypatch.setattr(Trainer, "step", stop_after_three)
    with pytest.raises(InterruptedRunError):
        fit(tiny(FUSED), fused, progress=False)
    fit(tiny(FUSED), fused, resume="auto", progress=False)
    assert_same_steps(fused, chunked, precision="fp32")
    assert "<svg" in (fused / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("world", [1, 2], ids=["one-rank", "two-ranks"])
def test_the_smoke_run_by_its_command(
    world: int, precision: str, demo_set: Path, tmp_path: Path
) -> None:
    changes = [FUSED, BF16] if precision == "bf16" else [FUSED]
    fused, chunked = tmp_path / "fused", tmp_path / "chunked"
    train(world, demo_set, fused, *changes)
    # On as many ranks: the batch norms of the small stem are of a rank's own images.
    train(world, demo_set, chunked, CHUNKED)
    assert_same_steps(fused, chunked, precision=precision)
    assert "<svg" in (fused / "report.html").read_text()
