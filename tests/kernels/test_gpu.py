"""The compiled kernels on a real GPU; nothing here ran on the machine this was written on."""

import pytest
import torch
from torch import Tensor

import kernels
from kernels import triton_launch as launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = {
    "paper": {},
    "all": {
        "intra_weight": "balanced", "include_positive": True, "overlap": True, "normalize": True,
    },
    "teacher": {"keys": True},
}  # fmt: skip


@pytest.fixture
def batch(make_batch) -> dict[str, Tensor]:
    made = make_batch([3, 7, 1, 2, 13, *[10] * 40], d=256)
    return {name: value.cuda() for name, value in made.items()}


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_no_worse_than_plain_torch(
    options, dtype, learned, temperature, batch, run, assert_no_worse, monkeypatch
) -> None:
    def poisoned(*shape: int, **given: object) -> Tensor:
        return torch.full(shape, torch.nan, **given)

    monkeypatch.setattr(launch, "empty", poisoned)
    results = [
        run(batch, options, backend=backend, temperature=temperature, dtype=of, learned=learned)
        for backend, of in (("triton", dtype), ("dense", dtype), ("dense", torch.float64))
    ]
    assert_no_worse(*results, dtype=dtype, temperature=temperature)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_two_runs_give_the_same_bits(options, batch, run) -> None:
    one, other = (
        run(batch, options, backend="triton", temperature=0.1, dtype=torch.bfloat16)
        for _ in range(2)
    )
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_autocast_takes_the_half_precision_kernels_and_gives_float32_gradients(batch) -> None:
    def loss(given: torch.dtype) -> tuple[Tensor, Tensor]:
        rows = batch["rows"].to(given).requires_grad_()
        out = kernels.manifold_contrastive_loss(
            rows, batch["hubs"].to(given), batch["group"], temperature=0.1
        )
        out.loss.backward()
        return out.loss.detach(), rows.grad

    direct = loss(torch.bfloat16)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        inside = loss(torch.float32)
    assert torch.equal(direct[0], inside[0])
    assert inside[1].dtype == torch.float32
    torch.testing.assert_close(direct[1].float(), inside[1])


def test_one_call_waits_for_nothing_when_values_are_not_checked(batch) -> None:
    rows = batch["rows"].bfloat16().requires_grad_()
    hubs = batch["hubs"].bfloat16()

    def step() -> None:
        kernels.manifold_contrastive_loss(
            rows, hubs, batch["group"], temperature=0.1, validate=False
        ).loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
