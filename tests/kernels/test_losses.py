"""The losses of others against their usual dense code in float64, and their laws."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import kernels
from lmcl.bench.contrastive_cases import dense_clip, dense_info_nce, dense_supcon

N, D = 23, 12
LABELS = torch.arange(N) * 7 % 5
LABELS[3] = 99
"""Scattered; row 3 has no positive."""
CASES = {
    "supcon": (
        lambda a, b, tau: kernels.supcon_loss(a, LABELS, temperature=tau),
        lambda a, b, tau: dense_supcon(a, LABELS, tau),
    ),
    "info-nce": (
        lambda a, b, tau: kernels.info_nce_loss(a, b, temperature=tau),
        dense_info_nce,
    ),
    "clip": (
        lambda a, b, tau: kernels.clip_loss(a, b, temperature=tau),
        dense_clip,
    ),
    "clip-queue": (
        lambda a, b, tau: kernels.clip_loss(a, b, temperature=tau, queue=QUEUE),
        lambda a, b, tau: dense_clip(a, b, tau, queue=QUEUE),
    ),
}


def tables(seed: int = 0, count: int = N) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(count, D, generator=make, dtype=torch.float64) for _ in range(2))


QUEUE = (tables(1)[0], tables(2, 9)[0])


def results(function, tau: float, **kind: torch.dtype) -> list[Tensor]:
    leaves = [*tables(), torch.tensor(tau, dtype=torch.float64)]
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = function(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves, materialize_grads=True)]


@pytest.mark.parametrize("tau", [0.01, 0.5])
@pytest.mark.parametrize(("ours", "dense"), CASES.values(), ids=CASES.keys())
def test_each_is_its_dense_code_in_float64(ours, dense, tau, monkeypatch) -> None:
    monkeypatch.setattr("kernels.chunked.TILE", 8)
    torch.testing.assert_close(results(ours, tau), results(dense, tau), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tau", [0.01, 0.5])
def test_without_its_positive_the_denominator_holds_negatives_only(tau) -> None:
    one, two = (F.normalize(table, dim=1) for table in tables())
    rows = torch.cat([one, two])
    logits = rows @ rows.T / tau
    place = torch.arange(2 * N) % N
    logits = logits.masked_fill(place[:, None] == place, -torch.inf)
    want = torch.logsumexp(logits, 1) - ((one * two).sum(1) / tau).repeat(2)
    got = kernels.info_nce_loss(one, two, temperature=tau, include_positive=False, reduction="none")
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-11)


def test_a_row_without_a_positive_has_loss_zero_and_does_not_count() -> None:
    rows, _ = tables()
    each = kernels.supcon_loss(rows, LABELS, reduction="none")
    assert each[3] == 0
    mean = kernels.supcon_loss(rows, LABELS)
    torch.testing.assert_close(mean, each.sum() / (N - 1))
    alone = kernels.supcon_loss(rows[:1].requires_grad_(), LABELS[:1])
    alone.backward()
    assert alone == 0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_the_order_of_rows_and_the_names_of_labels_do_not_matter(seed) -> None:
    rows, other = tables(seed)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    close = {"rtol": 1e-10, "atol": 1e-12}
    one = kernels.supcon_loss(rows, LABELS)
    torch.testing.assert_close(kernels.supcon_loss(rows[order], 3 - LABELS[order]), one, **close)
    for loss in (kernels.info_nce_loss, kernels.clip_loss):
        value = loss(rows, other)
        torch.testing.assert_close(loss(rows[order], other[order]), value, **close)
        torch.testing.assert_close(loss(other, rows), value, **close)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 10))
@settings(max_examples=10, deadline=None)
def test_lengths_do_not_matter_and_two_labels_of_two_views_are_info_nce(seed, scale) -> None:
    one, two = tables(seed)
    want = kernels.info_nce_loss(one, two)
    torch.testing.assert_close(kernels.info_nce_loss(scale * one, two), want)
    labels = torch.arange(N).repeat(2)
    torch.testing.assert_close(kernels.supcon_loss(torch.cat([one, two]), labels), want)


@pytest.mark.parametrize("call", [
    lambda a, b, how: kernels.supcon_loss(a, LABELS, **how),
    lambda a, b, how: kernels.info_nce_loss(a, b, **how),
    lambda a, b, how: kernels.clip_loss(a, b, **how),
], ids=["supcon", "info-nce", "clip"])  # fmt: skip
def test_the_kernels_take_half_precision(call) -> None:
    one, two = tables()
    truth = call(one, two, {"backend": "dense"})
    got = call(one.bfloat16(), two.bfloat16(), {"backend": "triton"})
    torch.testing.assert_close(got.double(), truth, rtol=1e-2, atol=1e-2)


def test_wrong_arguments_are_named() -> None:
    one, two = tables()
    with pytest.raises(ValueError, match=r"labels: asked for one whole number per row of rows"):
        kernels.supcon_loss(one, LABELS[:-1])
    with pytest.raises(ValueError, match=r"two: asked for the shape of one"):
        kernels.info_nce_loss(one, two[:-1])
    with pytest.raises(ValueError, match=r"text: asked for the shape of image"):
        kernels.clip_loss(one, two[:-1])
