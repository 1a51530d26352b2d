"""Both passes of `grouped_logsumexp`: who is compared with whom, gathers, one class a backend.

Tables are sorted by group inside and results put back into the caller's order. A rank keeps what it
was given; columns of other ranks are gathered again for the backward pass.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels import grouped_chunked, validation
from kernels.chunked_backend import working_dtype
from kernels.distributed import GatherWithGradient, ask_layouts, gather_rows
from kernels.pairs import Pairs, Side, find_pairs, make_side
from kernels.precision import LossPlan, announce, plan_for_rows, surroundings
from kernels.reference import logsumexp
from kernels.types import divide_by_length, dtype_of_products


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a call is computed."""

    plan: LossPlan
    normalize: bool
    is_unit: bool
    """Rows and columns have unit length, once prepared."""
    process_group: Any
    validate: bool

    @staticmethod
    def of(
        q: Tensor,
        temperature: float | Tensor,
        *,
        normalize: bool,
        is_unit: bool,
        options: Mapping[str, Any],
    ) -> "Setting":
        """Choose what computes, say it once, and check a temperature that came as a tensor.

        Args:
            q: The rows.
            temperature: As the caller gave it.
            normalize: Lengths are to be made 1.
            is_unit: Lengths are 1.
            options: Those of `ComputeOptions` that the caller gave.
        """
        validation.check_names(options, ("process_group", "backend", "precision", "validate"))
        plan = plan_for_rows(
            q.device,
            width=q.shape[1],
            dtype=dtype_of_products(q),
            precision=options.get("precision", "rows"),
            backend=options.get("backend", "auto"),
        )
        # torch.compile cannot guard what was said already, and need not say it.
        if not torch.compiler.is_compiling():
            announce(plan)
        validate = options.get("validate", True)
        if validate and isinstance(temperature, Tensor):
            validation.check_temperature_value(float(temperature.detach()))
        return Setting(
            plan=plan,
            normalize=normalize,
            is_unit=is_unit or normalize,
            process_group=options.get("process_group"),
            validate=validate,
        )

    def prepare(self, table: Tensor) -> Tensor:
        """Lengths of 1, and rounding, once; the chunked backend widens half precision later."""
        table = divide_by_length(table) if self.normalize else table
        return table if self.plan.backend == "chunked" else table.to(self.plan.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Who is compared with whom."""

    q_side: Side
    k_side: Side
    """The same object as `q_side` where rows are compared with one another."""
    own: Pairs
    """Local rows of q against the columns of all ranks."""
    turned: Pairs
    """Local rows of k against the rows of q of all ranks."""
    is_two_sided: bool = False
    """The columns' log-sum-exp is wanted too."""

    @property
    def is_mirrored(self) -> bool:
        """One table is compared with itself."""
        return self.q_side is self.k_side


def compare(
    q: Tensor,
    k: Tensor | None,
    groups: tuple[Tensor | None, Tensor | None],
    weights: tuple[float, Tensor | None],
    setting: Setting,
) -> Comparison:
    """Sort both sides by group and find each row's own group among the columns of all ranks.

    Args:
        q: Local rows.
        k: Local columns; None for the rows themselves.
        groups: Of q and of k.
        weights: Inside groups: a number, and a table that stands in its place.
        setting: Which ranks take part.
    """
    (q_group, k_group), (weight, table) = groups, weights
    counts = (q.shape[0], 0 if k is None else k.shape[0], 0 if table is None else table.shape[1])
    q_layout, k_layout, widths = ask_layouts(counts, q.device, setting.process_group)
    if q_group is None and k is None:
        # Everyone is a group alone, so that a row finds itself.
        q_group = q_layout.offset + torch.arange(q.shape[0], device=q.device)
    q_side = make_side(q_group, q_layout)
    k_side = q_side if k is None else make_side(k_group, k_layout)
    if table is not None:
        # One at least: where no group has members, a table may have come without columns.
        widest = max(*widths.rows, 1)
        table = torch.nn.functional.pad(table, (0, widest - table.shape[1]))
    given = None if table is None else q_side.everywhere(table)
    own = find_pairs(
        q_side, k_side, weight=weight, device=q.device, forth=table,
        back=given if k is None else None,
    )  # fmt: skip
    turned = own
    if k is not None:
        turned = find_pairs(k_side, q_side, weight=weight, device=q.device, back=given)
    return Comparison(q_side=q_side, k_side=k_side, own=own, turned=turned)


def run(
    q: Tensor,
    k: Tensor | None,
    temperature: float | Tensor,
    comparison: Comparison,
    setting: Setting,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the local rows and, if both sides are wanted, of the local columns."""
    tau = temperature
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64)
    with surroundings(q.device, setting.plan.precision):
        if setting.plan.backend == "dense":
            return _dense(q, k, tau, comparison)
        rows, columns = _GroupedLogSumExp.apply(q, q if k is None else k, tau, comparison, setting)
    return rows, columns


class _GroupedLogSumExp(torch.autograd.Function):
    """Forward and backward by a backend that forms no matrix."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, temperature: Tensor, comparison: Comparison,
        setting: Setting,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        backend = _backend(setting)(q, k, temperature, comparison, setting)
        rows, columns = backend.log_sums()
        rows = comparison.q_side.restore(rows)
        columns = rows.new_empty(0) if columns is None else comparison.k_side.restore(columns)
        ctx.comparison, ctx.setting = comparison, setting
        ctx.save_for_backward(q, k, temperature, rows, columns)
        ctx.set_materialize_grads(False)
        return rows, columns

    @staticmethod
    def backward(
        ctx: Any, d_rows: Tensor | None, d_columns: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            gradients = _GroupedLogSumExp.gradients(ctx, d_rows, d_columns)
        if not torch.is_grad_enabled():
            return gradients
        # create_graph=True. Results without a graph would count as constants, without a word.
        of = *ctx.saved_tensors[:3], d_rows, d_columns
        return tuple(None if d is None else _OnlyOnce.apply(d, *of) for d in gradients)

    @staticmethod
    def gradients(
        ctx: Any, d_rows: Tensor | None, d_columns: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """By q, k and temperature, None where it is not wanted."""
        q, k, temperature, rows, columns = ctx.saved_tensors
        comparison: Comparison = ctx.comparison
        wants_q, wants_k, wants_tau = ctx.needs_input_grad[:3]
        backend = _backend(ctx.setting)(q, k, temperature, comparison, ctx.setting)
        q_stats = _upstream(rows, d_rows, comparison.q_side)
        k_stats = None
        if comparison.is_mirrored:
            k_stats = q_stats
        elif comparison.is_two_sided:
            k_stats = _upstream(columns, d_columns, comparison.k_side)
        with surroundings(q.device, ctx.setting.plan.precision):
            d_q, d_k = backend.gradient(
                q_stats, k_stats, wants_q=wants_q or wants_tau,
                wants_k=wants_k and not comparison.is_mirrored,
            )  # fmt: skip
        d_tau = None
        if wants_tau:
            # sum_ij G_ij s_ij; a mirrored matrix meets each pair from either row.
            times = 0.5 if comparison.is_mirrored else 1.0
            local = comparison.q_side.local(q).to(d_q)
            d_tau = -times * (local * d_q).sum() / temperature.to(d_q.device, d_q.dtype)
            d_tau = d_tau.reshape(temperature.shape).to(temperature)
        d_q = comparison.q_side.restore(d_q).to(q.dtype) if wants_q else None
        if not wants_k or comparison.is_mirrored:
            return d_q, None, d_tau, None, None
        return d_q, comparison.k_side.restore(d_k).to(k.dtype), d_tau, None, None


class _OnlyOnce(torch.autograd.Function):
    """A first derivative, whose own derivative is refused."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *of: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, ...]:
        raise RuntimeError(
            "grouped_logsumexp: asked for a second derivative, only the first is implemented; "
            "call backward without create_graph=True, or use backend='dense'"
        )


class _Chunked:
    """The tables in the working precision, for `grouped_chunked`."""

    def __init__(
        self, q: Tensor, k: Tensor, temperature: Tensor, comparison: Comparison, setting: Setting
    ) -> None:
        self.comparison = comparison
        self.beta = 1.0 / float(temperature)
        work = working_dtype(q.dtype)
        self.q, self.k = (
            comparison.q_side.local(q).to(work), comparison.k_side.local(k).to(work)
        )  # fmt: skip
        self.source = q, k, work

    @property
    def is_alone(self) -> bool:
        return self.comparison.q_side.layout.world_size == 1

    def log_sums(self) -> tuple[Tensor, Tensor | None]:
        comparison = self.comparison
        if self.is_alone:
            rows, columns = grouped_chunked.log_sums(
                self._walk(self.q, self.k, comparison.own), both=comparison.is_two_sided
            )
            return rows, columns if comparison.is_two_sided else None
        rows, _ = grouped_chunked.log_sums(self._walk(self.q, self._all_k(), comparison.own))
        if not comparison.is_two_sided:
            return rows, None
        columns, _ = grouped_chunked.log_sums(self._walk(self.k, self._all_q(), comparison.turned))
        return rows, columns

    def gradient(
        self, q_stats: Any, k_stats: Any, *, wants_q: bool, wants_k: bool
    ) -> tuple[Tensor, Tensor]:
        comparison = self.comparison
        if self.is_alone:
            d_q, d_k = grouped_chunked.gradient(
                self._walk(self.q, self.k, comparison.own), rows=q_stats, columns=k_stats,
                want_rows=wants_q, want_columns=wants_k or comparison.is_mirrored,
            )  # fmt: skip
            return d_q.mul_(self.beta), d_k if comparison.is_mirrored else d_k.mul_(self.beta)
        d_q, d_k = torch.zeros_like(self.q), torch.zeros_like(self.k)
        # Whether or not its own gradient is wanted, a rank's statistics are wanted by the others.
        all_k_stats = None if k_stats is None else _gather_stats(k_stats, comparison.k_side)
        if wants_q:
            walk = self._walk(self.q, self._all_k(), comparison.own)
            d_q, _ = grouped_chunked.gradient(walk, rows=q_stats, columns=all_k_stats)
        if wants_k:
            walk = self._walk(self.k, self._all_q(), comparison.turned)
            d_k, _ = grouped_chunked.gradient(
                walk, rows=k_stats, columns=_gather_stats(q_stats, comparison.q_side)
            )
        return d_q.mul_(self.beta), d_k.mul_(self.beta)

    def _all_q(self) -> Tensor:
        return self.comparison.q_side.everywhere(self.source[0]).to(self.source[2])

    def _all_k(self) -> Tensor:
        return self.comparison.k_side.everywhere(self.source[1]).to(self.source[2])

    def _walk(self, rows: Tensor, columns: Tensor, pairs: Pairs) -> grouped_chunked.TileWalk:
        mirrored = self.comparison.is_mirrored and self.is_alone
        return grouped_chunked.TileWalk(
            rows=rows, columns=columns, pairs=pairs, beta=self.beta, is_mirrored=mirrored
        )


class _Triton:
    """The same for the Triton kernels: a walk for each gradient, none of them shared."""

    def __init__(
        self, q: Tensor, k: Tensor, temperature: Tensor, comparison: Comparison, setting: Setting
    ) -> None:
        # Triton is there on Linux only, and its kernels read the environment when loaded.
        from kernels import grouped_triton, triton_launch

        self.module, self.comparison, self.setting = grouped_triton, comparison, setting
        self.config = triton_launch.configure(q, temperature, setting.plan.precision)
        self.q, self.k = q, k

    def log_sums(self) -> tuple[Tensor, Tensor | None]:
        comparison = self.comparison
        rows = self.module.log_sums(self._meeting(turned=False))
        if comparison.is_two_sided:
            return rows, self.module.log_sums(self._meeting(turned=True))
        return rows, None

    def gradient(
        self, q_stats: Any, k_stats: Any, *, wants_q: bool, wants_k: bool
    ) -> tuple[Tensor, Tensor]:
        d = self.q.shape[1]
        d_q, d_k = (t.new_zeros(t.shape, dtype=torch.float32) for t in (self.q, self.k))
        all_k = None if k_stats is None else _gather_stats(k_stats, self.comparison.k_side)
        if wants_q:
            meeting = self._meeting(turned=False)
            d_q = self.module.gradient(meeting, rows=q_stats, columns=all_k)[:, :d]
        if wants_k:
            all_q = _gather_stats(q_stats, self.comparison.q_side)
            meeting = self._meeting(turned=True)
            d_k = self.module.gradient(meeting, rows=k_stats, columns=all_q)[:, :d]
        return d_q, d_k

    def _meeting(self, *, turned: bool) -> Any:
        comparison = self.comparison
        sides = [(comparison.q_side, self.q), (comparison.k_side, self.k)]
        (row_side, rows), (column_side, columns) = reversed(sides) if turned else sides
        return self.module.Meeting(
            rows=self.module.prepare(row_side.local(rows), self.config),
            columns=self.module.prepare(column_side.everywhere(columns), self.config),
            pairs=comparison.turned if turned else comparison.own,
            config=self.config,
            is_unit=self.setting.is_unit,
        )


def _backend(setting: Setting) -> Any:
    return _Triton if setting.plan.backend == "triton" else _Chunked


def _upstream(log_sum: Tensor, d: Tensor | None, side: Side) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of the local rows, sorted, and what flows into each."""
    d = torch.zeros_like(log_sum) if d is None else d
    d = torch.where(log_sum == -torch.inf, 0.0, d)
    return side.local(log_sum), side.local(d)


def _gather_stats(stats: tuple[Tensor, Tensor], side: Side) -> tuple[Tensor, Tensor]:
    """The statistics of all ranks, sorted like their rows: eight bytes a row travel."""
    if side.layout.world_size == 1:
        return stats
    table = gather_rows(torch.stack([side.restore(part) for part in stats], dim=1), side.layout)
    table = table if side.all_order is None else table[side.all_order]
    return table[:, 0], table[:, 1]


def _dense(
    q: Tensor, k: Tensor | None, temperature: Tensor, comparison: Comparison
) -> tuple[Tensor, Tensor]:
    """By the definition: the matrix, autograd, and a gradient for every column."""
    q_side, k_side, own = comparison.q_side, comparison.k_side, comparison.own
    columns = q if k is None else k
    if k_side.layout.world_size > 1:
        columns = GatherWithGradient.apply(columns, k_side.layout)
    columns = columns if k_side.all_order is None else columns[k_side.all_order]
    logits = q_side.local(q) @ columns.T / temperature.to(q)
    place = torch.arange(columns.shape[0], device=q.device)
    is_own = (place >= own.first[:, None]) & (place < own.end[:, None])
    weight = torch.ones_like(logits).masked_fill(is_own, own.weight)
    if own.forth is not None:
        inside = (place - own.first[:, None]).clamp(0, own.forth.shape[1] - 1)
        weight = torch.where(is_own, own.forth.to(logits).gather(1, inside), 1.0)
    if own.itself is not None:
        weight = torch.where(place == own.itself[:, None], 0.0, weight)
    rows = q_side.restore(logsumexp(logits + weight.log()))
    if not comparison.is_two_sided:
        return rows, rows.new_empty(0)
    assert k is not None
    turned = q if q_side.layout.world_size == 1 else GatherWithGradient.apply(q, q_side.layout)
    return rows, logsumexp(k @ turned.T / temperature.to(k))
