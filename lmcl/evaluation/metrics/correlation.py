"""Rank and linear correlations with their analytic intervals.

Ties get average ranks: `1 - 6 sum d^2 / (n (n^2 - 1))` is wrong as soon as two values are equal.
A column without spread has no correlation: the answer is NaN, never 0 or 1.
"""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

_CONFIDENCE = 0.95
_Z = float(stats.norm.ppf(0.5 + _CONFIDENCE / 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Interval:
    """A 95 % interval and how it was made."""

    low: float
    """Lower end."""
    high: float
    """Upper end."""
    method: str
    """`fisher`, `bonett-wright`, `fieller` or `cluster-bootstrap`."""


def no_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Why predictions `x` and scores `y` have no correlation; empty if they have one."""
    if len(y) < 2:
        return "one image has no correlation"
    if is_constant(x):
        return "all predictions are equal"
    return "all scores are equal" if is_constant(y) else ""


def plcc(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Pearson's linear correlation; NaN if fewer than two values or one column is constant."""
    if len(x) < 2 or is_constant(x) or is_constant(y):
        return math.nan
    a, b = _standardise(x), _standardise(y)
    return float(np.clip(np.mean(a * b), -1.0, 1.0))


def srcc(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Spearman's rank correlation with average ranks; NaN as `plcc`."""
    return plcc(stats.rankdata(x), stats.rankdata(y))


def krcc(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Kendall's tau-b, the form that reproduces TID2013's published table; NaN as `plcc`."""
    if len(x) < 2 or is_constant(x) or is_constant(y):
        return math.nan
    if len(x) == 2:
        # scipy divides by n - 2 for a p-value that nobody asked for.
        return plcc(x, y)
    return float(stats.kendalltau(x, y, variant="b", method="asymptotic").statistic)


def plcc_interval(value: float, n: int) -> Interval | None:
    """Fisher's interval of a Pearson correlation of `n` independent pairs."""
    return _fisher(value, n, 1.0, 3, "fisher")


def srcc_interval(value: float, n: int) -> Interval | None:
    """Fisher's interval with the variance of Bonett and Wright [2000], (1 + r^2 / 2) / (n - 3)."""
    return _fisher(value, n, 1.0 + value**2 / 2.0, 3, "bonett-wright")


def krcc_interval(value: float, n: int) -> Interval | None:
    """Fisher's interval with the variance of Fieller et al. [1957], 0.437 / (n - 4)."""
    return _fisher(value, n, 0.437, 4, "fieller")


def is_constant(x: NDArray[np.float64]) -> bool:
    """Whether the values differ by no more than rounding in float64."""
    spread = float(np.ptp(x)) if len(x) else 0.0
    return spread <= 1e-12 * float(np.max(np.abs(x), initial=0.0))


def _standardise(x: NDArray[np.float64]) -> NDArray[np.float64]:
    # Scaling first keeps the sum of squares finite for values near the ends of float64.
    centred = (x - np.mean(x)) / np.ptp(x)
    return np.asarray(centred / np.sqrt(np.mean(centred**2)), dtype=np.float64)


def _fisher(value: float, n: int, variance: float, lost: int, method: str) -> Interval | None:
    if n <= lost or not math.isfinite(value) or abs(value) >= 1.0:
        return None
    half = _Z * math.sqrt(variance / (n - lost))
    z = math.atanh(value)
    return Interval(low=math.tanh(z - half), high=math.tanh(z + half), method=method)
