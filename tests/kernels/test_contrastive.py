"""The public loss against its definition in float64: value and every gradient, every option."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    "normalize": {"normalize": True},
}


@pytest.mark.parametrize("temperature", [0.001, 0.01, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("crops", SHAPES.values(), ids=SHAPES.keys())
def test_chunked_is_the_definition_in_float64(crops, options, temperature, make_batch, run) -> None:
    batch = make_batch(crops)
    truth, got = (
        run(batch, options, backend=backend, temperature=temperature, dtype=torch.float64)
        for backend in ("dense", "chunked")
    )
    for name, value in truth.items():
        assert value.isfinite().all(), name
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11, msg=name)


def test_rows_larger_than_a_tile_agree_with_the_definition(make_batch, run, monkeypatch) -> None:
    monkeypatch.setattr("kernels.chunked.TILE", 16)
    batch = make_batch([7, 19, 3, 11, 16, 2, 40])
    for options in OPTIONS.values():
        for temperature in (0.001, 0.2):
            truth, got = (
                run(batch, options, backend=backend, temperature=temperature, dtype=torch.float64)
                for backend in ("dense", "chunked")
            )
            for name, value in truth.items():
                torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_gradients_agree_with_finite_differences_of_the_value(backend, make_batch) -> None:
    batch = make_batch([3, 1, 4], d=16)
    dtype = torch.float32 if backend == "triton" else torch.float64
    step, tolerance = (1e-2, 2e-2) if backend == "triton" else (1e-5, 1e-8)
    rows = batch["rows"].to(dtype, copy=True).requires_grad_()
    hubs = batch["hubs"].to(dtype)

    def loss(values):
        return kernels.manifold_contrastive_loss(
            values, hubs, batch["group"], temperature=0.5, backend=backend, validate=False
        ).loss

    loss(rows).backward()
    direction = torch.randn(rows.shape, dtype=dtype, generator=torch.Generator().manual_seed(1))
    direction /= direction.norm()
    with torch.no_grad():
        slope = (loss(rows + step * direction) - loss(rows - step * direction)) / (2 * step)
    assert abs(float((rows.grad * direction).sum() - slope)) < tolerance


@given(seed=st.integers(0, 10_000), crops=st.lists(st.integers(1, 6), min_size=1, max_size=6))
@settings(max_examples=15, deadline=None)
def test_the_order_of_the_images_does_not_matter(make_batch, run, seed, crops) -> None:
    batch = make_batch(crops, seed=seed)
    order = torch.randperm(len(crops), generator=torch.Generator().manual_seed(seed))
    pieces = batch["rows"].split(crops)
    groups = batch["group"].split(crops)
    shuffled = batch | {
        "rows": torch.cat([pieces[i] for i in order]),
        "group": torch.cat([groups[i] for i in order]),
        "hubs": batch["hubs"][order],
    }
    one, other = (
        run(each, {}, backend="chunked", temperature=0.1, dtype=torch.float64)
        for each in (batch, shuffled)
    )
    torch.testing.assert_close(one["loss"], other["loss"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one["d_hubs"][order], other["d_hubs"], rtol=1e-10, atol=1e-12)


def test_a_crop_that_shares_all_pixels_is_not_a_negative(make_batch, run) -> None:
    batch = make_batch([3, 3])
    excluded = batch | {"overlap": torch.ones_like(batch["overlap"])}
    one = run(excluded, {"overlap": True}, backend="chunked", temperature=0.1, dtype=torch.float64)
    other = run(batch, {"intra_weight": 0.0}, backend="chunked", temperature=0.1,
                dtype=torch.float64)  # fmt: skip
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=name)


def test_balanced_keeps_the_papers_weight_at_sixteen_images(make_batch, run) -> None:
    batch = make_batch([10] * 16, d=16)
    weight = 0.06 * 15 * 10 / 9
    one, other = (
        run(batch, {"intra_weight": w}, backend="chunked", temperature=0.1, dtype=torch.float64)
        for w in ("balanced", weight)
    )
    torch.testing.assert_close(one["loss"], other["loss"])
    assert abs(weight - 1) < 0.01


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_one_image_with_one_crop_has_the_loss_of_its_positive_alone(
    backend, make_batch, run
) -> None:
    got = run(make_batch([1]), {}, backend=backend, temperature=0.1, dtype=torch.float32)
    torch.testing.assert_close(got["loss"], -got["positive_similarity"] / 0.1)
    assert got["intra_share"] == 0
    assert got["intra_similarity"] == 0


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_a_batch_without_rows_has_loss_zero(backend, make_batch) -> None:
    batch = make_batch([1])
    rows, hubs = batch["rows"][:0].float().requires_grad_(), batch["hubs"][:0].float()
    out = kernels.manifold_contrastive_loss(
        rows, hubs, batch["group"][:0], temperature=0.1, backend=backend
    )
    out.loss.backward()
    assert out.loss == 0
    assert rows.grad.shape == rows.shape


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_keys_get_no_gradient_and_figures_are_detached(backend, make_batch) -> None:
    batch = {name: value.float() for name, value in make_batch([3, 2]).items()}
    rows, keys = batch["rows"].requires_grad_(), batch["keys"].requires_grad_()
    out = kernels.manifold_contrastive_loss(
        rows, batch["hubs"], batch["group"].long(), temperature=0.1, keys=keys, backend=backend
    )
    out.loss.backward()
    assert keys.grad is None
    assert [value.requires_grad for value in out[:4]] == [True, False, False, False]


@pytest.mark.parametrize("backend", ["dense", "chunked", "triton"])
def test_a_nan_row_makes_the_loss_nan(backend, make_batch) -> None:
    batch = make_batch([3, 2, 4])
    rows = batch["rows"].float()
    rows[4, 3] = torch.nan
    out = kernels.manifold_contrastive_loss(
        rows, batch["hubs"].float(), batch["group"], temperature=0.1, backend=backend
    )
    assert out.loss.isnan()
