"""Row-wise log-sum-exp of two tables tile by tile on any device: memory O(n d + tile^2).

A tile can serve its rows, its columns, or both: both where rows and columns are one table (each
tile off the diagonal is met once) and where somebody asks for both directions. Only tiles that show
a pair of one group form weights.
"""

import dataclasses
import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kernels import chunked
from kernels.chunked import LogSums, Statistics
from kernels.pairs import Pairs


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileWalk:
    """Two tables, their pairs, and which tiles are met."""

    rows: Float[Tensor, "n d"]
    columns: Float[Tensor, "m d"]
    pairs: Pairs
    beta: float
    """1 / temperature."""
    is_mirrored: bool
    """Rows and columns are one table: tiles left of the diagonal are those right of it, turned."""

    @property
    def is_steady(self) -> bool:
        """exp(q k^T / temperature) fits the number format without subtracting a maximum."""
        if not (self.rows.numel() and self.columns.numel()):
            return True
        longest = [
            float(torch.linalg.vector_norm(t, dim=1).max()) for t in (self.rows, self.columns)
        ]
        weights = [float(t.max()) for t in (self.pairs.forth, self.pairs.back) if t is not None]
        heaviest = max([*weights, 1.0] if weights else [self.pairs.weight, 1.0])
        largest = longest[0] * longest[1] * self.beta + math.log(heaviest)
        return largest <= (600.0 if self.rows.dtype == torch.float64 else 64.0)

    def tiles(self) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
        """Spans of rows with the spans of columns that they meet."""
        n, m, tile = self.rows.shape[0], self.columns.shape[0], chunked.TILE
        for a in range(0, n, tile):
            start = a if self.is_mirrored else 0
            yield a, min(a + tile, n), [(c, min(c + tile, m)) for c in range(start, m, tile)]


def log_sums(walk: TileWalk, *, both: bool = False) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp of each row over the columns and, asked for both, of each column over the rows.

    -inf where nothing is summed up. A mirrored walk has one answer.
    """
    steady = walk.is_steady
    row_sums = _empty_sums(walk.rows, steady=steady)
    column_sums = row_sums if walk.is_mirrored else None
    if both and not walk.is_mirrored:
        column_sums = _empty_sums(walk.columns, steady=steady)
    own = _OwnTiles(walk.pairs)
    for a, b, spans in walk.tiles():
        scaled = walk.rows[a:b] * walk.beta
        for c, d in spans:
            block = scaled @ walk.columns[c:d].T
            forth, back = own.log_weights(a, b, c, d, like=block)
            is_diagonal = walk.is_mirrored and a == c
            if column_sums is None or is_diagonal:
                row_sums.absorb_rows(block if forth is None else block.add_(forth), a)
                continue
            if forth is None or back is None or forth is back:
                _absorb_both(block if forth is None else block.add_(forth), row_sums, column_sums,
                             a, c)  # fmt: skip
                continue
            column_sums.absorb_columns(_as_sums_want(block + back, column_sums), c)
            row_sums.absorb_rows(block.add_(forth), a)
    return row_sums.log(), None if column_sums is None else column_sums.log()


def gradient(
    walk: TileWalk,
    *,
    rows: tuple[Tensor, Tensor] | None,
    columns: tuple[Tensor, Tensor] | None,
    want_rows: bool = True,
    want_columns: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gradient of sum_i weight_i log_sum_i by rows and columns, before the factor 1 / temperature.

    Args:
        walk: As in the forward pass.
        rows: (log_sum, weight) of the rows; None if their log-sum-exp was not asked for.
        columns: The same of the columns.
        want_rows: Form the gradient by the rows.
        want_columns: Form the gradient by the columns; a mirrored walk has one gradient.

    Returns:
        Gradients by rows and by columns; zeros where one was not wanted.
    """
    steady = walk.is_steady
    here, there = (_statistics(pair, steady=steady) for pair in (rows, columns))
    d_rows = torch.zeros_like(walk.rows)
    d_columns = d_rows if walk.is_mirrored else torch.zeros_like(walk.columns)
    own = _OwnTiles(walk.pairs)
    for a, b, spans in walk.tiles():
        scaled = walk.rows[a:b] * walk.beta
        for c, d in spans:
            block = scaled @ walk.columns[c:d].T
            forth, back = own.log_weights(a, b, c, d, like=block)
            block = _pair_weights(
                block,
                None if here is None else here.part(a, b),
                None if there is None else there.part(c, d),
                forth,
                back,
            )
            if want_rows:
                d_rows[a:b].addmm_(block, walk.columns[c:d])
            if want_columns and not (walk.is_mirrored and a == c):
                d_columns[c:d].addmm_(block.T, walk.rows[a:b])
    return d_rows, d_columns


