"""Batches for the loss's tests, and the two ways they are compared."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kernels

Batch = dict[str, Tensor]
Result = dict[str, Tensor]


def _make_batch(
    crops: list[int], *, d: int = 24, seed: int = 0, equal: bool = False, twice: bool = False
) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n, b = sum(crops), len(crops)

    def unit(count: int) -> Tensor:
        values = torch.randn(count, d, generator=generator, dtype=torch.float64)
        values = values[:1].expand_as(values) if equal else values
        if twice:
            # Each row stands in the batch again, in its own image or in another.
            values = values[torch.arange(count) % ((count + 1) // 2)]
        # What half precision holds, so that every dtype sees the same numbers.
        return F.normalize(values, dim=1).bfloat16().double()

    ids = torch.randperm(1000, generator=generator)[:b]
    return {
        "rows": unit(n),
        "hubs": unit(b),
        "keys": unit(n),
        "group": torch.repeat_interleave(ids, torch.tensor(crops, dtype=torch.int64)),
        "overlap": torch.randint(
            0, 5, (n, max(crops)), generator=generator, dtype=torch.int64
        ).double()
        / 4,
    }


def _run(
    batch: Batch,
    options: dict[str, object],
    *,
    backend: str,
    temperature: float,
    dtype: torch.dtype,
    learned: bool = True,
) -> Result:
    rows = batch["rows"].to(dtype, copy=True).requires_grad_()
    hubs = batch["hubs"].to(dtype, copy=True).requires_grad_()
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    tau = torch.tensor(temperature, dtype=precise, device=rows.device, requires_grad=True)
    chosen = dict(options)
    for name in ("keys", "overlap"):
        if chosen.get(name):
            chosen[name] = batch[name].to(dtype)
    out = kernels.manifold_contrastive_loss(
        rows,
        hubs,
        batch["group"],
        temperature=tau if learned else temperature,
        backend=backend,
        **chosen,
    )
    out.loss.backward()
    figures = {name: v for name, v in out._asdict().items() if isinstance(v, Tensor)}
    result = {name: value.detach() for name, value in figures.items()}
    result |= {"d_rows": rows.grad, "d_hubs": hubs.grad}
    return result | ({"d_temperature": tau.grad} if learned else {})


def _assert_no_worse(
    fused: Result, plain: Result, truth: Result, *, dtype: torch.dtype, temperature: float
) -> None:
    # The terms that are added up have these sizes, however small their sum comes out.
    rows = max(fused["d_rows"].shape[0], 1)
    terms = {
        "loss": 1 / temperature,
        "d_rows": 1 / (temperature * rows),
        "d_hubs": 1 / (temperature * rows),
        "d_temperature": 1 / temperature**2,
    }
    # A logit of size 1 / temperature is rounded to eps / temperature, whoever computes it.
    tolerance = 8 * torch.finfo(dtype).eps * max(1, 0.1 / temperature)
    for name in fused:
        exact = truth[name].double()
        far = float((fused[name].double() - exact).abs().max())
        allowed = float((plain[name].double() - exact).abs().max())
        scale = max(float(exact.abs().max()), terms.get(name, 1.0))
        assert fused[name].isfinite().all(), name
        assert far <= allowed + tolerance * scale, (name, far, allowed, scale)


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Batch]:
    """Factory of batches: crops per image -> unit rows, hubs, keys, group, overlap, in float64."""
    return _make_batch


@pytest.fixture(scope="session")
def run() -> Callable[..., Result]:
    """The public loss with its value, figures and every gradient."""
    return _run


@pytest.fixture(scope="session")
def assert_no_worse() -> Callable[..., None]:
    """|fused - truth| <= |plain in the same precision - truth| + tolerance, for every result."""
    return _assert_no_worse
