"""Both passes of the loss on any device: chunked.py for the sums, plain torch for the rest."""

import dataclasses

import torch
from torch import Tensor

from kernels import chunked, validation
from kernels.distributed import RankLayout, find_rank_layout, gather_rows, mean_over_ranks
from kernels.groups import Groups, Neighbours, find_groups, find_neighbours
from kernels.types import Forward, LossInputs

STATS = 2
"""Log-sum-exp of the whole denominator (+inf if empty) and pull of the hub, per row."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tables:
    """What both passes derive from a step's inputs, in the working precision."""

    rows: Tensor
    hubs: Tensor
    groups: Groups
    neighbours: Neighbours
    layout: RankLayout
    temperature: float

    def row_hubs(self) -> Tensor:
        """The hub of each row, [n, d]; made when wanted, for it would double the tables."""
        return self.hubs[self.groups.image]


def forward(inputs: LossInputs, *, with_gradient: bool) -> Forward:
    """Loss, figures and what `backward` needs; rows, hubs and keys have unit length."""
    rows, options = inputs.rows, inputs.options
    tables = _make_tables(inputs)
    near, layout, tau = tables.neighbours, tables.layout, tables.temperature
    columns = gather_rows(rows if inputs.keys is None else inputs.keys, layout)
    problem = _make_problem(tables, columns, has_keys=options.has_keys)
    if options.has_keys:
        negatives, cosine, d_rows = chunked.teacher_forward(
            problem, columns.to(tables.rows), offset=layout.offset, with_gradient=with_gradient
        )
    else:
        negatives, cosine = chunked.student_forward(problem)
        d_rows = tables.rows.new_empty(0, rows.shape[1])
    positive = (tables.rows * tables.row_hubs()).sum(1)
    total = torch.logaddexp(negatives, positive / tau) if options.include_positive else negatives
    dead = total == -torch.inf
    loss = torch.where(dead, 0.0, total) - positive / tau
    log_sum = torch.where(dead, torch.inf, total)
    pull = (negatives - log_sum).exp() if options.include_positive else torch.ones_like(loss)
    share = (cosine / tau + near.log_weight - log_sum[:, None]).exp().sum(1)
    other = near.column != torch.arange(loss.shape[0], device=loss.device)[:, None]
    cosines = torch.where(other, cosine, 0.0).sum(1)
    per_row = torch.stack([loss, share, positive, cosines])
    mean, figures = mean_over_ranks(per_row, other.sum(), layout)
    many = not options.has_keys and layout.world_size > 1
    empty = rows.new_empty(0, rows.shape[1])
    return Forward(
        loss=mean,
        figures=figures,
        stats=torch.stack([log_sum, pull]),
        columns=columns if many else empty,
        hubs=empty.clone(),
        hub_length=rows.new_empty(0, dtype=torch.float32),
        tables=rows.new_empty(0, dtype=torch.int32),
        d_rows=d_rows,
    )


def backward(d_loss: Tensor, inputs: LossInputs, saved: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rows, hubs and temperature."""
    student = not inputs.options.has_keys
    tables = _make_tables(inputs)
    layout, tau = tables.layout, tables.temperature
    log_sum, pull = saved.stats
    upstream = d_loss.to(log_sum) * (layout.world_size / max(layout.total, 1))
    weight = upstream * pull
    if student:
        columns = saved.columns if layout.world_size > 1 else inputs.rows
        whole = upstream.expand(tables.rows.shape[0]).contiguous()
        d_rows = chunked.student_backward(
            _make_problem(tables, columns, has_keys=False),
            log_sum=log_sum,
            weight=whole,
            others=_statistics_of_others(log_sum, whole, layout),
        )
    else:
        d_rows = saved.d_rows * weight[:, None]
    # Each pair of a symmetric matrix is met twice, once from either row.
    times = 0.5 if student else 1.0
    # One table of the rows' size at a time beside the gradient: here is the peak of a step.
    row_hubs = tables.row_hubs()
    positive = torch.einsum("nd,nd->n", tables.rows, row_hubs)
    d_beta = torch.einsum("nd,nd->n", tables.rows, d_rows).sum() * (tau * times)
    d_beta = d_beta - (weight * positive).sum()
    pulled = (weight / tau)[:, None]
    d_rows.addcmul_(pulled, row_hubs, value=-1)
    del row_hubs
    d_hubs = _sum_by_image(-pulled * tables.rows, tables.groups)
    temperature = inputs.temperature
    return (
        d_rows.to(inputs.rows.dtype),
        d_hubs.to(inputs.hubs.dtype),
        (-d_beta / tau**2).reshape(temperature.shape).to(temperature),
    )


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Half precision is widened: a CPU gains nothing from it, and logits must not be rounded."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _make_tables(inputs: LossInputs) -> _Tables:
    rows, options = inputs.rows, inputs.options
    work = working_dtype(rows.dtype)
    groups = find_groups(inputs.group, hubs=inputs.images, validate=options.validate)
    most = groups.most()
    validation.check_table(rows.shape[0], most)
    validation.check_overlap_width(inputs.overlap, most)
    temperature = float(inputs.temperature)
    validation.check_temperature_value(temperature, coldest=options.coldest)
    layout = find_rank_layout(inputs)
    near = find_neighbours(
        groups,
        intra_weight=options.weight,
        images=layout.images,
        overlap=inputs.overlap,
        dtype=work,
    )
    return _Tables(
        rows=rows.to(work),
        hubs=inputs.hubs.to(work),
        groups=groups,
        neighbours=near,
        layout=layout,
        temperature=temperature,
    )


def _make_problem(tables: _Tables, columns: Tensor, *, has_keys: bool) -> chunked.Problem:
    """Rows before and after the local ones are columns too, where rows are compared with rows."""
    rows, layout = tables.rows, tables.layout
    many = not has_keys and layout.world_size > 1
    none = rows.new_empty(0, rows.shape[1])
    return chunked.make_problem(
        rows,
        columns[: layout.offset].to(rows) if many else none,
        columns[layout.offset + rows.shape[0] :].to(rows) if many else none,
        groups=tables.groups,
        neighbours=tables.neighbours,
        temperature=tables.temperature,
    )


def _statistics_of_others(
    log_sum: Tensor, weight: Tensor, layout: RankLayout
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Log-sum-exp and upstream weight of the rows of lower and of higher ranks."""
    if layout.world_size == 1:
        empty = log_sum.new_empty(0)
        return (empty, empty), (empty, empty)
    table = gather_rows(torch.stack([log_sum, weight], dim=1), layout)
    before, after = table[: layout.offset], table[layout.offset + log_sum.shape[0] :]
    return (before[:, 0], before[:, 1]), (after[:, 0], after[:, 1])


def _sum_by_image(values: Tensor, groups: Groups) -> Tensor:
    """Sum of each image's rows in row order: the same bits every time, on any device."""
    if values.shape[0] == 0:
        return values.new_zeros(groups.starts.shape[0] - 1, values.shape[1])
    return torch.segment_reduce(values, "sum", lengths=groups.counts, axis=0)
