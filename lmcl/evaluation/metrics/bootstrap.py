"""Resampling whole groups: images that show one reference are not independent of each other.

A round draws as many groups as there are, with replacement. Instead of copying rows it counts how
often each image occurs, so that all rounds are ranked and correlated by a few matrix operations.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.metrics.correlation import Interval

# Rounds are taken in pieces of about this many counts, so that a large set needs little memory.
_PIECE = 2_000_000
_MOST_EXACT = 1500
"""Images up to which Kendall's tau is counted anew in every round, n^2 operations each; above, its
expansion to first order around the sample is, whose error falls as 1 / n."""
_BLOCK = 512


def group_counts(
    groups: NDArray[np.int64], *, resamples: int, seed: int
) -> Iterator[NDArray[np.float64]]:
    """How often each image occurs in each round, `[rounds, n]`, piece by piece."""
    names, code = np.unique(groups, return_inverse=True)
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, max(1, _PIECE // max(1, len(groups)))):
        rounds = min(resamples - start, max(1, _PIECE // max(1, len(groups))))
        draws = rng.integers(len(names), size=(rounds, len(names)))
        flat = draws + len(names) * np.arange(rounds)[:, None]
        counts = np.bincount(flat.ravel(), minlength=rounds * len(names))
        yield counts.reshape(rounds, len(names))[:, code].astype(np.float64)


def counted_ranks(x: NDArray[np.float64], counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average ranks `[rounds, n]` of values of which image i occurs `counts[:, i]` times."""
    order = np.argsort(x, kind="stable")
    code = np.zeros(len(x), dtype=np.int64)
    code[1:] = np.cumsum(np.diff(x[order]) != 0)
    starts = np.flatnonzero(np.diff(code, prepend=-1))
    tied = np.add.reduceat(counts[:, order], starts, axis=1)
    ranks = np.cumsum(tied, axis=1) - tied / 2 + 0.5
    found = np.empty_like(counts)
    found[:, order] = ranks[:, code]
    return found


def counted_plcc(
    x: NDArray[np.float64], y: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Pearson's correlation in every round; NaN where a column is constant in that round."""
    total = np.sum(counts, axis=1, keepdims=True)
    a = x - np.sum(counts * x, axis=1, keepdims=True) / total
    b = y - np.sum(counts * y, axis=1, keepdims=True) / total
    below = np.sum(counts * a * a, axis=1) * np.sum(counts * b * b, axis=1)
    above = np.sum(counts * a * b, axis=1)
    safe = np.where(below > 0, below, 1.0)
    return np.where(below > 0, above / np.sqrt(safe), math.nan)


def counted_srcc(
    x: NDArray[np.float64], y: NDArray[np.float64], counts: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Spearman's correlation with average ranks in every round."""
    return counted_plcc(counted_ranks(x, counts), counted_ranks(y, counts), counts)


class PairSigns:
    """Signs of all pairs of two columns, for Kendall's tau-b of rounds."""

    def __init__(self, x: NDArray[np.float64], y: NDArray[np.float64]) -> None:
        """Take two columns of n values, without NaN."""
        self._x, self._y = x, y
        self._is_exact = len(x) <= _MOST_EXACT
        blocks = [self._block(slice(i, i + _BLOCK)) for i in range(0, len(x), _BLOCK)]
        if self._is_exact:
            self._tables = [np.concatenate(each) for each in zip(*blocks, strict=True)]
        else:
            sums = [[table.sum(axis=1) for table in block] for block in blocks]
            self._rows = [np.concatenate(each) for each in zip(*sums, strict=True)]

    def krcc(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tau-b in every round of `counts` [rounds, n]; NaN where a column is constant in it."""
        above, *below = self._sums(counts)
        product = below[0] * below[1]
        safe = np.where(product > 0, product, 1.0)
        return np.where(product > 0, np.clip(above / np.sqrt(safe), -1.0, 1.0), math.nan)

    def _sums(self, counts: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Sums over pairs of sign(x) sign(y), |sign(x)|, |sign(y)|, one a round each."""
        if self._is_exact:
            few = counts.astype(np.float32)
            tables = self._tables
            return [np.einsum("rn,rn->r", few @ t, few, dtype=np.float64) for t in tables]
        return [2.0 * counts @ row - row.sum() for row in self._rows]

    def _block(self, rows: slice) -> list[NDArray[np.float32]]:
        sign_x, sign_y = (
            np.sign(column[rows, None] - column[None, :]).astype(np.float32)
            for column in (self._x, self._y)
        )
        return [sign_x * sign_y, np.abs(sign_x), np.abs(sign_y)]


def bootstrap_intervals(
    prediction: NDArray[np.float64],
    mapped: NDArray[np.float64],
    mos: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Percentile intervals of srcc, krcc, plcc_raw and plcc_fit4; the mapping is not refitted.

    Args:
        prediction: As the model gave them.
        mapped: After the 4-parameter mapping, negated if the model is inverted.
        mos: The scores.
        groups: Whole numbers; equal means dependent.
        resamples: Rounds.
        seed: Of the draws.
    """
    names = ("srcc", "krcc", "plcc_raw", "plcc_fit4")
    drawn: dict[str, list[NDArray[np.float64]]] = {name: [] for name in names}
    signs = PairSigns(prediction, mos)
    for counts in group_counts(groups, resamples=resamples, seed=seed):
        drawn["srcc"].append(counted_srcc(prediction, mos, counts))
        drawn["krcc"].append(signs.krcc(counts))
        drawn["plcc_raw"].append(counted_plcc(prediction, mos, counts))
        if np.all(np.isfinite(mapped)):
            drawn["plcc_fit4"].append(counted_plcc(mapped, mos, counts))
    found = {name: _percentiles(values) for name, values in drawn.items() if values}
    return {name: interval for name, interval in found.items() if interval is not None}


def _percentiles(pieces: list[NDArray[np.float64]]) -> Interval | None:
    drawn = np.concatenate(pieces)
    kept = drawn[np.isfinite(drawn)]
    # A round in which one column is constant has no correlation; half of them is no distribution.
    if len(kept) == 0 or len(kept) < math.ceil(len(drawn) / 2):
        return None
    low, high = np.percentile(kept, [2.5, 97.5])
    return Interval(low=float(low), high=float(high), method="cluster-bootstrap")
