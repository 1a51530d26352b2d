"""The definition of the loss, the plain way: form the (n, m) matrix, let autograd do the rest.

This is the ground truth of every other backend, so it favours being read over being fast. In
float64 its gradients agree with finite differences; tests/kernels/test_contrastive.py checks that.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class ReferenceRows(NamedTuple):
    """What the definition says of each row; everything is differentiable."""

    loss: Float[Tensor, " n"]
    """Loss of the row, nats."""
    intra_share: Float[Tensor, " n"]
    """Share of the log-sum-exp that crops of the same image hold, in [0, 1]."""
    positive: Float[Tensor, " n"]
    """Cosine of the row and its hub."""
    intra_sum: Float[Tensor, " n"]
    """Sum of the cosines of the row and the other crops of its image."""


def reference_rows(
    rows: Float[Tensor, "n d"],
    columns: Float[Tensor, "m d"],
    hubs: Float[Tensor, "n d"],
    *,
    same_image: Bool[Tensor, "n m"],
    itself: Bool[Tensor, "n m"],
    intra_weight: Float[Tensor, "n m"],
    temperature: Float[Tensor, ""],
    include_positive: bool = False,
) -> ReferenceRows:
    """Loss and shares of each row, straight from the formula.

    Args:
        rows: Unit-length embeddings of random crops.
        columns: What the rows are compared with: the rows of all ranks, or the teacher's.
        hubs: For each row the embedding of its image's salient crop (repeated per row).
        same_image: True where row and column come from one image (the row itself included).
        itself: True where the column is the row itself.
        intra_weight: Weight of a column of the same image, w_A (1 - IoU) >= 0; read only there.
        temperature: Cosines are divided by it; > 0.
        include_positive: InfoNCE: the positive stands in the denominator too.

    Returns:
        Per-row figures. A row without any term in its denominator has the loss of its positive
        alone, -cos/temperature, and an intra share of 0.

    Source: "Local Manifold Learning for No-Reference Image Quality Assessment",
    arXiv 2406.19247, its information loss; options beyond the paper are in docs/kernels.md.
    """
    cosine = rows @ columns.T
    logits = cosine / temperature
    other_crop = same_image & ~itself
    log_weight = torch.where(other_crop, intra_weight, 1.0).log()
    nothing = torch.full_like(logits, -torch.inf)
    intra = logsumexp(torch.where(other_crop, logits + log_weight, nothing))
    inter = logsumexp(torch.where(same_image, nothing, logits))
    positive = (rows * hubs).sum(1)
    terms = [intra, inter, positive / temperature] if include_positive else [intra, inter]
    total = logsumexp(torch.stack(terms, dim=1))
    alive = total > -torch.inf
    dead_as_zero = torch.where(alive | total.isnan(), total, 0.0)
    return ReferenceRows(
        loss=dead_as_zero - positive / temperature,
        intra_share=torch.where(intra > -torch.inf, (intra - dead_as_zero).exp(), 0.0),
        positive=positive,
        intra_sum=torch.where(other_crop, cosine, 0.0).sum(1),
    )


def same_image_masks(
    group: Int[Tensor, " n"], *, columns: int, offset: int
) -> tuple[Bool[Tensor, "n m"], Bool[Tensor, "n m"]]:
    """Which columns show the row's image, and which column is the row itself.

    Args:
        group: Image of each local row.
        columns: Columns in all.
        offset: Column of the first local row; columns of other ranks never show a local image.
    """
    n = group.shape[0]
    same = torch.zeros(n, columns, dtype=torch.bool, device=group.device)
    same[:, offset : offset + n] = group[:, None] == group[None, :]
    itself = torch.zeros_like(same)
    itself[:, offset : offset + n] = torch.eye(n, dtype=torch.bool, device=group.device)
    return same, itself


def logsumexp(values: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Log-sum-exp over the second axis; a row of -inf gives -inf and a zero gradient, not NaN."""
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), -torch.inf)
    peak = values.detach().amax(1)
    peak = torch.where(peak > -torch.inf, peak, torch.where(peak.isnan(), peak, 0.0))
    total = (values - peak[:, None]).exp().sum(1)
    empty = total == 0
    safe = torch.where(empty, 1.0, total)
    return torch.where(empty, -torch.inf, safe.log() + peak)
