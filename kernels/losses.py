"""Losses of others over `grouped_logsumexp`: SupCon, two-view InfoNCE, CLIP; no (n, m) matrix.

With several ranks (`process_group`) a "mean" is that of all ranks, and gradients are scaled so that
DDP's mean over ranks is its gradient. Each stands beside its usual dense code in docs/kernels.md.
"""

from typing import Any, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.distributed import RankLayout, ask_layouts, gather_rows, sum_over_ranks
from kernels.grouped import (
    ComputeOptions,
    check_reduction,
    grouped_logsumexp,
    reduce_rows,
    two_sided_logsumexp,
)
from kernels.types import divide_by_length
from kernels.validation import check_group, check_queue, check_same_shape


def supcon_loss(
    rows: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    *,
    temperature: float | Float[Tensor, "..."] = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    **options: Unpack[ComputeOptions],
) -> Tensor:
    """Supervised contrastive loss (SupCon): rows of one label attract one another.

    L_i = log sum_{a != i} exp(s_ia) - mean_{p != i, same label} s_ip, s = cosine / temperature.
    Labels may be scattered and shared between ranks. A row whose label nobody else has gets a loss
    of 0 and does not count in the mean.

    Source: Khosla et al. 2020, arXiv 2004.11362, equation (2), without its base temperature.
    """
    check_reduction(reduction)
    check_group("labels", labels, "rows", rows)
    rows = divide_by_length(rows) if normalize else rows
    log_sum = grouped_logsumexp(rows, temperature=temperature, is_unit=normalize, **options)
    (layout,) = ask_layouts((rows.shape[0],), rows.device, options.get("process_group"))
    everyone = gather_rows(labels, layout)
    classes, label, counts = torch.unique(everyone, return_inverse=True, return_counts=True)
    label = label[layout.offset : layout.offset + rows.shape[0]]
    wide = rows.to(log_sum)
    sums = _sum_by_label(wide, label, len(classes), dense=options.get("backend") == "dense")
    if layout.world_size > 1:
        sums = _SumOfAll.apply(sums, layout)
    others = counts[label] - 1
    positive = (wide * (sums[label] - wide)).sum(1) / others.clamp(min=1) / temperature
    loss = torch.where(others > 0, log_sum - positive, 0.0)
    counted = sum_over_ranks((others > 0).sum(), layout)
    return reduce_rows(loss, reduction, layout, count=counted)


def info_nce_loss(
    one: Float[Tensor, "n d"],
    two: Float[Tensor, "n d"],
    *,
    temperature: float | Float[Tensor, "..."] = 0.1,
    include_positive: bool = True,
    normalize: bool = True,
    reduction: str = "mean",
    **options: Unpack[ComputeOptions],
) -> Tensor:
    """InfoNCE of two views (SimCLR's NT-Xent): row i of one attracts row i of the other.

    Each of the 2 n rows is compared with all other rows of both views. `include_positive=False`
    leaves the positive out of the denominator; a row that then has an empty one (one pair in all)
    has the loss of its positive alone. With "none" the rows of `one` come first.

    Source: Chen et al. 2020, arXiv 2002.05709, equation (1); without the positive: Yeh et al. 2021,
    arXiv 2110.06848 (DCL).
    """
    check_reduction(reduction)
    check_same_shape("two", two, "one", one)
    rows = torch.cat([one, two])
    rows = divide_by_length(rows) if normalize else rows
    (layout,) = ask_layouts((rows.shape[0],), rows.device, options.get("process_group"))
    n = one.shape[0]
    group = (layout.offset + torch.arange(n, device=rows.device)).repeat(2)
    log_sum = grouped_logsumexp(
        rows, temperature=temperature, q_group=group, is_unit=normalize,
        group_weight=1.0 if include_positive else 0.0, **options,
    )  # fmt: skip
    log_sum = torch.where(log_sum == -torch.inf, 0.0, log_sum)
    wide = rows.to(log_sum)
    positive = (wide[:n] * wide[n:]).sum(1) / temperature
    return reduce_rows(log_sum - positive.repeat(2), reduction, layout)


def clip_loss(
    image: Float[Tensor, "n d"],
    text: Float[Tensor, "n d"],
    *,
    temperature: float | Float[Tensor, "..."] = 0.07,
    queue: tuple[Float[Tensor, "r d"], Float[Tensor, "s d"]] | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    **options: Unpack[ComputeOptions],
) -> Tensor:
    """Two-sided contrastive loss (CLIP): image i belongs to text i, and to no other.

    The mean of both directions. `queue`: earlier images and texts; they are further columns of the
    other side's rows, get no gradient, and are those of this rank.

    Source: Radford et al. 2021, arXiv 2103.00020, figure 3; queue: He et al. 2020 (MoCo),
    arXiv 1911.05722.
    """
    check_reduction(reduction)
    check_same_shape("text", text, "image", image)
    if queue is not None:
        check_queue(queue, image)
    tables = (image, text, *(table.detach() for table in queue or ()))
    image, text, *earlier = (divide_by_length(t) if normalize else t for t in tables)
    how: Any = {"temperature": temperature, "is_unit": normalize}
    image_sum, text_sum = two_sided_logsumexp(image, text, **how, **options)
    if earlier:
        alone: Any = {**options, "process_group": None}
        image_sum = image_sum.logaddexp(grouped_logsumexp(image, earlier[1], **how, **alone))
        text_sum = text_sum.logaddexp(grouped_logsumexp(text, earlier[0], **how, **alone))
    positive = (image.to(image_sum) * text.to(image_sum)).sum(1) / temperature
    (layout,) = ask_layouts((image.shape[0],), image.device, options.get("process_group"))
    return reduce_rows((image_sum + text_sum) / 2 - positive, reduction, layout)


def _sum_by_label(rows: Tensor, label: Tensor, count: int, *, dense: bool) -> Tensor:
    """Sum of the rows of each label in row order: the same bits every time, on any device.

    dense: As a product, which has every derivative and transform of torch.
    """
    if dense:
        return torch.nn.functional.one_hot(label, count).to(rows).T @ rows
    if rows.shape[0] == 0:
        # Still of the rows: a rank that holds none has to join the others' backward pass.
        return rows.new_zeros(count, rows.shape[1]) + rows.sum()
    lengths = torch.bincount(label, minlength=count)
    return torch.segment_reduce(rows[label.argsort(stable=True)], "sum", lengths=lengths, axis=0)


class _SumOfAll(torch.autograd.Function):
    """Elementwise sum over the ranks, whose gradient is summed over the ranks too."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, layout: RankLayout) -> Tensor:
        ctx.layout = layout
        return sum_over_ranks(values, layout).clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        return sum_over_ranks(d.contiguous(), ctx.layout), None
