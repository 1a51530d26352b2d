"""Sizes -> tiles, warps, pipeline stages and column splits; pure functions of what the host knows.

Nothing is timed at run time: the same sizes on the same chip always take the same path, so the
bits of a result do not depend on a stopwatch.
"""

import dataclasses

HALF = ("bf16", "fp16")
"""Element types of two bytes, as Triton spells them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tile:
    """Block sizes and launch options of one kernel."""

    rows: int
    columns: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Tiles of all five kernels for one width, element type and chip."""

    widths: tuple[int, int]
    """The padded width as two powers of two (the second may be 0): 384 is 256 + 128."""
    sums: Tile
    means: Tile
    pairs: Tile
    online_pairs: Tile
    """Pairs with two exponentials each, for temperatures that are cold or learned."""
    finish: Tile
    second_warps: int = 8
    """Of the second launch where a row's sums are made in two."""

    def launches(self, tile: Tile) -> list[tuple[int, Tile]]:
        """PART and tile of each launch of a kernel that sums columns: whole rows, or in two parts.

        Wider sums than 512 do not fit the registers beside anything else (decision 0110).
        """
        if self.width <= WIDEST_SUM:
            return [(0, tile)]
        return [(1, tile), (2, dataclasses.replace(tile, warps=self.second_warps))]

    @property
    def width(self) -> int:
        """Padded width of a row."""
        return sum(self.widths)


MAX_WIDTH = 768
"""Wider rows go to the chunked backend: their gradient tile does not fit the registers."""

WIDEST_SUM = 512
"""Kernels that sum columns do so in two launches for wider rows, each half of the coordinates."""

MAX_SINGLE_WIDTH = 256
"""The same for float32, whose `mean_columns` spills 1.5 KB a thread at 384."""


def split_width(d: int) -> tuple[int, int]:
    """Two powers of two, 16 or more, whose sum is the least that is not below `d`.

    Args:
        d: Width of the rows; 384 gives (256, 128), 256 gives (256, 0), 24 gives (32, 0).
    """
    powers = [16 << k for k in range(11)]
    pairs = [(a, b) for a in powers for b in (0, *powers) if b < a]
    return min((pair for pair in pairs if sum(pair) >= d), key=lambda pair: (sum(pair), pair[1]))


def make_plan(d: int, dtype: str, capability: int) -> Plan:
    """Tiles for rows of width `d`.

    Args:
        d: Width of the rows, at most MAX_WIDTH.
        dtype: "bf16", "fp16" or "fp32".
        capability: Compute capability times ten, e.g. 90.

    Source: the registers, spills and shared memory that the compiler reports for each
    (docs/kernels.md); tests/kernels/test_compiles.py reads them from the cubins again.
    """
    widths = split_width(d)
    table = _half_tiles if dtype in HALF else _single_tiles
    sums, means, pairs = table(sum(widths), capability)
    finish = Tile(rows=16, columns=32, warps=4 if sum(widths) <= 128 else 8, stages=1)
    if sum(widths) in (64, 256):
        # 32 columns spill 8 bytes a thread: at 64 on sm_90; at 256 with eight warps on sm_80, whose
        # aim is 128 registers, with four on sm_90, and in float32 on sm_100 with either.
        finish = dataclasses.replace(finish, columns=16)
    # With two exponentials 64 columns spill 24 bytes a thread at 384 on sm_90 (Triton 3.9).
    online = dataclasses.replace(pairs, columns=32) if sum(widths) > 256 else pairs
    return Plan(
        widths=widths, sums=sums, means=means, pairs=pairs, online_pairs=online, finish=finish,
        second_warps=4 if 90 <= capability < 100 else 8,
    )  # fmt: skip


