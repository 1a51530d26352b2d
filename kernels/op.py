"""The loss as an operation of torch: opaque to torch.compile, first derivative only.

Everything whose size depends on values (images per batch, rows of other ranks) stays inside the
operation, so that `torch.compile(fullgraph=True)` sees two calls and nothing else.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import checks, chunked
from kernels.distributed import Shares, find_shares, gather_rows, is_distributed, sum_over_ranks
from kernels.groups import Groups, Neighbours, find_groups, find_neighbours

Forward = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""loss, figures [3], log_sum [n], pull [n], cosine [n, c], columns [m, d], d_rows [n, d]"""


class RowSums(NamedTuple):
    """What a backend says of each row before the hubs enter."""

    negatives: Tensor
    """Log-sum-exp over all negatives, [n]."""
    cosine: Tensor
    """Cosines inside images, [n, c]."""
    d_rows: Tensor
    """Teacher keys: gradient of `negatives`, [n, d]; empty for student keys."""


@torch.library.custom_op("lmcl::contrastive_forward", mutates_args=())
def contrastive_forward(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    keys: Tensor | None,
    intra_weight: float,
    balanced: bool,
    include_positive: bool,
    gather: bool,
    with_gradient: bool,
) -> Forward:
    """Loss of the batch and what the backward pass needs; see `manifold_contrastive_loss`."""
    groups = find_groups(group, hubs=hubs.shape[0])
    checks.check_table(rows.shape[0], groups.most)
    checks.check_overlap_width(overlap, groups.most)
    shares = find_shares(rows.shape[0], hubs.shape[0], device=rows.device, gather=gather)
    work = _working_dtype(rows)
    near = find_neighbours(
        groups,
        intra_weight="balanced" if balanced else intra_weight,
        images=shares.images,
        overlap=overlap,
        dtype=work,
    )
    tau = float(temperature)
    checks.check_temperature_value(tau)
    columns = gather_rows(rows if keys is None else keys, shares).to(work)
    problem = _problem(rows.to(work), columns, shares, groups, near, tau, student=keys is None)
    if keys is None:
        negatives, cosine = chunked.student_forward(problem)
        d_rows = rows.new_empty(0, rows.shape[1], dtype=work)
    else:
        negatives, cosine, d_rows = chunked.teacher_forward(
            problem, columns, offset=shares.offset, with_gradient=with_gradient
        )
    positive = (problem.rows * hubs.to(work)[groups.image]).sum(1)
    loss, figures, log_sum, pull = _combine(
        RowSums(negatives, cosine, d_rows), positive, near, tau, shares, include_positive
    )
    kept = (
        columns if shares.world_size > 1 and keys is None else columns.new_empty(0, rows.shape[1])
    )
    return loss, figures, log_sum, pull, cosine, kept, d_rows


