"""The operation under the losses: row-wise log-sum-exp of q k^T with weights inside groups.

No (n, m) matrix is formed on the way forth or back. Over several ranks no gradient of a column
travels: each rank gathers tables and eight bytes a row, and forms the gradients of its own rows.
"""

import dataclasses
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import validation
from kernels.distributed import RankLayout, sum_over_ranks
from kernels.grouped_passes import Setting, compare, run

REDUCTIONS = ("none", "mean", "sum")


class ComputeOptions(TypedDict, total=False):
    """How an operation is computed; the same for all of them."""

    process_group: Any
    """Compare with the columns of all ranks of this group (`torch.distributed.group.WORLD`: of
    all); each may hold another number, or none. None: with those of this process."""
    backend: str
    """"auto", "triton", "chunked" or "dense" (forms the matrix; any derivative)."""
    precision: str
    """Of the products, as in `manifold_contrastive_loss`; "rows" unless said otherwise."""
    validate: bool
    """Check values of weights and of a temperature tensor, which waits for a GPU."""


def grouped_logsumexp(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "m d"] | None = None,
    *,
    temperature: float | Float[Tensor, "..."],
    q_group: Int[Tensor, " n"] | None = None,
    k_group: Int[Tensor, " m"] | None = None,
    group_weight: float | Float[Tensor, "n c"] = 1.0,
    normalize: bool = False,
    is_unit: bool = False,
    reduction: str = "none",
    **options: Unpack[ComputeOptions],
) -> Tensor:
    """Log-sum-exp of each row of q k^T / temperature, entries of the own group weighted.

    L_i = log( sum_j w_ij exp(q_i . k_j / temperature) ), w_ij = 1 where j is of another group than
    i, and `group_weight` where it is of the same. Memory is O((n + m) d), never O(n m); two runs
    give the same bits.

    Args:
        q: Rows; gradients flow. Of any length.
        k: Columns; gradients flow, detached ones cost none. None: the rows are compared with one
            another, and none with itself, whatever its group.
        temperature: Products are divided by it; > 0. A tensor learns.
        q_group: Group of each row, any integers in any order; equal over ranks = same group.
            None: nothing is weighted.
        k_group: Group of each column, where k is given.
        group_weight: >= 0, one number, or a table: entry (i, c) for the c-th column of the row's
            own group, in the order of the columns (rank by rank); with `k=None` the row itself is
            counted among them, and its entry not read. No gradient flows. 0 leaves columns out.
        normalize: Divide rows and columns by their lengths first.
        is_unit: The lengths are 1 already, which is not checked: the kernels then need no running
            maximum at temperatures from 0.03 on. `normalize` says so too.
        reduction: "none", or "mean" or "sum" over the rows of all ranks.
        **options: `process_group`, `backend`, `precision`, `validate` (`ComputeOptions`).

    Returns:
        [n], or a scalar; float32 (float64 for float64 rows). -inf where no column has a weight;
        such a row gets a gradient of 0. Gradients are those of the sum over ranks of what each
        makes of its result; with a reduction they are scaled so that the mean over ranks, which
        DDP takes, is the gradient of the reduced value.

    Raises:
        ValueError: Unequal widths, groups of one side only, values out of range.
        TypeError: Wrong element types or devices.
        RuntimeError: On a second derivative, and inside torch.func's transforms, except by "dense".
    """
    check_reduction(reduction)
    backend = options.get("backend", "auto")
    validation.check_transforms("grouped_logsumexp", backend, q, k, temperature, group_weight)
    validation.check_grouped(q, k, temperature, q_group, k_group, group_weight)
    setting = Setting.of(q, temperature, normalize=normalize, is_unit=is_unit, options=options)
    table = group_weight.detach() if isinstance(group_weight, Tensor) else None
    if setting.validate and table is not None:
        validation.check_weights(table)
    q, k = setting.prepare(q), None if k is None else setting.prepare(k)
    weight = 1.0 if isinstance(group_weight, Tensor) else float(group_weight)
    comparison = compare(q, k, (q_group, k_group), (weight, table), setting)
    if setting.validate and table is not None:
        validation.check_weight_width(table, comparison.own.most())
    rows, _ = run(q, k, temperature, comparison, setting)
    return reduce_rows(rows, reduction, comparison.q_side.layout)


def two_sided_logsumexp(
    q: Float[Tensor, "n d"],
    k: Float[Tensor, "m d"],
    *,
    temperature: float | Float[Tensor, "..."],
    normalize: bool = False,
    is_unit: bool = False,
    **options: Unpack[ComputeOptions],
) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Log-sum-exp of the rows and of the columns of q k^T / temperature; a tile serves both.

    Arguments and rules are those of `grouped_logsumexp`; there are no groups.
    """
    backend = options.get("backend", "auto")
    validation.check_transforms("two_sided_logsumexp", backend, q, k, temperature)
    validation.check_grouped(q, k, temperature, None, None, 1.0)
    setting = Setting.of(q, temperature, normalize=normalize, is_unit=is_unit, options=options)
    q, k = setting.prepare(q), setting.prepare(k)
    comparison = compare(q, k, (None, None), (1.0, None), setting)
    comparison = dataclasses.replace(comparison, is_two_sided=True)
    return run(q, k, temperature, comparison, setting)


def check_reduction(reduction: str) -> None:
    """Refuse a reduction that there is not."""
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction: asked for one of {', '.join(REDUCTIONS)}, got {reduction!r}; "
            "'none' gives one number per row"
        )


def reduce_rows(
    values: Float[Tensor, " n"], reduction: str, layout: RankLayout, *, count: Tensor | None = None
) -> Tensor:
    """Mean or sum over the rows of all ranks, its gradient scaled for DDP's mean over ranks.

    Args:
        values: Of the local rows.
        reduction: "none", "mean" or "sum".
        layout: Rows of all ranks.
        count: What a mean divides by, if not the number of rows.
    """
    if reduction == "none":
        return values
    own = values.sum()
    if reduction == "mean":
        own = own / (max(layout.total, 1) if count is None else count.clamp(min=1))
    if layout.world_size == 1:
        return own
    result: Tensor = _ValueOfAll.apply(own, sum_over_ranks(own.detach(), layout), layout.world_size)
    return result


class _ValueOfAll(torch.autograd.Function):
    """The value of all ranks with the gradient of this one's part, times the number of ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, whole: Tensor, times: int) -> Tensor:
        ctx.times = times
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        return d * ctx.times, None, None
