"""Both passes of the loss through the Triton kernels: gathers, launches, and means; few of each."""

import dataclasses

import torch
from torch import Tensor

from kernels import triton_launch as launch
from kernels import validation as checks
from kernels.distributed import Shares, find_shares, gather_rows
from kernels.groups import Groups, find_groups, row_weights
from kernels.types import Forward, Options, mean_over_ranks


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
    """Loss, figures and what `backward` needs."""
    groups, setting, shares = _prepare(rows, hubs, group, temperature, overlap, options)
    if options.validate:
        checks.check_overlap_width(overlap, groups.most())
        checks.check_temperature_value(float(temperature))
    local = launch.prepare(rows, setting)
    local_hubs = launch.prepare(hubs, setting)
    compared = local.table if keys is None else launch.prepare(keys, setting).table
    columns = gather_rows(compared, shares)
    stats, d_rows = launch.forward(
        local, columns, local_hubs.table, _in_32_bits(groups), setting,
        offset=shares.offset, with_gradient=keys is not None and with_gradient,
    )  # fmt: skip
    pairs = (groups.size - 1).sum()
    loss, figures = mean_over_ranks(stats[: launch.LOG], pairs, shares)
    kept = columns if keys is None else local.table
    changed = options.normalize or setting.plan.width != rows.shape[1]
    many = keys is None and shares.world_size > 1
    width = setting.plan.width
    return Forward(
        loss=loss,
        figures=figures,
        stats=stats,
        columns=kept if changed or many else rows.new_empty(0, width),
        hubs=local_hubs.table if changed else rows.new_empty(0, width),
        hub_length=local_hubs.length,
        d_rows=d_rows[:, : rows.shape[1]].contiguous(),
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
    options = dataclasses.replace(options, validate=False)
    groups, setting, shares = _prepare(rows, hubs, group, temperature, overlap, options)
    n, d = rows.shape
    groups = _in_32_bits(groups)
    changed = options.normalize or setting.plan.width != d
    many = student and shares.world_size > 1
    columns = saved.columns if changed or many else rows.contiguous()
    start = shares.offset if many else 0
    local = columns[start : start + n]
    local_hubs = launch.Rows(saved.hubs if changed else hubs.contiguous(), saved.hub_length)
    factor = (d_loss.float() * (shares.world_size / max(shares.total, 1))).reshape(1)
    d_hubs = launch.backward_hubs(
        local, local_hubs, groups, setting, saved.stats[launch.PULL], factor
    )
    d_beta = saved.stats[launch.D_BETA] * factor
    if student:
        stats = saved.stats.clone()
        statistics, factors = _statistics(stats, factor, setting, shares)
        d_rows = launch.backward(
            local, columns, local_hubs.table, groups, setting, stats, statistics, factors,
            offset=start,
        )[:, :d]  # fmt: skip
        d_beta = stats[launch.D_BETA]
    else:
        d_rows = saved.d_rows * factor
    tau = temperature.float()
    if temperature.device == rows.device:
        d_temperature = -(d_beta.sum() / tau.square())
    else:
        # A plain number: nobody asks for its gradient, and fetching it would wait for the GPU.
        d_temperature = torch.zeros_like(tau)
    return (
        d_rows.to(rows.dtype).contiguous(),
        d_hubs[:, :d].contiguous(),
        d_temperature.reshape(temperature.shape).to(temperature.dtype),
    )


def _prepare(
    rows: Tensor,
    hubs: Tensor,
    group: Tensor,
    temperature: Tensor,
    overlap: Tensor | None,
    options: Options,
) -> tuple[Groups, launch.Setting, Shares]:
    if overlap is not None:
        checks.check_table(*overlap.shape)
    groups = find_groups(group, hubs=hubs.shape[0], validate=options.validate)
    shares = find_shares(rows.shape[0], hubs.shape[0], device=rows.device, gather=options.gather)
    setting = launch.make_setting(
        rows,
        temperature,
        row_weights(groups, options.weight, images=shares.images, dtype=torch.float32),
        overlap,
        include_positive=options.include_positive,
        normalize=options.normalize,
    )
    return groups, setting, shares


def _statistics(
    stats: Tensor, factor: Tensor, setting: launch.Setting, shares: Shares
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Scale of the local rows, log2 and scale of all columns, and what partials are multiplied by.

    With several ranks every row's log-sum-exp and upstream factor travel: eight bytes. Scales are
    relative to this rank's factor, so that half-precision weights stay in range.
    """
    scale, log = stats[launch.SCALE], stats[launch.LOG]
    if shares.world_size == 1:
        return (scale, log, scale), (factor, factor)
    table = gather_rows(torch.stack([log, factor.expand_as(log)], dim=1), shares)
    reference = torch.where(factor == 0, 1.0, factor)
    logs = table[:, 0].contiguous()
    ratio = table[:, 1] / reference * setting.boost
    if launch.is_fixed(setting):
        ratio = ratio * torch.exp2(launch.exponent_scale(setting) - logs)
    column_scale = ratio.contiguous()
    own = column_scale[shares.offset : shares.offset + log.shape[0]]
    return (own, logs, column_scale), (reference, factor)


def _in_32_bits(groups: Groups) -> Groups:
    return Groups(
        starts=groups.starts.int(),
        image=groups.image.int(),
        first=groups.first.int(),
        end=groups.end.int(),
    )
