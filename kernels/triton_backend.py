"""Both passes of the loss through the Triton kernels: gathers, launches, and means; few of each."""

import torch
from torch import Tensor

from kernels import triton_launch, validation
from kernels.distributed import RankLayout, find_rank_layout, gather_rows
from kernels.groups import Groups, check_runs
from kernels.triton_launch import ColumnStats, LaunchConfig, Operands, Rows
from kernels.types import Forward, LossInputs


def forward(inputs: LossInputs, *, with_gradient: bool) -> Forward:
    """Loss, figures and what `backward` needs."""
    rows, options = inputs.rows, inputs.options
    tables = triton_launch.image_tables(inputs.group, hubs=inputs.images)
    groups, config, layout = _plan_pass(inputs, tables)
    if options.validate:
        check_runs(inputs.group, hubs=inputs.images)
        validation.check_overlap_width(inputs.overlap, groups.most())
        validation.check_temperature_value(float(inputs.temperature), coldest=options.coldest)
    local = triton_launch.prepare(rows, config)
    hubs = triton_launch.prepare(inputs.hubs, config)
    keys = inputs.keys
    compared = local.table if keys is None else triton_launch.prepare(keys, config).table
    columns = gather_rows(compared, layout)
    operands = Operands(
        rows=local, columns=columns, hubs=hubs, groups=groups, config=config,
        offset=layout.offset, d_dtype=rows.dtype,
    )  # fmt: skip
    stats, d_rows = triton_launch.forward(
        operands, with_gradient=options.has_keys and with_gradient
    )
    loss, figures = triton_launch.mean_figures(stats, groups, layout)
    changed = _is_changed(inputs, config)
    many = not options.has_keys and layout.world_size > 1
    none = rows.new_empty(0, config.plan.width, dtype=config.dtype)
    kept = local.table if options.has_keys else columns
    return Forward(
        loss=loss,
        figures=figures,
        stats=stats,
        columns=kept if changed or many else none,
        hubs=hubs.table if changed else none.clone(),
        hub_length=hubs.length,
        tables=tables,
        d_rows=d_rows[:, : rows.shape[1]].contiguous(),
    )


def backward(d_loss: Tensor, inputs: LossInputs, saved: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by rows, hubs and temperature."""
    groups, config, layout = _plan_pass(inputs, saved.tables)
    d, student = inputs.rows.shape[1], not inputs.options.has_keys
    operands = _saved_operands(inputs, saved, groups, config, layout)
    factor = (d_loss.float() * (layout.world_size / max(layout.total, 1))).reshape(1)
    d_hubs = triton_launch.backward_hubs(operands, saved.stats[triton_launch.PULL], factor)
    if student:
        of_columns = _column_stats(saved.stats, factor, config, layout)
        d_rows, d_tau = triton_launch.backward(operands, saved.stats, of_columns)
        d_rows = d_rows[:, :d]
    else:
        d_rows = saved.d_rows * factor
    temperature = inputs.temperature
    if temperature.device != inputs.rows.device:
        # A plain number: nobody asks for its gradient, and fetching it would wait for the GPU.
        d_temperature = torch.zeros_like(temperature)
    elif student:
        d_temperature = d_tau.sum()
    else:
        d_temperature = (saved.stats[triton_launch.D_TAU] * factor).sum()
    return (
        d_rows.to(inputs.rows.dtype).contiguous(),
        d_hubs[:, :d].contiguous(),
        d_temperature.reshape(temperature.shape).to(temperature.dtype),
    )


def _plan_pass(inputs: LossInputs, tables: Tensor) -> tuple[Groups, LaunchConfig, RankLayout]:
    if inputs.overlap is not None:
        validation.check_table(*inputs.overlap.shape)
    layout = find_rank_layout(inputs)
    config = triton_launch.make_launch_config(inputs, images=layout.images)
    groups = triton_launch.as_groups(tables, inputs.rows.shape[0], hubs=inputs.images)
    return groups, config, layout


def _saved_operands(
    inputs: LossInputs, saved: Forward, groups: Groups, config: LaunchConfig, layout: RankLayout
) -> Operands:
    """The forward pass's operands again, from what it kept; a teacher's keys are not wanted."""
    rows = inputs.rows
    changed = _is_changed(inputs, config)
    many = not inputs.options.has_keys and layout.world_size > 1
    columns = saved.columns if changed or many else rows.contiguous()
    offset = layout.offset if many else 0
    local = Rows(columns[offset : offset + rows.shape[0]], rows.new_empty(0, dtype=torch.float32))
    hubs = Rows(saved.hubs if changed else inputs.hubs.contiguous(), saved.hub_length)
    return Operands(
        rows=local, columns=columns, hubs=hubs, groups=groups, config=config, offset=offset,
        d_dtype=rows.dtype,
    )  # fmt: skip


def _is_changed(inputs: LossInputs, config: LaunchConfig) -> bool:
    """True if the kernels' tables are others than the caller's, and must be kept."""
    rows = inputs.rows
    is_cut_otherwise = config.plan.width != rows.shape[1] or config.dtype != rows.dtype
    return inputs.options.normalize or is_cut_otherwise


def _column_stats(
    stats: Tensor, factor: Tensor, config: LaunchConfig, layout: RankLayout
) -> ColumnStats:
    """Scales of rows and columns, and what partial sums are multiplied by.

    With several ranks every row's log-sum-exp and upstream factor travel: eight bytes. Scales are
    relative to this rank's factor, so that half-precision weights stay in range.
    """
    n = layout.rows[layout.rank]
    scale, log = stats[triton_launch.SCALE, :n], stats[triton_launch.LOG, :n]
    if layout.world_size == 1:
        return ColumnStats(scale, log, scale, factor, factor)
    table = gather_rows(torch.stack([log, factor.expand_as(log)], dim=1), layout)
    reference = torch.where(factor == 0, 1.0, factor)
    logs = table[:, 0].contiguous()
    ratio = table[:, 1] / reference * config.boost
    if triton_launch.is_fixed(config):
        ratio = ratio * torch.exp2(triton_launch.exponent_scale(config) - logs)
    column_scale = ratio.contiguous()
    own = column_scale[layout.offset : layout.offset + log.shape[0]]
    return ColumnStats(own, logs, column_scale, reference, factor)
