"""`lmcl bench loss-precision`: how far bfloat16 and others take the loss from float64.

The kernels' arithmetic is emulated with torch on a CPU: tables rounded once to the type, products
of rounded numbers accumulated in float32, weights of pairs rounded to the type before the second
product, partial results and gradients kept in float32. Checked against the interpreted kernels in
tests/lmcl/bench/test_contrastive_precision.py.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import click
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Kind = Literal["bf16", "fp16", "tf32", "fp32"]
TILE = 1024
BOOST = {"fp16": 4096.0}
"""As kernels/triton_launch.py has it: float16 weights of pairs would underflow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradients:
    """Loss and every gradient of one batch, float64."""

    loss: float
    d_rows: Tensor
    d_hubs: Tensor
    d_temperature: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of one case: of a scalar to its value, of a gradient by its norm."""

    rows: int
    width: int
    temperature: float
    precision: str
    spread: float
    """Weight of an image's common direction in its rows: 0 = random, large = collapsed."""
    loss: float
    d_rows: float
    d_hubs: float
    d_temperature: float


def make_tables(
    m: int, width: int, crops: int, *, spread: float, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit rows and hubs of `m // crops` images, float64; crops of an image lie near its hub."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int) -> Tensor:
        values = torch.randn(count, width, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=1)

    images = m // crops
    centre = draw(images)
    rows = draw(images * crops) + spread * centre.repeat_interleave(crops, 0)
    return F.normalize(rows, dim=1), F.normalize(draw(images) + spread * centre, dim=1)


def round_to(values: Tensor, precision: str) -> Tensor:
    """Values rounded to the nearest that a type of the tensor cores holds; float32."""
    values = values.float()
    if precision == "tf32":
        # 10 bits of fraction are kept of 23; adding half of the last one rounds.
        bits = values.contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return values.to(kinds[precision]).float() if precision in kinds else values


def gradients(
    rows: Tensor, hubs: Tensor, crops: int, temperature: float, *, precision: str, sample: int
) -> Gradients:
    """The paper's loss, tile by tile: float64 for "fp64", else as the kernels compute it.

    The gradients by rows and temperature are those of the first `sample` rows.
    """
    exact = precision == "fp64"
    table, hub_table = (x if exact else round_to(x, precision) for x in (rows, hubs))
    hub_rows, n = hub_table.repeat_interleave(crops, 0), rows.shape[0]
    positive = (table * hub_rows).sum(1)
    log_sum = torch.cat([_logits(table, part, temperature).logsumexp(1) for part in _tiles(n)])
    some, boost = slice(0, min(sample, n)), BOOST.get(precision, 1.0)
    d_rows = torch.zeros_like(table[some])
    for part in _tiles(len(d_rows)):
        logits = _logits(table, part, temperature)
        pair = (logits - log_sum[part, None]).exp() + (logits - log_sum).exp()
        weight = pair if exact else round_to(pair * boost, precision)
        d_rows[part] = (weight @ table) / (boost * temperature * n)
    d_beta = (table[some] * d_rows).sum(dtype=torch.float64) * temperature / 2
    d_beta -= positive[some].sum(dtype=torch.float64) / n
    d_hubs = -table.view(-1, crops, table.shape[1]).sum(1) / (temperature * n)
    return Gradients(
        loss=float((log_sum - positive / temperature).double().mean()),
        d_rows=(d_rows - hub_rows[some] / (temperature * n)).double(),
        d_hubs=d_hubs.double(),
        d_temperature=float(-d_beta / temperature**2),
    )


def measure(
    m: int,
    width: int,
    crops: int,
    temperature: float,
    *,
    precisions: tuple[str, ...],
    spread: float,
    sample: int,
) -> Iterator[Errors]:
    """Errors of one case in each precision, against float64 on the unrounded tables."""
    rows, hubs = make_tables(m, width, crops, spread=spread)
    given = (rows, hubs, crops, temperature)
    truth = gradients(*given, precision="fp64", sample=sample)
    for precision in precisions:
        found = gradients(*given, precision=precision, sample=sample)
        yield compare(
            truth, found, rows=rows.shape[0], width=width, temperature=temperature,
            precision=precision, spread=spread,
        )  # fmt: skip


def compare(
    truth: Gradients, found: Gradients, *, rows: int, width: int, temperature: float,
    precision: str, spread: float,
) -> Errors:  # fmt: skip
    """Relative distances; a gradient's is the norm of the difference by the norm of the truth."""
    far = {
        name: float((getattr(found, name) - getattr(truth, name)).norm())
        / float(getattr(truth, name).norm())
        for name in ("d_rows", "d_hubs")
    }
    scalars = {
        name: abs(getattr(found, name) - getattr(truth, name)) / abs(getattr(truth, name))
        for name in ("loss", "d_temperature")
    }
    return Errors(
        rows=rows, width=width, temperature=temperature, precision=precision, spread=spread,
        **far, **scalars,
    )  # fmt: skip


def _tiles(n: int) -> Iterator[slice]:
    return (slice(start, min(start + TILE, n)) for start in range(0, n, TILE))


def _logits(table: Tensor, part: slice, temperature: float) -> Tensor:
    logits = (table[part] @ table.T) / temperature
    place = torch.arange(part.start, part.stop)
    logits[place - part.start, place] = -math.inf
    return logits


def run(
    *,
    m: tuple[int, ...],
    width: int,
    crops: int,
    temperatures: tuple[float, ...],
    precisions: tuple[str, ...],
    spreads: tuple[float, ...],
    sample: int,
    output: Path | None,
) -> None:
    r"""Relative error of loss and gradients against float64, emulated on the CPU.

    \b
    Example:
      lmcl bench loss-precision --rows 176 --temperature 0.1 --precision bf16 --precision fp16
    """
    cases = itertools.product(
        m or (176, 1280, 5120), temperatures or (0.03, 0.1, 0.3, 1.0), spreads
    )
    for rows, temperature, spread in cases:
        for found in measure(
            rows, width, crops, temperature, precisions=precisions, spread=spread, sample=sample
        ):
            click.echo(_text(found))
            if output is not None:
                with output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(dataclasses.asdict(found)) + "\n")


def _text(found: Errors) -> str:
    return (
        f"{found.precision} {found.rows:6} x {found.width} t {found.temperature:<5} spread "
        f"{found.spread:<4} loss {found.loss:.1e} d_rows {found.d_rows:.1e} "
        f"d_hubs {found.d_hubs:.1e} d_temperature {found.d_temperature:.1e}"
    )
