"""The emulation behind the price of a precision is the kernels' own arithmetic."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from kernels import manifold_contrastive_loss, triton_launch
from lmcl.bench import contrastive_precision as price
from lmcl.cli.bench import loss_precision as command

MOST = 0.02
"""Of a gradient's norm: beyond it another precision would be the default (decision 0105)."""


def interpreted(
    rows: torch.Tensor, hubs: torch.Tensor, temperature: float, precision: str
) -> price.Gradients:
    rows, hubs = (table.float().requires_grad_() for table in (rows, hubs))
    tau = torch.tensor(temperature, requires_grad=True)
    out = manifold_contrastive_loss(
        rows, hubs, torch.arange(len(hubs)).repeat_interleave(len(rows) // len(hubs)),
        temperature=tau, backend="triton", precision=precision,
    )  # fmt: skip
    out.loss.backward()
    return price.Gradients(
        loss=float(out.loss.detach()), d_rows=rows.grad.double(), d_hubs=hubs.grad.double(),
        d_temperature=float(tau.grad),
    )  # fmt: skip


@pytest.mark.skipif(not triton_launch.is_interpreted(), reason="the kernels are compiled here")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_emulation_errs_as_the_kernels_do(precision: str) -> None:
    rows, hubs = price.make_tables(66, 48, 11, spread=1.0)
    given = {"precision": precision, "sample": 66}
    truth = price.gradients(rows, hubs, 11, 0.1, precision="fp64", sample=66)
    emulated = price.gradients(rows, hubs, 11, 0.1, **given)
    settings = {
        "rows": 66, "width": 48, "temperature": 0.1, "precision": precision, "spread": 1.0,
    }  # fmt: skip
    ours = price.compare(truth, interpreted(rows, hubs, 0.1, precision), **settings)
    theirs = price.compare(truth, emulated, **settings)
    # The interpreter cuts bfloat16 weights of pairs off where a GPU rounds them to the nearest.
    most = {"fp16": 1.001, "bf16": 2.0}[precision]
    for name in ("d_rows", "d_hubs"):
        assert getattr(theirs, name) / 1.001 <= getattr(ours, name), name
        assert getattr(ours, name) <= most * getattr(theirs, name), name


def test_float64_is_the_gradient_of_autograd() -> None:
    rows, hubs = price.make_tables(55, 16, 11, spread=0.5)
    found = price.gradients(rows, hubs, 11, 0.2, precision="fp64", sample=55)
    rows, hubs = rows.requires_grad_(), hubs.requires_grad_()
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    group = torch.arange(5).repeat_interleave(11)
    out = manifold_contrastive_loss(rows, hubs, group, temperature=tau, backend="dense")
    out.loss.backward()
    torch.testing.assert_close(found.d_rows, rows.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.d_hubs, hubs.grad, rtol=1e-10, atol=1e-12)
    assert found.loss == pytest.approx(float(out.loss.detach()), rel=1e-12)
    assert found.d_temperature == pytest.approx(float(tau.grad), rel=1e-9)


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("temperature", [0.03, 0.1, 1.0])
def test_the_default_costs_less_than_two_percent_of_a_gradient(
    temperature: float, spread: float
) -> None:
    (found,) = price.measure(
        176, 384, 11, temperature, precisions=("bf16",), spread=spread, sample=176
    )
    assert max(found.d_rows, found.d_hubs) < MOST


def test_the_command_writes_a_line_a_case(tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    done = CliRunner().invoke(
        command,
        ["--rows", "44", "--width", "16", "--temperature", "0.1", "--precision", "bf16",
         "--precision", "tf32", "--spread", "0", "--output", str(lines)],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    found = [price.Errors(**json.loads(line)) for line in lines.read_text().splitlines()]
    assert [line.precision for line in found] == ["bf16", "tf32"]
    assert all(value == value for line in found for value in dataclasses.astuple(line)[5:])
