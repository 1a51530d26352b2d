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
from kernels.groups import Groups

STATS = 9
"""Figures per row: the seven of `finish_rows`, then the row's length, then d loss / d beta."""
LOSS, SHARE, POSITIVE, COSINES, LOG, PULL, SCALE, LENGTH, D_BETA = range(STATS)

_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_COLDEST_FIXED = 0.03
_INTERPRETED_PROCESSORS = 6

empty: Callable[..., Tensor] = torch.empty


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all kernels of one step."""

    plan: tuning.Plan
    temperature: float
    """Read where `learned` is None."""
    learned: Tensor | None
    """A temperature that lies on the device, so that the host need not wait for it."""
    weight: Float[Tensor, " n"]
    """w_A of each row."""
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


def is_interpreted() -> bool:
    """True if the kernels run in Triton's interpreter, on tensors of the CPU."""
    return not isinstance(device.log_sums, triton.JITFunction)


def make_setting(
    rows: Tensor,
    temperature: Tensor,
    weight: Float[Tensor, " n"],
    overlap: Tensor | None,
    *,
    include_positive: bool,
    normalize: bool,
) -> Setting:
    """Plan, precision and the arguments that all kernels share."""
    interpreted = is_interpreted()
    # A float arrives as float64 on the CPU; its value costs nothing to read.
    on_device = temperature.is_cuda or (interpreted and temperature.dtype == torch.float32)
    learned = temperature.float() if on_device else None
    exact = torch.get_float32_matmul_precision() == "highest"
    return Setting(
        plan=tuning.make_plan(rows.shape[1], _NAMES[rows.dtype], capability(rows.device)),
        temperature=1.0 if learned is not None else float(temperature),
        learned=learned,
        weight=weight,
        overlap=None if overlap is None else overlap.float().contiguous(),
        include_positive=include_positive,
        normalize=normalize,
        boost=4096.0 if rows.dtype == torch.float16 else 1.0,
        options={
            "LEARNED": learned is not None,
            "WIDEN": interpreted and rows.dtype == torch.bfloat16,
            "PRECISION": "tf32x3" if exact and rows.dtype == torch.float32 else "tf32",
        },
    )


def is_fixed(setting: Setting) -> bool:
    """True if exponents are relative to the largest possible one, not to a running maximum."""
    return setting.learned is None and setting.temperature >= _COLDEST_FIXED


def exponent_scale(setting: Setting) -> float:
    """log2(e) / temperature, for a temperature that the host knows."""
    return math.log2(math.e) / setting.temperature


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


