"""The loss tile by tile on any device: no (n, m) matrix, memory O(n d + tile^2).

The matrix of the student's own rows is symmetric, so only tiles on and right of the diagonal are
formed; each serves its rows and its columns. What a newcomer gets wrong: tile borders stand at
image borders, so that pairs of one image always lie in a diagonal tile.
"""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from kernels.groups import Groups, Neighbours

TILE = 384
"""Rows and columns of a tile; measured on two cores, docs/kernels.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """What both passes read: rows, columns and pairs inside images."""

    rows: Float[Tensor, "n d"]
    """Local rows."""
    before: Float[Tensor, "_ d"]
    """Columns of lower ranks (students) or no columns (teacher)."""
    after: Float[Tensor, "_ d"]
    """Columns of higher ranks (students) or all columns (teacher)."""
    neighbours: Neighbours
    """Pairs inside images; `column` counts local rows."""
    spans: tuple[tuple[int, int], ...]
    """Tiles of local rows, cut at image borders."""
    beta: float
    """1 / temperature."""
    steady: bool
    """exp(cosine * beta) fits the number format without subtracting a maximum."""


def make_problem(
    rows: Float[Tensor, "n d"],
    before: Float[Tensor, "k d"],
    after: Float[Tensor, "l d"],
    *,
    groups: Groups,
    neighbours: Neighbours,
    temperature: float,
    tile: int = TILE,
) -> Problem:
    """Choose tiles and arithmetic.

    Args:
        rows: Local rows, float32 or float64.
        before: Columns of lower ranks.
        after: Columns of higher ranks.
        groups: Images of the local rows.
        neighbours: Pairs inside images.
        temperature: > 0.
        tile: Rows of a tile; an image with more crops gets a larger one.
    """
    beta = 1.0 / temperature
    return Problem(
        rows=rows,
        before=before,
        after=after,
        neighbours=neighbours,
        spans=_image_aligned_spans(groups.counts.tolist(), tile),
        beta=beta,
        steady=beta <= (600.0 if rows.dtype == torch.float64 else 64.0),
    )


class TileMemory:
    """Two tiles' worth of memory that every tile of a walk is formed in.

    A fresh allocation of some megabytes a tile is pages that the system clears first.
    """

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._parts = [like.new_empty(0), like.new_empty(0)]

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """Left right^T, in place of the product before."""
        out = self._take(0, left.shape[0], right.shape[0])
        return torch.mm(left, right.T, out=out)

    def outer_sum(self, left: Tensor, right: Tensor) -> Tensor:
        """left_i + right_j, in place of the sum before."""
        out = self._take(1, left.shape[0], right.shape[0])
        return torch.add(left[:, None], right, out=out)

    def _take(self, place: int, rows: int, columns: int) -> Tensor:
        if self._parts[place].numel() < rows * columns:
            self._parts[place] = self._like.new_empty(rows * columns)
        return self._parts[place][: rows * columns].view(rows, columns)


@dataclasses.dataclass
class LogSums:
    """Running log-sum-exp of rows: sum = exp(peak) * total."""

    total: Float[Tensor, " n"]
    peak: Float[Tensor, " n"] | None

    def absorb_rows(self, block: Float[Tensor, "i j"], start: int) -> None:
        """Add the block's rows to rows [start, start + i); the block becomes its exponentials."""
        stop = start + block.shape[0]
        if self.peak is None:
            self.total[start:stop] += _row_sums(block.exp_())
            return
        peak = torch.maximum(self.peak[start:stop], block.amax(1))
        self._rescale(start, stop, peak)
        self.total[start:stop] += _row_sums(block.sub_(_finite(peak)[:, None]).exp_())

    def absorb_columns(self, block: Float[Tensor, "i j"], start: int) -> None:
        """Add the columns of a block of logits (or, when steady, of exponentials)."""
        stop = start + block.shape[1]
        if self.peak is None:
            self.total[start:stop] += _row_sums(block.T)
            return
        peak = torch.maximum(self.peak[start:stop], block.amax(0))
        self._rescale(start, stop, peak)
        self.total[start:stop] += _row_sums((block - _finite(peak)).exp_().T)

    def _rescale(self, start: int, stop: int, peak: Float[Tensor, " i"]) -> None:
        assert self.peak is not None
        self.total[start:stop] *= (self.peak[start:stop] - _finite(peak)).exp()
        self.peak[start:stop] = peak

    def log(self) -> Float[Tensor, " n"]:
        """Log of the sums; -inf where nothing was added."""
        return self.total.log() if self.peak is None else self.total.log() + _finite(self.peak)


