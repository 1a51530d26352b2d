"""Host side of the Triton kernels: buffers, grids and arguments; no arithmetic of the loss.

Every buffer is written in full by the kernel that owns it; `empty` is a seam where the tests fill
new buffers with NaN to prove that.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
from jaxtyping import Float
from torch import Tensor

from kernels import _contrastive_triton as device
from kernels import tuning
from kernels.distributed import RankLayout, means_of_sums, sum_over_ranks
from kernels.groups import BALANCE, Groups
from kernels.precision import DTYPES
from kernels.types import LossInputs

STATS = 9
"""Figures per row: the seven of `finish_rows`, then the row's length, then d loss / d tau."""
LOSS, SHARE, POSITIVE, COSINES, LOG, PULL, SCALE, LENGTH, D_TAU = range(STATS)

_COLDEST_FIXED = 0.03
_INTERPRETED_PROCESSORS = 6
_ALIGNED = 4
"""Numbers of four bytes in sixteen."""
_FIGURES_AT_ONCE = 1024

empty: Callable[..., Tensor] = torch.empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchConfig:
    """What is the same for all kernels of one step."""

    plan: tuning.Plan
    dtype: torch.dtype
    """Of the tables that are multiplied."""
    temperature: float
    """Of a learned one the bound that it is never below; 0 without one."""
    learned: Tensor | None
    """A temperature that lies on the device, so that the host need not wait for it."""
    weight: float
    """w_A; of balanced weights the factor that all rows share."""
    balanced: bool
    overlap: Float[Tensor, "n c"] | None
    include_positive: bool
    normalize: bool
    boost: float
    """Power of two that keeps half-precision weights of pairs from underflowing."""
    options: dict[str, Any]
    """Compile-time arguments shared by the kernels."""


class Rows(NamedTuple):
    """Rows as the kernels want them: contiguous, padded to the plan's width."""

    table: Float[Tensor, "n w"]
    length: Tensor
    """Lengths that the rows were divided by; empty if they were not."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operands:
    """What the kernels of a pass read: prepared tables, images of the rows, configuration."""

    rows: Rows
    """Local rows."""
    columns: Float[Tensor, "m w"]
    """What they are compared with, of all ranks."""
    hubs: Rows
    groups: Groups
    """Images of the local rows, int32."""
    config: LaunchConfig
    offset: int
    """Column of the first local row."""
    d_dtype: torch.dtype
    """Of the gradients: what the caller's rows have, however the tables were rounded."""

    @property
    def images(self) -> tuple[Tensor, Tensor, Tensor]:
        """Image, first row of it and first row after it, for each row."""
        return self.groups.image, self.groups.first, self.groups.end


class ColumnStats(NamedTuple):
    """What the student's backward pass knows of rows and columns beside their coordinates."""

    row_scale: Float[Tensor, " n"]
    """Scale of each local row."""
    column_log: Float[Tensor, " m"]
    """log2 of each column's own denominator."""
    column_scale: Float[Tensor, " m"]
    """Scale of each column."""
    far_factor: Float[Tensor, "1"]
    """What sums over other images are multiplied by."""
    own_factor: Float[Tensor, "1"]
    """What the own image and the hub are multiplied by."""


def is_interpreted() -> bool:
    """True if the kernels run in Triton's interpreter, on tensors of the CPU."""
    return not isinstance(device.log_sums, triton.JITFunction)


def make_launch_config(inputs: LossInputs, *, images: int) -> LaunchConfig:
    """Plan, precision and the arguments that all kernels share.

    Args:
        inputs: The step's inputs.
        images: Images on all ranks.
    """
    options = inputs.options
    return configure(
        inputs.rows,
        inputs.temperature,
        options.precision,
        weight=BALANCE * (images - 1) if options.balanced else options.intra_weight,
        balanced=options.balanced,
        overlap=None if inputs.overlap is None else inputs.overlap.float().contiguous(),
        include_positive=options.include_positive,
        normalize=options.normalize,
        coldest=options.coldest,
    )


