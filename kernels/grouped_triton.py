"""Row-wise log-sum-exp of two tables by the loss's heavy kernels: buffers, grids, arguments.

Rows walk columns; whoever wants the gradient by the columns calls with the tables exchanged.
"""

import dataclasses
import math

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from kernels import _grouped_triton as device
from kernels import triton_launch as launch
from kernels.pairs import Pairs
from kernels.triton_launch import LaunchConfig

_NOTHING = -1.0e30
"""As in the device code: the logarithm of an empty sum, base 2."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meeting:
    """Rows that walk columns, prepared for the kernels."""

    rows: Float[Tensor, "n w"]
    columns: Float[Tensor, "m w"]
    pairs: Pairs
    config: LaunchConfig
    is_unit: bool
    """Rows and columns have unit length, so that the largest exponent is known."""

    @property
    def is_fixed(self) -> bool:
        """Exponents are relative to the largest possible one."""
        return self.is_unit and launch.is_fixed(self.config)


def prepare(table: Tensor, config: LaunchConfig) -> Tensor:
    """A table rounded and padded as the kernels want it."""
    return launch.prepare(table, config).table


def log_sums(meeting: Meeting) -> Float[Tensor, " n"]:
    """Log-sum-exp of each row, nats; -inf where nothing is summed up."""
    rows, columns, config = meeting.rows, meeting.columns, meeting.config
    n, m = rows.shape[0], columns.shape[0]
    if not (n and m):
        return rows.new_full((n,), -torch.inf, dtype=torch.float32)
    fixed, pairs = meeting.is_fixed, _in_32_bits(meeting.pairs)
    sums, peaks = launch.row_sums(rows, columns, (pairs.first, pairs.end), config, fixed=fixed)
    log = launch.empty(n, dtype=torch.float32, device=rows.device)
    tile = config.plan.finish
    device.finish_grouped_rows[(triton.cdiv(n, tile.rows),)](
        rows, columns, pairs.first, pairs.end, pairs.itself, pairs.forth, config.learned, sums,
        peaks, log, n, _table_width(pairs), sums.shape[0], config.temperature, _log2(pairs.weight),
        FIXED=fixed, HAS_TABLE=pairs.forth is not None, HAS_SELF=pairs.itself is not None,
        **launch.widths_of(config), **launch.blocks_of(tile, staged=False), **config.options,
    )  # fmt: skip
    return torch.where(log < 0.5 * _NOTHING, -torch.inf, log * math.log(2))


def gradient(
    meeting: Meeting,
    *,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "n w"]:
    """Gradient by the rows of sum_i weight_i log_sum_i, in the roles whose statistics are given.

    Args:
        meeting: As in the forward pass.
        rows: (log_sum in nats, weight) of the rows; None if they are compared with nothing.
        columns: The same of the columns.
    """
    table, config = meeting.rows, meeting.config
    n, m = table.shape[0], meeting.columns.shape[0]
    if not (n and m):
        return torch.zeros_like(table, dtype=torch.float32)
    weights = [pair[1] for pair in (rows, columns) if pair is not None and pair[1].numel()]
    # Relative to the largest, half-precision weights of pairs stay in range.
    largest = torch.stack([weight.abs().amax() for weight in weights]).amax().float()
    factor = torch.where(largest == 0, 1.0, largest).reshape(1)
    row_log, row_weight = _relative(rows, factor, n, table.device)
    column_log, column_weight = _relative(columns, factor, m, table.device)
    pairs = _in_32_bits(meeting.pairs)
    partial = launch.pair_partials(
        table, meeting.columns, (pairs.first, pairs.end), config,
        (row_log, _scale(row_log, row_weight, meeting),
         column_log, _scale(column_log, column_weight, meeting)),
        fixed=meeting.is_fixed,
    )  # fmt: skip
    d_rows = launch.empty(*table.shape, dtype=torch.float32, device=table.device)
    tile = config.plan.finish
    device.finish_grouped_gradient[(triton.cdiv(n, tile.rows),)](
        table, meeting.columns, pairs.first, pairs.end, pairs.itself, pairs.place, pairs.forth,
        pairs.back, config.learned, row_log, row_weight, column_log, column_weight, factor,
        partial, d_rows, n, _table_width(pairs), partial.shape[0],
        config.temperature, _log2(pairs.weight), config.boost,
        AS_ROW=rows is not None, AS_COLUMN=columns is not None, HAS_TABLE=_table_width(pairs) > 0,
        HAS_SELF=pairs.itself is not None, **launch.widths_of(config),
        **launch.blocks_of(tile, staged=False), **config.options,
    )  # fmt: skip
    return d_rows


def _relative(
    pair: tuple[Tensor, Tensor] | None, factor: Tensor, count: int, where: torch.device
) -> tuple[Tensor, Tensor]:
    """log2 of the sums and weights by the factor; who has none gets an infinite sum."""
    if pair is None:
        none = torch.zeros(count, dtype=torch.float32, device=where)
        return torch.full_like(none, -_NOTHING), none
    log = torch.where(pair[0] == -torch.inf, -_NOTHING, pair[0].float() / math.log(2))
    return log.contiguous(), (pair[1].float() / factor).contiguous()


def _scale(log: Tensor, weight: Tensor, meeting: Meeting) -> Tensor:
    scale = weight * meeting.config.boost
    if meeting.is_fixed:
        scale = scale * torch.exp2(launch.exponent_scale(meeting.config) - log)
    return scale


def _in_32_bits(pairs: Pairs) -> Pairs:
    """As the kernels read them."""

    def whole(values: Tensor) -> Tensor:
        return values.int().contiguous()

    def table(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.float().contiguous()

    return dataclasses.replace(
        pairs,
        first=whole(pairs.first),
        end=whole(pairs.end),
        itself=None if pairs.itself is None else whole(pairs.itself),
        place=whole(pairs.place),
        forth=table(pairs.forth),
        back=table(pairs.back),
    )


def _table_width(pairs: Pairs) -> int:
    table = pairs.forth if pairs.forth is not None else pairs.back
    return 0 if table is None else table.shape[1]


def _log2(weight: float) -> float:
    return math.log2(weight) if weight > 0 else _NOTHING