def _half_tiles(width: int, capability: int) -> tuple[Tile, Tile, Tile]:
    """Tiles of log_sums, mean_columns and pair_gradient for two-byte elements."""
    small = Tile(rows=64, columns=32, warps=8, stages=2)
    if width > 384:
        # With 32 columns the teacher's products are waited for one by one on sm_90.
        is_square = width <= WIDEST_SUM and 90 <= capability < 100
        tile = dataclasses.replace(small, columns=64) if is_square else small
        return dataclasses.replace(small, warps=4), tile, tile
    if capability < 90 or capability >= 110:
        sums = Tile(rows=64, columns=64, warps=4, stages=2)
        return sums, small, small
    large = Tile(rows=128, columns=64, warps=8, stages=2)
    square = dataclasses.replace(large, rows=64)
    is_hopper = capability < 100
    if width > 256:
        # On 64 rows eight warps of sm_90 compute the first product twice and wait for each wgmma.
        wide = dataclasses.replace(large, columns=32) if is_hopper else square
        return large, wide, wide
    if width > 192 and is_hopper:
        # The third stage starts the loads of a tile before the exponentials of the one before.
        early = dataclasses.replace(large, stages=3)
        return early, early, early
    widest = dataclasses.replace(large, columns=128)
    return widest, (large if is_hopper else square), large


def _single_tiles(width: int, capability: int) -> tuple[Tile, Tile, Tile]:
    """The same for float32, as TF32; elements are twice as wide, so tiles are smaller."""
    small = Tile(rows=64 if width <= 128 else 32, columns=32, warps=8, stages=2)
    return small, small, small


_ONCE = 1.5
"""What a tile costs that serves its columns too, in tiles that do not: by the instructions of both
loops (decision 0111), not by a clock."""


def steps_once(row_tiles: int, tile: Tile) -> int:
    """Column tiles that a row tile walks where each pair of row tiles meets once."""
    return (row_tiles // 2 + 1) * (tile.rows // tile.columns)


def shared_distances(row_tiles: int) -> int:
    """Distances on the circle of row tiles at which a tile serves its rows and its columns."""
    return max(row_tiles - 1, 0) // 2


def is_once_cheaper(row_tiles: int, tile: Tile, *, processors: int) -> bool:
    """True if the sums of a symmetric matrix are cheaper with each tile met once, by the model.

    Args:
        row_tiles: Row tiles of the matrix.
        tile: Of `log_sums`.
        processors: Multiprocessors.
    """
    columns = row_tiles * (tile.rows // tile.columns)
    twice = cost_of(row_tiles, columns, processors=processors)
    once = cost_of(row_tiles, steps_once(row_tiles, tile), processors=processors)
    # Partial sums are added sixteen distances at a time, for about the time of a tile.
    return _ONCE * once + row_tiles / 32 < twice


def cost_of(row_tiles: int, column_tiles: int, *, processors: int) -> int:
    """Time of a walk with the splits that are chosen for it, in tiles."""
    splits = choose_splits(row_tiles, column_tiles, processors=processors)
    return _cost(row_tiles, column_tiles, splits, processors)


def _cost(row_tiles: int, column_tiles: int, splits: int, processors: int) -> int:
    waves = -(-row_tiles * splits // processors)
    # A program costs its share of the tiles, and about two more for prologue and epilogue.
    return waves * (-(-column_tiles // splits) + 2)


def choose_splits(row_tiles: int, column_tiles: int, *, processors: int, most: int = 16) -> int:
    """Column splits that keep most processors busy; each adds one partial result per row.

    Args:
        row_tiles: Programs without splitting.
        column_tiles: Tiles that a program walks.
        processors: Multiprocessors, each running one program at a time.
        most: Upper limit, which bounds the memory for partial results.
    """
    choices = range(1, max(1, min(most, column_tiles)) + 1)
    costs = [_cost(row_tiles, column_tiles, splits, processors) for splits in choices]
    # A split costs a partial result of the batch's size: two percent of time are not worth seven.
    enough = 1.05 * min(costs)
    return next(splits for splits, cost in zip(choices, costs, strict=True) if cost <= enough)