def configure(
    rows: Tensor,
    temperature: Tensor,
    precision: str,
    *,
    weight: float = 1.0,
    balanced: bool = False,
    overlap: Tensor | None = None,
    include_positive: bool = False,
    normalize: bool = False,
    coldest: float = 0.0,
) -> LaunchConfig:
    """`make_launch_config` from its parts, for whoever has no step of the loss."""
    interpreted = is_interpreted()
    # A float arrives as float64 on the CPU; its value costs nothing to read.
    on_device = temperature.is_cuda or (interpreted and temperature.dtype == torch.float32)
    learned = temperature.float() if on_device else None
    element = precision if precision in tuning.HALF else "fp32"
    return LaunchConfig(
        plan=tuning.make_plan(rows.shape[1], element, capability(rows.device)),
        dtype=DTYPES[precision],
        temperature=coldest if learned is not None else float(temperature),
        learned=learned,
        weight=weight,
        balanced=balanced,
        overlap=overlap,
        include_positive=include_positive,
        normalize=normalize,
        boost=4096.0 if precision == "fp16" else 1.0,
        options={
            "LEARNED": learned is not None,
            "WIDEN": interpreted and precision == "bf16",
            "PRECISION": "tf32x3" if precision == "fp32" else "tf32",
        },
    )


def is_fixed(config: LaunchConfig) -> bool:
    """True if exponents are relative to the largest possible one, not to a running maximum."""
    return config.temperature >= _COLDEST_FIXED


def exponent_scale(config: LaunchConfig) -> float | Tensor:
    """log2(e) / temperature; a tensor where that is learned."""
    return math.log2(math.e) / (
        config.temperature if config.learned is None else config.learned.reshape(())
    )


@functools.cache
def _device_facts(index: int) -> tuple[int, int]:
    facts = torch.cuda.get_device_properties(index)
    return facts.major * 10 + facts.minor, facts.multi_processor_count


def capability(where: torch.device) -> int:
    """Compute capability times ten; 90 in the interpreter."""
    return _device_facts(where.index or 0)[0] if where.type == "cuda" else 90


def _processors(where: torch.device) -> int:
    # A small number in the interpreter, so that small tests meet one and several splits.
    return _device_facts(where.index or 0)[1] if where.type == "cuda" else _INTERPRETED_PROCESSORS


