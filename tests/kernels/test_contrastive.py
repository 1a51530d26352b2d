"""The public loss against its definition in float64: value and every gradient, every option."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

import kernels

SHAPES = {
    "1-image-1-crop": [1],
    "1-image": [5],
    "1-crop-each": [1] * 6,
    "primes-ragged": [3, 7, 1, 2, 13],
    "two-images": [4, 4],
}
OPTIONS = {
    "paper": {},
    "no-intra": {"intra_weight": 0.0},
    "balanced-infonce": {"intra_weight": "balanced", "include_positive": True},
    "overlap": {"intra_weight": 0.5, "overlap": True},
    "teacher": {"keys": True, "overlap": True, "include_positive": True},
}


def make_batch(crops: list[int], *, d: int = 24, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    n, b = sum(crops), len(crops)

    def unit(count: int) -> Tensor:
        values = torch.randn(count, d, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=1)

    ids = torch.randperm(1000, generator=generator)[:b]
    return {
        "rows": unit(n),
        "hubs": unit(b),
        "keys": unit(n),
        "group": torch.repeat_interleave(ids, torch.tensor(crops, dtype=torch.int64)),
        "overlap": torch.rand(n, max(crops), generator=generator, dtype=torch.float64),
    }


def run(
    batch: dict[str, Tensor], options: dict, *, backend: str, temperature: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    rows = batch["rows"].to(dtype).requires_grad_()
    hubs = batch["hubs"].to(dtype).requires_grad_()
    tau = torch.tensor(temperature, dtype=torch.float64, requires_grad=True)
    chosen = dict(options)
    for name in ("keys", "overlap"):
        if chosen.get(name):
            chosen[name] = batch[name].to(dtype)
    out = kernels.manifold_contrastive_loss(
        rows, hubs, batch["group"], temperature=tau, backend=backend, validate=False, **chosen
    )
    out.loss.backward()
    figures = {name: value.detach() for name, value in out._asdict().items()}
    return figures | {"d_rows": rows.grad, "d_hubs": hubs.grad, "d_temperature": tau.grad}


@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("crops", SHAPES.values(), ids=SHAPES.keys())
def test_chunked_is_the_definition_in_float64(crops, options, temperature) -> None:
    batch = make_batch(crops)
    truth, got = (
        run(batch, options, backend=backend, temperature=temperature, dtype=torch.float64)
        for backend in ("dense", "chunked")
    )
    for name, value in truth.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_one_image_with_one_crop_has_the_loss_of_its_positive_alone() -> None:
    batch = make_batch([1])
    got = run(batch, {}, backend="chunked", temperature=0.1, dtype=torch.float32)
    torch.testing.assert_close(got["loss"], -got["positive_similarity"] / 0.1)
    assert got["intra_share"] == 0


def test_a_batch_without_rows_has_loss_zero() -> None:
    batch = make_batch([1])
    rows, hubs = batch["rows"][:0].requires_grad_(), batch["hubs"][:0]
    out = kernels.manifold_contrastive_loss(rows, hubs, batch["group"][:0], temperature=0.1)
    out.loss.backward()
    assert out.loss == 0
    assert rows.grad.shape == rows.shape