class _OwnTiles:
    """Weights of the tiles that show pairs of one group."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs
        self._first, self._end = pairs.first.cpu(), pairs.end.cpu()

    def log_weights(
        self, a: int, b: int, c: int, d: int, *, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logs of the weights that rows give to columns and columns to rows; None: all are 1."""
        pairs = self.pairs
        if max(int(self._first[a]), c) >= min(int(self._end[b - 1]), d):
            return None, None
        column = torch.arange(c, d, device=like.device)
        first = pairs.first[a:b, None]
        is_own = (column >= first) & (column < pairs.end[a:b, None])
        if pairs.itself is None:
            is_itself = torch.zeros_like(is_own)
        else:
            is_itself = column == pairs.itself[a:b, None]
        if pairs.forth is None and pairs.back is None:
            weight = torch.ones_like(like).masked_fill_(is_own, pairs.weight)
            both = weight.masked_fill_(is_itself, 0.0).log_()
            return both, both
        given = torch.ones_like(like), torch.ones_like(like)
        if pairs.forth is not None:
            place = (column - first).clamp_(0, pairs.forth.shape[1] - 1)
            given = pairs.forth[a:b].to(like).gather(1, place), given[1]
        if pairs.back is not None:
            place = pairs.place[a:b].clamp(0, pairs.back.shape[1] - 1)
            given = given[0], pairs.back[c:d].to(like)[:, place].T
        forth, back = (
            torch.where(is_own, weight, 1.0).masked_fill_(is_itself, 0.0).log_() for weight in given
        )
        return forth, back


def _absorb_both(
    block: Tensor, row_sums: LogSums, column_sums: LogSums, row: int, column: int
) -> None:
    """Rows and columns of one block of logits; steady sums share its exponentials."""
    if row_sums.peak is None:
        row_sums.absorb_rows(block, row)
        column_sums.absorb_columns(block, column)
        return
    column_sums.absorb_columns(block, column)
    row_sums.absorb_rows(block, row)


def _as_sums_want(block: Tensor, sums: LogSums) -> Tensor:
    return block.exp_() if sums.peak is None else block


def _pair_weights(
    block: Float[Tensor, "i j"],
    rows: Statistics | None,
    columns: Statistics | None,
    forth: Tensor | None,
    back: Tensor | None,
) -> Float[Tensor, "i j"]:
    """Logits -> exp(l) (w_ij u_i e^-L_i + w_ji u_j e^-L_j); the block is used up."""
    if forth is None:
        scales = [
            side.scale[:, None] if side is rows else side.scale
            for side in (rows, columns)
            if side is not None and side.scale is not None
        ]
        if scales:
            return block.exp_().mul_(scales[0] if len(scales) == 1 else scales[0] + scales[1])
    total = None
    if columns is not None:
        total = block - columns.log_sum
        total = total if back is None else total.add_(back)
        total = total.exp_().mul_(columns.weight)
    if rows is None:
        assert total is not None
        return total
    block = block.sub_(rows.log_sum[:, None])
    block = block if forth is None else block.add_(forth)
    block = block.exp_().mul_(rows.weight[:, None])
    return block if total is None else block.add_(total)


def _statistics(pair: tuple[Tensor, Tensor] | None, *, steady: bool) -> Statistics | None:
    """Rows without a sum get an infinite one, so that nothing flows to them."""
    if pair is None:
        return None
    log_sum = torch.where(pair[0] == -torch.inf, torch.inf, pair[0])
    return Statistics.of(log_sum, pair[1], steady=steady)


def _empty_sums(table: Tensor, *, steady: bool) -> LogSums:
    n = table.shape[0]
    return LogSums(table.new_zeros(n), None if steady else table.new_full((n,), -torch.inf))