def padded_length(count: int) -> int:
    """A row of figures ends at 16 bytes, so that the next one compiles no kernel of its own."""
    return -(-count // _ALIGNED) * _ALIGNED


def image_tables(group: Tensor, *, hubs: int) -> Tensor:
    """`find_groups` in one launch: starts, image, first and end in one table, for `as_groups`."""
    n = group.shape[0]
    # The kernel fills the few numbers between the parts too: what an operation gives back may not
    # hold stray memory.
    table = torch.empty(
        padded_length(hubs + 1) + 3 * padded_length(n), dtype=torch.int32, device=group.device
    )
    if n == 0:
        return table.zero_()
    groups = as_groups(table, n, hubs=hubs)
    device.find_images[(1,)](
        group.contiguous(), groups.starts, groups.image, groups.first, groups.end, n, hubs,
        padded_length(n), padded_length(hubs + 1), BLOCK=_FIGURES_AT_ONCE, num_warps=8,
    )  # fmt: skip
    return table


def as_groups(table: Tensor, n: int, *, hubs: int) -> Groups:
    """Views of what `image_tables` made."""
    start, step = padded_length(hubs + 1), padded_length(n)
    image, first, end = (table[start + k * step : start + k * step + n] for k in range(3))
    return Groups(starts=table[: hubs + 1], image=image, first=first, end=end)


def mean_figures(stats: Tensor, groups: Groups, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """Loss and figures [3], means over the rows of all ranks, of the figures of the local rows."""
    n, whole = groups.image.shape[0], layout.world_size == 1
    loss = torch.empty((), dtype=torch.float32, device=stats.device)
    figures = empty(3, dtype=torch.float32, device=stats.device)
    sums = empty(5, dtype=torch.float32, device=stats.device)
    if layout.total == 0:
        return loss.zero_(), figures.zero_()
    device.sum_figures[(1,)](
        stats, groups.first, groups.end, sums, loss, figures, n, stats.shape[1], layout.total,
        BLOCK=_FIGURES_AT_ONCE, WHOLE=whole, num_warps=8,
    )  # fmt: skip
    return (loss, figures) if whole else means_of_sums(sum_over_ranks(sums, layout), layout)


def prepare(rows: Tensor, config: LaunchConfig) -> Rows:
    """Rows divided by their lengths if asked, rounded, and padded to the plan's width."""
    n, d = rows.shape
    width = config.plan.width
    rows = rows.contiguous()
    if not config.normalize:
        lengths = rows.new_empty(0, dtype=torch.float32)
        if d == width:
            return Rows(rows.to(config.dtype), lengths)
        padded = rows.new_zeros(n, width, dtype=config.dtype)
        padded[:, :d] = rows
        return Rows(padded, lengths)
    table = empty(n, width, dtype=config.dtype, device=rows.device)
    length = empty(n, dtype=torch.float32, device=rows.device)
    block = max(1, 4096 // triton.next_power_of_2(width))
    if n:
        device.normalize_rows[(triton.cdiv(n, block),)](
            rows, table, length, n,
            D=d, D_OUT=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_N=block, num_warps=4,
        )  # fmt: skip
    return Rows(table, length)


def forward(operands: Operands, *, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Figures of each row, [STATS, n], and with fixed keys the gradient by the rows, else [0, w].

    Args:
        operands: Rows, columns, hubs and their images.
        with_gradient: Columns are fixed keys: finish the gradient here.
    """
    rows, columns, config = operands.rows.table, operands.columns, operands.config
    n, width = rows.shape
    stats = empty(STATS, padded_length(n), dtype=torch.float32, device=rows.device)
    none = rows.new_empty(0, width, dtype=operands.d_dtype)
    if n == 0:
        return stats, none
    if with_gradient:
        return stats, _teacher_gradient(operands, stats)
    fixed = is_fixed(config)
    if fixed and _meet_once(operands):
        sums = peaks = _symmetric_sums(operands)
    else:
        own = (operands.groups.first, operands.groups.end)
        sums, peaks = row_sums(rows, columns, own, config, offset=operands.offset, fixed=fixed)
    _finish_rows(operands, stats, (sums, peaks), fixed=fixed)
    return stats, none


def row_sums(
    rows: Float[Tensor, "n w"],
    columns: Float[Tensor, "m w"],
    own: tuple[Tensor, Tensor],
    config: LaunchConfig,
    *,
    offset: int = 0,
    fixed: bool,
) -> tuple[Float[Tensor, "s n"], Float[Tensor, "s n"]]:
    """Sums of each row over other groups' columns and their peaks, one for each column split.

    Args:
        rows: Prepared rows, at least one.
        columns: Prepared columns, at least one.
        own: First column of each row's own group, and the first after it; less the offset.
        config: What all kernels share.
        offset: Column of the first row.
        fixed: Exponents are relative to the largest possible one; the peaks are then not set.
    """
    n, m, tile = rows.shape[0], columns.shape[0], config.plan.sums
    grid = grid_of(n, m, tile, rows.device)
    sums = empty(grid[1], n, dtype=torch.float32, device=rows.device)
    peaks = sums if fixed else torch.empty_like(sums)
    device.log_sums[grid](
        rows, columns, *own, config.learned, sums, peaks, n, m, offset, config.temperature,
        FIXED=fixed, **widths_of(config), **blocks_of(tile), **config.options,
    )  # fmt: skip
    return sums, peaks


def _teacher_gradient(operands: Operands, stats: Tensor) -> Tensor:
    """Figures of each row, and its gradient: keys are fixed, so both come out of one walk."""
    rows, columns, config = operands.rows.table, operands.columns, operands.config
    n, m, tile = rows.shape[0], columns.shape[0], config.plan.means
    # In half precision the shares of a fixed exponent would underflow.
    fixed = is_fixed(config) and config.dtype != torch.float16
    grid = grid_of(n, m, tile, rows.device)
    sums = empty(grid[1], n, dtype=torch.float32, device=rows.device)
    peaks = sums if fixed else torch.empty_like(sums)
    partial = empty(grid[1], *rows.shape, dtype=torch.float32, device=rows.device)
    for part in parts_of(config, tile):
        device.mean_columns[grid](
            rows, columns, operands.groups.first, operands.groups.end, config.learned, sums, peaks,
            partial, n, m, operands.offset, config.temperature, config.boost,
            FIXED=fixed, **part, **widths_of(config), **config.options,
        )  # fmt: skip
    _finish_rows(operands, stats, (sums, peaks), fixed=fixed)
    parts = (partial, peaks)
    return _finish_gradient(operands, stats, parts, stats[D_TAU], factors=None, fixed=fixed)


def _meet_once(operands: Operands) -> bool:
    """True if rows are compared with themselves, enough of them for each pair to meet once."""
    rows, columns = operands.rows.table, operands.columns
    if rows.data_ptr() != columns.data_ptr() or rows.shape != columns.shape:
        return False
    plan, processors = operands.config.plan, _processors(rows.device)
    row_tiles = triton.cdiv(rows.shape[0], plan.sums.rows)
    # Partial sums of all distances may not outgrow the table of rows.
    is_small = tuning.shared_distances(row_tiles) <= plan.width
    return is_small and tuning.is_once_cheaper(row_tiles, plan.sums, processors=processors)


def _symmetric_sums(operands: Operands) -> Tensor:
    """Partial sums of each row, [splits + shared distances, n]; each tile is formed once."""
    rows, config = operands.rows.table, operands.config
    n, tile = rows.shape[0], config.plan.sums
    row_tiles = triton.cdiv(n, tile.rows)
    steps = tuning.steps_once(row_tiles, tile)
    splits = tuning.choose_splits(row_tiles, steps, processors=_processors(rows.device))
    parts = splits + tuning.shared_distances(row_tiles)
    sums = empty(parts, n, dtype=torch.float32, device=rows.device)
    device.symmetric_sums[(row_tiles, splits)](
        rows, operands.groups.first, operands.groups.end, config.learned, sums, n, splits,
        config.temperature, **widths_of(config), **blocks_of(tile), **config.options,
    )  # fmt: skip
    return sums


def backward(operands: Operands, stats: Tensor, of_columns: ColumnStats) -> tuple[Tensor, Tensor]:
    """Gradient by the student's rows, and each row's part of that by the temperature.

    Args:
        operands: As in the forward pass.
        stats: Figures of the local rows.
        of_columns: Statistics of the rows of all ranks.
    """
    rows, columns, config = operands.rows.table, operands.columns, operands.config
    n, width = rows.shape
    d_tau = empty(n, dtype=torch.float32, device=rows.device)
    if n == 0:
        return rows.new_empty(0, width, dtype=operands.d_dtype), d_tau
    own = (operands.groups.first, operands.groups.end)
    scales = (
        stats[LOG], of_columns.row_scale, of_columns.column_log, of_columns.column_scale,
    )  # fmt: skip
    partial = pair_partials(
        rows, columns, own, config, scales, offset=operands.offset, fixed=is_fixed(config)
    )
    factors = (of_columns.far_factor, of_columns.own_factor)
    return _finish_gradient(operands, stats, (partial, partial), d_tau, factors=factors), d_tau


def pair_partials(
    rows: Float[Tensor, "n w"],
    columns: Float[Tensor, "m w"],
    own: tuple[Tensor, Tensor],
    config: LaunchConfig,
    scales: tuple[Tensor, Tensor, Tensor, Tensor],
    *,
    offset: int = 0,
    fixed: bool,
) -> Float[Tensor, "s n w"]:
    """Gradient by the rows over other groups' columns, in both roles; one for each column split.

    Args:
        rows: As in `row_sums`.
        columns: Likewise.
        own: Likewise.
        config: Likewise.
        scales: log2 of each row's sum and its scale, then of each column.
        offset: As in `row_sums`.
        fixed: Likewise.
    """
    n, m = rows.shape[0], columns.shape[0]
    tile = config.plan.pairs if fixed else config.plan.online_pairs
    grid = grid_of(n, m, tile, rows.device)
    partial = empty(grid[1], *rows.shape, dtype=torch.float32, device=rows.device)
    for part in parts_of(config, tile):
        device.pair_gradient[grid](
            rows, columns, *own, config.learned, *scales, partial, n, m, offset,
            config.temperature, FIXED=fixed, **part, **widths_of(config), **config.options,
        )  # fmt: skip
    return partial


def backward_hubs(operands: Operands, pull: Tensor, factor: Tensor) -> Tensor:
    """Gradient by the hubs, in the order of the rows, so the bits are the same every time."""
    hubs, config = operands.hubs, operands.config
    b, width = hubs.table.shape
    d_hubs = empty(b, width, dtype=operands.d_dtype, device=hubs.table.device)
    if b:
        device.hub_gradient[(b,)](
            operands.rows.table, hubs.table, operands.groups.starts, pull, config.learned, factor,
            hubs.length, d_hubs, config.temperature,
            D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_N=16,
            NORMALIZE=config.normalize, LEARNED=config.options["LEARNED"], num_warps=4,
        )  # fmt: skip
    return d_hubs


def _finish_rows(
    operands: Operands, stats: Tensor, parts: tuple[Tensor, Tensor], *, fixed: bool
) -> None:
    config, rows = operands.config, operands.rows.table
    tile, n = config.plan.finish, rows.shape[0]
    device.finish_rows[(triton.cdiv(n, tile.rows),)](
        rows, operands.columns, operands.hubs.table, *operands.images, config.overlap,
        config.learned, *parts, operands.rows.length, stats, n, operands.offset,
        _table_width(config), parts[0].shape[0], stats.shape[1], config.temperature, config.boost,
        config.weight, BALANCED=config.balanced, NORMALIZE=config.normalize,
        FIXED=fixed, HAS_OVERLAP=config.overlap is not None,
        INCLUDE_POSITIVE=config.include_positive, **widths_of(config),
        **blocks_of(tile, staged=False), **config.options,
    )  # fmt: skip


def _finish_gradient(
    operands: Operands,
    stats: Tensor,
    parts: tuple[Tensor, Tensor],
    d_tau: Tensor,
    *,
    factors: tuple[Tensor, Tensor] | None,
    fixed: bool = False,
) -> Tensor:
    config, rows = operands.config, operands.rows.table
    tile = config.plan.finish
    n, width = rows.shape
    d_rows = empty(n, width, dtype=operands.d_dtype, device=rows.device)
    device.finish_gradient[(triton.cdiv(n, tile.rows),)](
        rows, operands.columns, operands.hubs.table, *operands.images, config.overlap,
        config.learned, stats[LOG], stats[PULL], *parts, *(factors or (None, None)),
        stats[LENGTH], d_rows, d_tau, n, operands.offset, _table_width(config),
        parts[0].shape[0], config.temperature, config.boost, config.weight,
        BALANCED=config.balanced, STUDENT=factors is not None, FIXED=fixed,
        HAS_OVERLAP=config.overlap is not None, NORMALIZE=config.normalize, **widths_of(config),
        **blocks_of(tile, staged=False), **config.options,
    )  # fmt: skip
    return d_rows


def grid_of(rows: int, columns: int, tile: tuning.Tile, where: torch.device) -> tuple[int, int]:
    """Row tiles and column splits of a heavy kernel."""
    row_tiles = triton.cdiv(rows, tile.rows)
    splits = tuning.choose_splits(
        row_tiles, triton.cdiv(columns, tile.columns), processors=_processors(where)
    )
    return row_tiles, splits


def widths_of(config: LaunchConfig) -> dict[str, int]:
    """The two powers of two that a row is cut into."""
    return {"D0": config.plan.widths[0], "D1": config.plan.widths[1]}


def blocks_of(tile: tuning.Tile, *, staged: bool = True) -> dict[str, int]:
    """A tile as compile-time arguments and launch options."""
    blocks = {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "num_warps": tile.warps}
    return blocks | ({"STAGES": tile.stages} if staged else {})


def parts_of(config: LaunchConfig, tile: tuning.Tile) -> list[dict[str, int]]:
    """`blocks_of` for each launch of a kernel that sums columns, and which part of them it sums."""
    return [{"PART": part, **blocks_of(each)} for part, each in config.plan.launches(tile)]


def _table_width(config: LaunchConfig) -> int:
    return 0 if config.overlap is None else config.overlap.shape[1]