def _combine(
    sums: RowSums,
    positive: Tensor,
    near: Neighbours,
    tau: float,
    shares: Shares,
    include_positive: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Per-row sums -> loss, figures, log-sum-exp of the whole denominator, pull of the hub."""
    total = sums.negatives
    if include_positive:
        total = torch.logaddexp(total, positive / tau)
    dead = total == -torch.inf
    loss = torch.where(dead, 0.0, total) - positive / tau
    log_sum = torch.where(dead, torch.inf, total)
    pull = (sums.negatives - log_sum).exp() if include_positive else torch.ones_like(loss)
    intra = (sums.cosine / tau + near.log_weight - log_sum[:, None]).exp().sum(1)
    other = near.column != torch.arange(loss.shape[0], device=loss.device)[:, None]
    intra_cosine = torch.where(other, sums.cosine, 0.0).sum()
    local = torch.stack([loss.sum(), intra.sum(), positive.sum(), intra_cosine, other.sum()])
    whole = sum_over_ranks(local, shares)
    rows = max(shares.total, 1)
    figures = torch.stack([whole[1] / rows, whole[2] / rows, whole[3] / whole[4].clamp(min=1)])
    return (whole[0] / rows).to(_loss_dtype(loss)), figures.to(_loss_dtype(loss)), log_sum, pull


@torch.library.custom_op("lmcl::contrastive_backward", mutates_args=())
def contrastive_backward(
    d_loss: Tensor,
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    log_sum: Tensor,
    pull: Tensor,
    cosine: Tensor,
    columns: Tensor,
    d_negatives: Tensor,
    intra_weight: float,
    balanced: bool,
    include_positive: bool,
    gather: bool,
    student: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rows, hubs and temperature."""
    groups = find_groups(group, hubs=hubs.shape[0])
    shares = find_shares(rows.shape[0], hubs.shape[0], device=rows.device, gather=gather)
    work = _working_dtype(rows)
    tau = float(temperature)
    upstream = d_loss.to(work) * (shares.world_size / max(shares.total, 1))
    weight = upstream.expand(rows.shape[0]) * pull
    local = rows.to(work)
    if student:
        near = find_neighbours(
            groups,
            intra_weight="balanced" if balanced else intra_weight,
            images=shares.images,
            overlap=overlap,
            dtype=work,
        )
        columns = columns.to(work)
        problem = _problem(local, columns, shares, groups, near, tau, student=True)
        whole = upstream.expand(rows.shape[0])
        d_rows = chunked.student_backward(
            problem,
            log_sum=log_sum,
            weight=whole.contiguous(),
            cosine=cosine,
            others=_statistics_of_others(log_sum, whole, shares),
        )
    else:
        d_rows = d_negatives * weight[:, None]
    twice = 2.0 if student else 1.0
    positive = (local * hubs.to(work)[groups.image]).sum(1)
    pulled = weight[:, None] / tau
    d_beta = (local * d_rows).sum() * (tau / twice) - (weight * positive).sum()
    d_rows = d_rows - pulled * hubs.to(work)[groups.image]
    d_hubs = _sum_by_image(-pulled * local, groups)
    return (
        d_rows.to(rows.dtype),
        d_hubs.to(hubs.dtype),
        (-d_beta / tau**2).reshape(temperature.shape).to(temperature),
    )


def _statistics_of_others(
    log_sum: Tensor, weight: Tensor, shares: Shares
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exp and upstream weight of the rows of lower and of higher ranks."""
    if shares.world_size == 1:
        empty = log_sum.new_empty(0)
        return (empty, empty), (empty, empty)
    table = gather_rows(torch.stack([log_sum, weight], dim=1), shares)
    before, after = table[: shares.offset], table[shares.offset + log_sum.shape[0] :]
    return (before[:, 0], before[:, 1]), (after[:, 0], after[:, 1])


def _problem(
    rows: Tensor,
    columns: Tensor,
    shares: Shares,
    groups: Groups,
    near: Neighbours,
    tau: float,
    *,
    student: bool,
) -> chunked.Problem:
    empty = rows.new_empty(0, rows.shape[1])
    many = student and shares.world_size > 1
    return chunked.make_problem(
        rows,
        columns[: shares.offset] if many else empty,
        columns[shares.offset + rows.shape[0] :] if many else empty,
        groups=groups,
        neighbours=near,
        temperature=tau,
    )


def _sum_by_image(values: Tensor, groups: Groups) -> Tensor:
    """Sum of each image's rows in row order: the same bits every time, on any device."""
    if values.shape[0] == 0:
        return values.new_zeros(groups.counts.shape[0], values.shape[1])
    return torch.segment_reduce(values, "sum", lengths=groups.counts, axis=0)


def _working_dtype(rows: Tensor) -> torch.dtype:
    """Half precision is widened: the CPU gains nothing from it, and logits must not be rounded."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _loss_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


@contrastive_forward.register_fake
def _(  # type: ignore[no-untyped-def]
    rows, hubs, group, temperature, overlap, keys, intra_weight, balanced, include_positive, gather,
    with_gradient,
) -> Forward:  # fmt: skip
    work = _working_dtype(rows)
    n, d = rows.shape
    context = torch.library.get_ctx()
    most = context.new_dynamic_size()
    many = keys is None and gather and is_distributed()
    m = context.new_dynamic_size() if many else 0
    return (
        rows.new_empty((), dtype=work),
        rows.new_empty(3, dtype=work),
        rows.new_empty(n, dtype=work),
        rows.new_empty(n, dtype=work),
        rows.new_empty(n, most, dtype=work),
        rows.new_empty(m, d, dtype=work),
        rows.new_empty(n if keys is not None else 0, d, dtype=work),
    )


@contrastive_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_loss, rows, hubs, group, temperature, overlap, log_sum, pull, cosine, columns, d_negatives,
    intra_weight, balanced, include_positive, gather, student,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(rows), torch.empty_like(hubs), torch.empty_like(temperature)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    rows, hubs, group, temperature, overlap, keys, *options = inputs
    _, _, log_sum, pull, cosine, columns, d_rows = output
    ctx.options = options
    ctx.student = keys is None
    ctx.save_for_backward(
        rows, hubs, group, temperature, overlap, log_sum, pull, cosine, columns, d_rows
    )


def _derive(ctx: Any, d_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    rows, hubs, group, temperature, overlap, *kept = ctx.saved_tensors
    intra_weight, balanced, include_positive, gather, _ = ctx.options
    d_rows, d_hubs, d_temperature = contrastive_backward(
        d_loss, rows, hubs, group, temperature, overlap, *kept,
        intra_weight, balanced, include_positive, gather, ctx.student,
    )  # fmt: skip
    return d_rows, d_hubs, None, d_temperature, *(None,) * 7


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise RuntimeError(
        "manifold_contrastive_loss: asked for a second derivative, only the first is implemented; "
        "call backward without create_graph=True, or use backend='dense'"
    )


contrastive_forward.register_autograd(_derive, setup_context=_keep)
contrastive_backward.register_autograd(_refuse)
