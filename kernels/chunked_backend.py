"""Both passes of the loss on any device: chunked.py for the sums, plain torch for the rest."""

import torch
from torch import Tensor

from kernels import chunked
from kernels import validation as checks
from kernels.distributed import Shares, find_shares, gather_rows
from kernels.groups import Groups, Neighbours, find_groups, find_neighbours
from kernels.types import Forward, Options, mean_over_ranks

STATS = 2
"""Log-sum-exp of the whole denominator (+inf if empty) and pull of the hub, per row."""


def forward(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    keys: Tensor | None,
    options: Options,
    *,
    with_gradient: bool,
) -> Forward:
    """Loss, figures and what `backward` needs; rows, hubs and keys have unit length."""
    groups, near, shares, tau = _prepare(rows, hubs, group, temperature, overlap, options)
    work = working_dtype(rows.dtype)
    columns = gather_rows(rows if keys is None else keys, shares)
    problem = _problem(rows, columns, shares, groups, near, tau, student=keys is None)
    if keys is None:
        negatives, cosine = chunked.student_forward(problem)
        d_rows = rows.new_empty(0, rows.shape[1], dtype=work)
    else:
        negatives, cosine, d_rows = chunked.teacher_forward(
            problem, columns.to(work), offset=shares.offset, with_gradient=with_gradient
        )
    positive = (problem.rows * hubs.to(work)[groups.image]).sum(1)
    total = torch.logaddexp(negatives, positive / tau) if options.include_positive else negatives
    dead = total == -torch.inf
    loss = torch.where(dead, 0.0, total) - positive / tau
    log_sum = torch.where(dead, torch.inf, total)
    pull = (negatives - log_sum).exp() if options.include_positive else torch.ones_like(loss)
    share = (cosine / tau + near.log_weight - log_sum[:, None]).exp().sum(1)
    other = near.column != torch.arange(loss.shape[0], device=loss.device)[:, None]
    cosines = torch.where(other, cosine, 0.0).sum(1)
    per_row = torch.stack([loss, share, positive, cosines])
    mean, figures = mean_over_ranks(per_row, other.sum(), shares)
    many = keys is None and shares.world_size > 1
    empty = rows.new_empty(0, rows.shape[1])
    return Forward(
        loss=mean,
        figures=figures,
        stats=torch.stack([log_sum, pull]),
        columns=columns if many else empty,
        hubs=empty.clone(),
        hub_length=rows.new_empty(0, dtype=torch.float32),
        d_rows=d_rows,
    )


def backward(
    d_loss: Tensor,
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    saved: Forward,
    options: Options,
    *,
    student: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rows, hubs and temperature."""
    groups, near, shares, tau = _prepare(rows, hubs, group, temperature, overlap, options)
    work = working_dtype(rows.dtype)
    log_sum, pull = saved.stats
    upstream = d_loss.to(work) * (shares.world_size / max(shares.total, 1))
    weight = upstream * pull
    local, local_hubs = rows.to(work), hubs.to(work)[groups.image]
    if student:
        columns = saved.columns if shares.world_size > 1 else rows
        whole = upstream.expand(rows.shape[0]).contiguous()
        d_rows = chunked.student_backward(
            _problem(rows, columns, shares, groups, near, tau, student=True),
            log_sum=log_sum,
            weight=whole,
            others=_statistics_of_others(log_sum, whole, shares),
        )
    else:
        d_rows = saved.d_rows * weight[:, None]
    # Each pair of a symmetric matrix is met twice, once from either row.
    times = 0.5 if student else 1.0
    positive = (local * local_hubs).sum(1)
    d_beta = (local * d_rows).sum() * (tau * times) - (weight * positive).sum()
    pulled = (weight / tau)[:, None]
    d_hubs = _sum_by_image(-pulled * local, groups)
    return (
        (d_rows - pulled * local_hubs).to(rows.dtype),
        d_hubs.to(hubs.dtype),
        (-d_beta / tau**2).reshape(temperature.shape).to(temperature),
    )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is widened: a CPU gains nothing from it, and logits must not be rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _prepare(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    options: Options,
) -> tuple[Groups, Neighbours, Shares, float]:
    groups = find_groups(group, hubs=hubs.shape[0], validate=options.validate)
    most = groups.most()
    checks.check_table(rows.shape[0], most)
    checks.check_overlap_width(overlap, most)
    tau = float(temperature)
    checks.check_temperature_value(tau)
    shares = find_shares(rows.shape[0], hubs.shape[0], device=rows.device, gather=options.gather)
    near = find_neighbours(
        groups,
        intra_weight=options.weight,
        images=shares.images,
        overlap=overlap,
        dtype=working_dtype(rows.dtype),
    )
    return groups, near, shares, tau


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
    work = working_dtype(rows.dtype)
    many = student and shares.world_size > 1
    empty = rows.new_empty(0, rows.shape[1], dtype=work)
    return chunked.make_problem(
        rows.to(work),
        columns[: shares.offset].to(work) if many else empty,
        columns[shares.offset + rows.shape[0] :].to(work) if many else empty,
        groups=groups,
        neighbours=near,
        temperature=tau,
    )


def _sum_by_image(values: Tensor, groups: Groups) -> Tensor:
    """Sum of each image's rows in row order: the same bits every time, on any device."""
    if values.shape[0] == 0:
        return values.new_zeros(groups.starts.shape[0] - 1, values.shape[1])
    return torch.segment_reduce(values, "sum", lengths=groups.counts, axis=0)
