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


def test_a_pair_alone_has_the_loss_of_its_positive() -> None:
    one, two = (F.normalize(table[:1], dim=1).requires_grad_() for table in tables())
    loss = kernels.info_nce_loss(one, two, include_positive=False, normalize=False, temperature=0.5)
    torch.testing.assert_close(loss, -2 * (one * two).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, one)[0], -2 * two)


SCATTERED = {
    "alternating": torch.arange(N) % 2,
    "nobody-twice": torch.arange(N) * 3 - 20,
    "one-label": torch.zeros(N, dtype=torch.int32),
    "one-pair": torch.arange(N).index_fill(0, torch.tensor([4, 20]), -(10**12)),
}


def each_supcon(rows: Tensor, labels: Tensor, tau: Tensor) -> Tensor:
    """Loss of each row; 0 where nobody shares its label."""
    rows = F.normalize(rows, dim=1)
    itself = torch.eye(len(rows), dtype=torch.bool)
    logits = (rows @ rows.T / tau).masked_fill(itself, -torch.inf)
    positive = (labels[:, None] == labels) & ~itself
    counts = positive.sum(1)
    mean = torch.where(positive, logits, 0.0).sum(1) / counts.clamp(min=1)
    return torch.where(counts > 0, logits.logsumexp(1) - mean, 0.0)


def each_clip(image: Tensor, text: Tensor, tau: Tensor) -> Tensor:
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    own = torch.arange(len(image))
    images, texts = (F.normalize(table, dim=1) for table in QUEUE)
    to_text = image @ torch.cat([text, texts]).T / tau
    to_image = text @ torch.cat([image, images]).T / tau
    both = [F.cross_entropy(logits, own, reduction="none") for logits in (to_text, to_image)]
    return (both[0] + both[1]) / 2


ROW_BY_ROW = {
    f"supcon-{name}": (
        lambda a, b, tau, how, labels=labels: kernels.supcon_loss(
            a, labels, temperature=tau, **how
        ),
        lambda a, b, tau, labels=labels: each_supcon(a, labels, tau),
        max(int((labels[:, None] == labels).sum(1).gt(1).sum()), 1),
    )
    for name, labels in SCATTERED.items()
} | {
    "clip-more-columns": (
        lambda a, b, tau, how: kernels.clip_loss(
            a, b, temperature=tau, queue=tuple(t.to(a.dtype) for t in QUEUE), **how
        ),
        each_clip,
        N,
    )
}  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "close"),
    [(torch.float64, 1e-10), (torch.float32, 2e-5), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_every_reduction_and_type_on_a_cpu_is_that_of_the_rows(
    name, reduction, dtype, close
) -> None:
    ours, each, counted = ROW_BY_ROW[name]
    results: list[list[Tensor]] = []
    for kind in (dtype, torch.float64):
        # A temperature that learns, of one number in a row, as modules keep theirs.
        tau = torch.tensor([0.2], dtype=kind).to(torch.promote_types(kind, torch.float32))
        leaves = [table.to(dtype).to(kind) for table in tables()] + [tau]
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        if not results:
            value = ours(*leaves, {"reduction": reduction})
        else:
            value = each(*leaves)
            value = value if reduction == "none" else value.sum()
            value = value / counted if reduction == "mean" else value
        upstream = torch.linspace(1, 2, value.numel()).reshape(value.shape).to(value)
        grads = torch.autograd.grad(value, leaves, upstream, materialize_grads=True)
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
        results.append([value.detach().double(), *(grad.double() for grad in grads)])
    for got, truth in zip(*results, strict=True):
        scale = max(float(truth.abs().max()), 1e-3)
        torch.testing.assert_close(got / scale, truth / scale, rtol=0, atol=close)


@pytest.mark.parametrize("call", [
    lambda a, b, how: kernels.supcon_loss(a, torch.arange(len(a)), **how),
    lambda a, b, how: kernels.info_nce_loss(a, b, **how),
    lambda a, b, how: kernels.clip_loss(a, b, **how),
], ids=["supcon", "info-nce", "clip"])  # fmt: skip
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_nobody_has_loss_zero_and_a_gradient(call, reduction) -> None:
    one, two = (table[:0].requires_grad_() for table in tables())
    value = call(one, two, {"reduction": reduction})
    assert value.sum() == 0
    assert torch.autograd.grad(value.sum(), one)[0].shape == one.shape


@pytest.mark.parametrize("call", [
    lambda a, b: kernels.supcon_loss(a, LABELS),
    kernels.info_nce_loss,
    kernels.clip_loss,
], ids=["supcon", "info-nce", "clip"])  # fmt: skip
def test_a_row_that_is_not_a_number_makes_the_loss_none(call) -> None:
    one, two = tables()
    one[7, 2] = torch.nan
    assert call(one, two).isnan()


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


ONE, TWO = tables()
WRONG = {
    "labels": (
        lambda: kernels.supcon_loss(ONE, LABELS[:-1]), ValueError,
        "labels: asked for one whole number per row of rows",
    ),
    "views": (
        lambda: kernels.info_nce_loss(ONE, TWO[:-1]), ValueError, "two: asked for the shape of one",
    ),
    "views-of-two-types": (
        lambda: kernels.info_nce_loss(ONE, TWO.half()), TypeError,
        r"two: asked for the dtype of one, torch.float64, got .*convert with two.to\(one.dtype\)",
    ),
    "texts": (
        lambda: kernels.clip_loss(ONE, TWO[:-1]), ValueError, "text: asked for the shape of image",
    ),
    "texts-of-another-type": (
        lambda: kernels.clip_loss(ONE, TWO.float()), TypeError, r"text.to\(image.dtype\)",
    ),
    "whole-numbers": (
        lambda: kernels.clip_loss(ONE.long(), TWO.long()), TypeError, "image: asked for float16",
    ),
    "sparse": (
        lambda: kernels.info_nce_loss(ONE.to_sparse(), TWO.to_sparse()), TypeError,
        r"one: asked for a dense tensor, got layout torch.sparse_coo; .* one.to_dense\(\)",
    ),
    "half-a-queue": (
        lambda: kernels.clip_loss(ONE, TWO, queue=(ONE,)), TypeError,
        r"queue: asked for two tensors, \(images, texts\), got tuple \(Tensor\); pass a table",
    ),
    "a-queue-of-one-side": (
        lambda: kernels.clip_loss(ONE, TWO, queue=(ONE, None)), TypeError,
        r"got tuple \(Tensor, NoneType\)",
    ),
    "a-table-as-queue": (
        lambda: kernels.clip_loss(ONE, TWO, queue=ONE), TypeError, r"got Tensor \(Tensor\)",
    ),
    "a-queue-in-half-precision": (
        lambda: kernels.clip_loss(ONE, TWO, queue=(ONE, TWO.bfloat16())), TypeError,
        r"queue\[1\]: asked for the dtype of image.*queue\[1\].to\(image.dtype\)",
    ),
    "a-narrower-queue": (
        lambda: kernels.clip_loss(ONE, TWO, queue=(ONE[:, :4], TWO)), ValueError,
        r"queue\[0\]: asked for the width of image, 12, got 4",
    ),
    "a-temperature-of-letters": (
        lambda: kernels.supcon_loss(ONE, LABELS, temperature="0.1"), TypeError,
        r"temperature: asked for a number, got '0.1' \(str\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_argument_is_named_as_its_caller_knows_it(call, error, words) -> None:
    with pytest.raises(error, match=words):
        call()