def student_forward(
    problem: Problem,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"]]:
    """Log-sum-exp of each row over all columns, weights applied, and cosines inside images."""
    rows, near = problem.rows, problem.neighbours
    sums, memory = _empty_sums(problem), TileMemory(rows)
    cosine = rows.new_empty(near.column.shape)
    for place, (a, b) in enumerate(problem.spans):
        scaled = rows[a:b] * problem.beta
        block = memory.product(scaled, rows[a:b])
        own = near.column[a:b] - a
        logits = block.gather(1, own)
        cosine[a:b] = logits / problem.beta
        sums.absorb_rows(block.scatter_(1, own, logits + near.log_weight[a:b]), a)
        for c, d in problem.spans[place + 1 :]:
            block = memory.product(scaled, rows[c:d])
            if not problem.steady:
                sums.absorb_columns(block, c)
            sums.absorb_rows(block, a)
            if problem.steady:
                sums.absorb_columns(block, c)
        for block in _other_ranks(scaled, problem, memory):
            sums.absorb_rows(block, a)
    return sums.log(), cosine


def student_backward(
    problem: Problem,
    *,
    log_sum: Float[Tensor, " n"],
    weight: Float[Tensor, " n"],
    others: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> Float[Tensor, "n d"]:
    """Gradient of sum_i weight_i log_sum_i by the rows, in both of their roles.

    Args:
        problem: As in the forward pass.
        log_sum: Log-sum-exp of the local rows over the whole denominator; +inf for dead rows.
        weight: Upstream gradient of each local row's log-sum-exp.
        others: (log_sum, weight) of `before` and of `after`.
    """
    rows, near, beta = problem.rows, problem.neighbours, problem.beta
    d_rows = torch.zeros_like(rows)
    stats = Statistics.of(log_sum, weight, steady=problem.steady)
    far = [Statistics.of(*pair, steady=problem.steady) for pair in others]
    memory = TileMemory(rows)
    for place, (a, b) in enumerate(problem.spans):
        scaled = rows[a:b] * beta
        here = stats.part(a, b)
        for c, d in problem.spans[place:]:
            block = memory.product(scaled, rows[c:d])
            own = block.gather(1, near.column[a:b] - a) if c == a else None
            _pair_weights(block, here, stats.part(c, d), memory)
            if own is not None:
                block.scatter_(1, near.column[a:b] - a, _own_weights(near, stats, own, a))
            d_rows[a:b].addmm_(block, rows[c:d])
            if c > a:
                d_rows[c:d].addmm_(block.T, rows[a:b])
        for columns, there in zip((problem.before, problem.after), far, strict=True):
            for c in range(0, columns.shape[0], TILE):
                part = columns[c : c + TILE]
                block = memory.product(scaled, part)
                _pair_weights(block, here, there.part(c, c + TILE), memory)
                d_rows[a:b].addmm_(block, part)
    return d_rows.mul_(beta)


def teacher_forward(
    problem: Problem, keys: Float[Tensor, "m d"], *, offset: int, with_gradient: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n c"], Float[Tensor, "n d"]]:
    """Log-sum-exp of each row over fixed keys, cosines inside images, and d log_sum / d rows.

    The gradient is finished here, because no other row's statistics enter it; without
    `with_gradient` it is left as zeros.

    Args:
        problem: Rows and pairs; its `before` and `after` are not read.
        keys: Keys of all ranks.
        offset: Key of the first local row.
        with_gradient: Form the gradient too.
    """
    rows, near = problem.rows, problem.neighbours
    sums, memory = _empty_sums(problem), TileMemory(rows)
    cosine = rows.new_empty(near.column.shape)
    mean_key = torch.zeros_like(rows)
    for a, b in problem.spans:
        scaled = rows[a:b] * problem.beta
        pieces = [(offset + a, offset + b)]
        pieces += [(c, min(c + TILE, offset + a)) for c in range(0, offset + a, TILE)]
        pieces += [
            (c, min(c + TILE, keys.shape[0])) for c in range(offset + b, keys.shape[0], TILE)
        ]
        for c, d in pieces:
            block = memory.product(scaled, keys[c:d])
            if c == offset + a:
                own = near.column[a:b] - a
                logits = block.gather(1, own)
                cosine[a:b] = logits / problem.beta
                block.scatter_(1, own, logits + near.log_weight[a:b])
            old = None if sums.peak is None else sums.peak[a:b].clone()
            sums.absorb_rows(block, a)
            if not with_gradient:
                continue
            if old is not None and sums.peak is not None:
                mean_key[a:b] *= (old - _finite(sums.peak[a:b])).exp()[:, None]
            mean_key[a:b].addmm_(block, keys[c:d])
    alive = torch.where(sums.total == 0, 1.0, sums.total)
    return sums.log(), cosine, mean_key.mul_(problem.beta / alive[:, None])


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Log-sum-exp and weight of rows, in the form the tile arithmetic wants."""

    log_sum: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    scale: Float[Tensor, " n"] | None
    """weight * exp(-log_sum), where that is safe."""

    @staticmethod
    def of(
        log_sum: Float[Tensor, " n"], weight: Float[Tensor, " n"], *, steady: bool
    ) -> "Statistics":
        """Scales are formed where exponentials need no maximum."""
        scale = weight * (-log_sum).exp() if steady else None
        return Statistics(log_sum, weight, scale)

    def part(self, start: int, stop: int) -> "Statistics":
        """Those of some of the rows."""
        scale = None if self.scale is None else self.scale[start:stop]
        return Statistics(self.log_sum[start:stop], self.weight[start:stop], scale)


def _pair_weights(
    block: Float[Tensor, "i j"], rows: Statistics, columns: Statistics, memory: TileMemory
) -> Float[Tensor, "i j"]:
    """Logits -> exp(l) (w_i e^-L_i + w_j e^-L_j), in place."""
    if rows.scale is not None and columns.scale is not None:
        return block.exp_().mul_(memory.outer_sum(rows.scale, columns.scale))
    back = (block - columns.log_sum).exp_().mul_(columns.weight)
    return block.sub_(rows.log_sum[:, None]).exp_().mul_(rows.weight[:, None]).add_(back)


def _own_weights(
    near: Neighbours, stats: Statistics, logits: Float[Tensor, "i c"], a: int
) -> Float[Tensor, "i c"]:
    """The same for the pairs inside images, whose weights may differ by direction."""
    b = a + logits.shape[0]
    column = near.column[a:b]
    forth = (logits + near.log_weight[a:b] - stats.log_sum[a:b, None]).exp()
    back = (logits + near.log_weight_back[a:b] - stats.log_sum[column]).exp()
    return forth * stats.weight[a:b, None] + back * stats.weight[column]


def _other_ranks(
    scaled: Float[Tensor, "i d"], problem: Problem, memory: TileMemory
) -> Iterator[Float[Tensor, "i j"]]:
    for columns in (problem.before, problem.after):
        for start in range(0, columns.shape[0], TILE):
            yield memory.product(scaled, columns[start : start + TILE])


def _empty_sums(problem: Problem) -> LogSums:
    n = problem.rows.shape[0]
    peak = None if problem.steady else problem.rows.new_full((n,), -torch.inf)
    return LogSums(problem.rows.new_zeros(n), peak)


def _row_sums(block: Float[Tensor, "i j"]) -> Float[Tensor, " i"]:
    """By a product with ones, which the library adds up faster than a sum over either axis."""
    return torch.mv(block, block.new_ones(block.shape[1]))


def _finite(peak: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Peaks of rows that saw only excluded columns become 0, so that exp(-inf - peak) is 0."""
    return torch.where(peak == -torch.inf, 0.0, peak)


def _image_aligned_spans(counts: list[int], tile: int) -> tuple[tuple[int, int], ...]:
    spans: list[tuple[int, int]] = []
    start = stop = 0
    for count in counts:
        if stop > start and stop + count - start > tile:
            spans.append((start, stop))
            start = stop
        stop += count
    if stop > start:
        spans.append((start, stop))
    return tuple(spans)