def prepare(rows: Tensor, setting: Setting) -> Rows:
    """Rows divided by their lengths if asked, and padded to the plan's width."""
    n, d = rows.shape
    width = setting.plan.width
    rows = rows.contiguous()
    if not setting.normalize:
        if d == width:
            return Rows(rows, rows.new_empty(0, dtype=torch.float32))
        padded = rows.new_zeros(n, width)
        padded[:, :d] = rows
        return Rows(padded, rows.new_empty(0, dtype=torch.float32))
    table = empty(n, width, dtype=rows.dtype, device=rows.device)
    length = empty(n, dtype=torch.float32, device=rows.device)
    block = max(1, 4096 // triton.next_power_of_2(width))
    if n:
        device.normalize_rows[(triton.cdiv(n, block),)](
            rows, table, length, n,
            D=d, D_OUT=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_N=block, num_warps=4,
        )  # fmt: skip
    return Rows(table, length)


def forward(
    prepared: Rows,
    columns: Tensor,
    hubs: Tensor,
    groups: Groups,
    setting: Setting,
    *,
    offset: int,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Figures of each row, [STATS, n], and with fixed keys the gradient by the rows, else [0, w].

    Args:
        prepared: Local rows.
        columns: Prepared columns of all ranks.
        hubs: Prepared hubs.
        groups: Images of the local rows, int32.
        setting: As made by `make_setting`.
        offset: Column of the first local row.
        with_gradient: Columns are fixed keys: finish the gradient here.
    """
    rows = prepared.table
    n, width = rows.shape
    stats = empty(STATS, n, dtype=torch.float32, device=rows.device)
    none = rows.new_empty(0, width)
    if n == 0:
        return stats, none
    # Two rows are filled by other passes, or not at all: what an operation gives back may not hold
    # stray memory, or two calls differ.
    stats[LENGTH:] = 0.0
    if setting.normalize:
        stats[LENGTH] = prepared.length
    fixed = is_fixed(setting) and not with_gradient
    tile = setting.plan.means if with_gradient else setting.plan.sums
    grid = _grid(n, columns.shape[0], tile, rows.device)
    sums = empty(grid[1], n, dtype=torch.float32, device=rows.device)
    peaks = sums if fixed else torch.empty_like(sums)
    common = (groups.first, groups.end, setting.learned)
    walk = {**_widths(setting), **_blocks(tile), **setting.options}
    partial = sums
    if with_gradient:
        partial = empty(grid[1], n, width, dtype=torch.float32, device=rows.device)
        device.mean_columns[grid](
            rows, columns, *common, sums, peaks, partial, n, columns.shape[0], offset,
            setting.temperature, setting.boost, **walk,
        )  # fmt: skip
    else:
        device.log_sums[grid](
            rows, columns, *common, sums, peaks, n, columns.shape[0], offset,
            setting.temperature, FIXED=fixed, **walk,
        )  # fmt: skip
    _finish_rows(rows, columns, hubs, groups, setting, stats, (sums, peaks), offset, fixed)
    if not with_gradient:
        return stats, none
    d_rows = _finish_gradient(
        rows, columns, hubs, groups, setting, stats, (partial, peaks), offset, None
    )
    return stats, d_rows


def backward(
    rows: Tensor,
    columns: Tensor,
    hubs: Tensor,
    groups: Groups,
    setting: Setting,
    stats: Tensor,
    statistics: tuple[Tensor, Tensor, Tensor],
    factors: tuple[Tensor, Tensor],
    *,
    offset: int,
) -> Tensor:
    """Gradient by the student's rows; d loss / d beta is left in `stats[D_BETA]`.

    Args:
        rows: Prepared local rows.
        columns: Prepared rows of all ranks.
        hubs: Prepared hubs.
        groups: Images of the local rows, int32.
        setting: As in the forward pass.
        stats: Figures of the local rows; a copy, D_BETA is written.
        statistics: Scale of the local rows; log2 and scale of all columns.
        factors: What sums over other images, and what the own image and hub are multiplied by.
        offset: Column of the first local row.
    """
    n, width = rows.shape
    if n == 0:
        return rows.new_empty(0, width)
    row_scale, column_log, column_scale = statistics
    fixed = is_fixed(setting)
    tile = setting.plan.pairs if fixed else setting.plan.online_pairs
    grid = _grid(n, columns.shape[0], tile, rows.device)
    partial = empty(grid[1], n, width, dtype=torch.float32, device=rows.device)
    device.pair_gradient[grid](
        rows, columns, groups.first, groups.end, setting.learned, stats[LOG], row_scale,
        column_log, column_scale, partial, n, columns.shape[0], offset, setting.temperature,
        FIXED=fixed, **_widths(setting), **_blocks(tile), **setting.options,
    )  # fmt: skip
    return _finish_gradient(
        rows, columns, hubs, groups, setting, stats, (partial, partial), offset, factors
    )


def backward_hubs(
    rows: Tensor, hubs: Rows, groups: Groups, setting: Setting, pull: Tensor, factor: Tensor
) -> Tensor:
    """Gradient by the hubs, in the order of the rows, so the bits are the same every time."""
    b, width = hubs.table.shape
    d_hubs = empty(b, width, dtype=hubs.table.dtype, device=rows.device)
    if b:
        device.hub_gradient[(b,)](
            rows, hubs.table, groups.starts, pull, setting.learned, factor, hubs.length, d_hubs,
            setting.temperature,
            D=width, BLOCK_D=triton.next_power_of_2(width), BLOCK_N=16,
            NORMALIZE=setting.normalize, LEARNED=setting.options["LEARNED"], num_warps=4,
        )  # fmt: skip
    return d_hubs


def _finish_rows(
    rows: Tensor,
    columns: Tensor,
    hubs: Tensor,
    groups: Groups,
    setting: Setting,
    stats: Tensor,
    parts: tuple[Tensor, Tensor],
    offset: int,
    fixed: bool,
) -> None:
    tile = setting.plan.finish
    n = rows.shape[0]
    device.finish_rows[(triton.cdiv(n, tile.rows),)](
        rows, columns, hubs, groups.image, groups.first, groups.end, setting.weight,
        setting.overlap, setting.learned, *parts, stats, n, offset, _table_width(setting),
        parts[0].shape[0], setting.temperature, setting.boost,
        FIXED=fixed, HAS_OVERLAP=setting.overlap is not None,
        INCLUDE_POSITIVE=setting.include_positive, **_widths(setting),
        **_blocks(tile, staged=False), **setting.options,
    )  # fmt: skip


def _finish_gradient(
    rows: Tensor,
    columns: Tensor,
    hubs: Tensor,
    groups: Groups,
    setting: Setting,
    stats: Tensor,
    parts: tuple[Tensor, Tensor],
    offset: int,
    factors: tuple[Tensor, Tensor] | None,
) -> Tensor:
    tile = setting.plan.finish
    n, width = rows.shape
    d_rows = empty(n, width, dtype=rows.dtype, device=rows.device)
    device.finish_gradient[(triton.cdiv(n, tile.rows),)](
        rows, columns, hubs, groups.image, groups.first, groups.end, setting.weight,
        setting.overlap, setting.learned, stats[LOG], stats[PULL], *parts,
        *(factors or (None, None)), stats[LENGTH], d_rows, stats[D_BETA], n, offset,
        _table_width(setting), parts[0].shape[0], setting.temperature, setting.boost,
        STUDENT=factors is not None,
        HAS_OVERLAP=setting.overlap is not None, NORMALIZE=setting.normalize, **_widths(setting),
        **_blocks(tile, staged=False), **setting.options,
    )  # fmt: skip
    return d_rows


def _grid(rows: int, columns: int, tile: tuning.Tile, where: torch.device) -> tuple[int, int]:
    row_tiles = triton.cdiv(rows, tile.rows)
    splits = tuning.choose_splits(
        row_tiles, triton.cdiv(columns, tile.columns), processors=_processors(where)
    )
    return row_tiles, splits


def _widths(setting: Setting) -> dict[str, int]:
    return {"D0": setting.plan.widths[0], "D1": setting.plan.widths[1]}


def _blocks(tile: tuning.Tile, *, staged: bool = True) -> dict[str, int]:
    blocks = {"BLOCK_N": tile.rows, "BLOCK_M": tile.columns, "num_warps": tile.warps}
    return blocks | ({"STAGES": tile.stages} if staged else {})


def _table_width(setting: Setting) -> int:
    return 0 if setting.overlap is None else setting.overlap.shape[1]
