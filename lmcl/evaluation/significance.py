"""Is one model better than another? Tests over the same images, or over the same splits.

Which test answers which question stands in docs/reports.md. All are two-sided; p-values over a
table of models go through `holm`.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lmcl.evaluation.metrics import Interval, plcc, srcc
from lmcl.evaluation.metrics.bootstrap import counted_srcc, group_counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """The outcome of one test; `p` is NaN with a reason where the test is not defined."""

    name: str
    statistic: float
    p: float
    reason: str = ""
    """Why there is no p-value; or a caution about one that is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """How much larger a figure is for the first model than for the second."""

    value: float
    interval: Interval | None
    p: float
    """Share of resamples on the other side of zero, doubled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Discrimination:
    """Krasula's analysis: can differences of predictions tell what people can tell?"""

    n_pairs: int
    """Pairs looked at."""
    n_different: int
    """Pairs whose scores differ significantly."""
    auc_different: float
    """Area under the ROC curve, different against similar pairs."""
    auc_different_interval: Interval | None
    auc_better: float
    """Area under the ROC curve, better against worse, among the different pairs."""
    auc_better_interval: Interval | None
    correct: float
    """Share of different pairs whose order the predictions have right."""


def williams(r_a: float, r_b: float, r_ab: float, n: int) -> Verdict:
    """Williams' t for two correlations with the same scores, over the same `n` images.

    Args:
        r_a: Correlation of model A with the scores.
        r_b: Correlation of model B with the scores.
        r_ab: Correlation of the two models with each other.
        n: Images.

    Source: Williams [1959] in the form of Steiger [1980], equation (7).
    """
    det = 1 - r_a**2 - r_b**2 - r_ab**2 + 2 * r_a * r_b * r_ab
    mean = (r_a + r_b) / 2
    below = 2 * det * (n - 1) / max(n - 3, 1) + mean**2 * (1 - r_ab) ** 3
    if n <= 3 or not math.isfinite(below) or below <= 1e-15:
        return _undefined("williams", "the two models are the same, or too few images")
    t = (r_a - r_b) * math.sqrt((n - 1) * (1 + r_ab) / below)
    return Verdict(name="williams", statistic=t, p=float(2 * stats.t.sf(abs(t), n - 3)))


def meng(r_a: float, r_b: float, r_ab: float, n: int) -> Verdict:
    """Meng, Rosenthal and Rubin's z [1992] for two correlations that share the scores."""
    if n <= 3 or not all(abs(r) < 1 for r in (r_a, r_b, r_ab)):
        return _undefined("meng", "a correlation is 1, or too few images")
    mean = (r_a**2 + r_b**2) / 2
    f = min((1 - r_ab) / (2 * (1 - mean)), 1.0)
    h = (1 - f * mean) / (1 - mean)
    z = (math.atanh(r_a) - math.atanh(r_b)) * math.sqrt((n - 3) / (2 * (1 - r_ab) * h))
    return Verdict(name="meng", statistic=z, p=float(2 * stats.norm.sf(abs(z))))


def steiger(r_a: float, r_b: float, r_ab: float, n: int) -> Verdict:
    """Steiger's z [1980], equation (14), with the pooled correlation in the covariance."""
    if n <= 3 or not all(abs(r) < 1 for r in (r_a, r_b, r_ab)):
        return _undefined("steiger", "a correlation is 1, or too few images")
    mean = (r_a + r_b) / 2
    psi = r_ab * (1 - 2 * mean**2) - mean**2 * (1 - 2 * mean**2 - r_ab**2) / 2
    covariance = psi / (1 - mean**2) ** 2
    z = (math.atanh(r_a) - math.atanh(r_b)) * math.sqrt((n - 3) / (2 - 2 * covariance))
    return Verdict(name="steiger", statistic=z, p=float(2 * stats.norm.sf(abs(z))))


def f_test(residual_a: NDArray[np.float64], residual_b: NDArray[np.float64]) -> Verdict:
    """F-test on the ratio of residual variances after the mapping [VQEG; Sheikh et al. 2006].

    It assumes normal and independent residuals; the reason carries a caution if the kurtosis of
    either lies outside 2 to 4. Images of both models are the same, so it is conservative.
    """
    n, m = len(residual_a), len(residual_b)
    below = float(np.var(residual_b, ddof=1)) if m > 1 else 0.0
    if n < 3 or m < 3 or below == 0.0:
        return _undefined("f-test", "too few images, or residuals without spread")
    ratio = float(np.var(residual_a, ddof=1)) / below
    tail = min(float(stats.f.cdf(ratio, n - 1, m - 1)), float(stats.f.sf(ratio, n - 1, m - 1)))
    tails = [float(stats.kurtosis(r, fisher=False)) for r in (residual_a, residual_b)]
    normal = all(2.0 <= k <= 4.0 for k in tails)
    caution = (
        "" if normal else f"residuals are not normal (kurtosis {tails[0]:.1f}, {tails[1]:.1f})"
    )
    return Verdict(name="f-test", statistic=ratio, p=min(1.0, 2 * tail), reason=caution)


def wilcoxon(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """Signed-rank test on the figures of two models over the same splits."""
    difference = _paired(a, b)
    if len(difference) < 2 or not np.any(difference):
        return _undefined("wilcoxon", "fewer than two splits, or no difference in any of them")
    # The default drops zero differences and warns; Pratt keeps their ranks.
    found = stats.wilcoxon(difference, zero_method="pratt", method="auto")
    least = 2.0 ** (1 - len(difference))
    caution = f"with {len(difference)} splits p is never below {least:.3g}" if least > 0.05 else ""
    return Verdict(
        name="wilcoxon", statistic=float(found.statistic), p=float(found.pvalue), reason=caution
    )


def sign_test(a: Sequence[float], b: Sequence[float]) -> Verdict:
    """How often the first model wins, against a fair coin; ties are left out."""
    difference = _paired(a, b)
    wins, losses = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    if len(difference) < 2 or wins + losses == 0:
        return _undefined("sign", "fewer than two splits, or no difference in any of them")
    p = float(stats.binomtest(wins, wins + losses).pvalue)
    return Verdict(name="sign", statistic=float(wins), p=p)


def nadeau_bengio(a: Sequence[float], b: Sequence[float], *, n_train: int, n_test: int) -> Verdict:
    """Corrected resampled t-test: random splits overlap, so their spread is no standard error.

    Source: Nadeau and Bengio [2003]; variance times 1/k + n_test/n_train instead of 1/k.
    """
    difference = _paired(a, b)
    k = len(difference)
    spread = float(np.var(difference, ddof=1)) if k > 1 else 0.0
    if k < 2 or spread == 0.0 or n_train <= 0:
        return _undefined("nadeau-bengio", "fewer than two splits, or all differences are equal")
    t = float(np.mean(difference)) / math.sqrt((1 / k + n_test / n_train) * spread)
    return Verdict(name="nadeau-bengio", statistic=t, p=float(2 * stats.t.sf(abs(t), k - 1)))


def srcc_difference(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    mos: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    resamples: int = 1000,
    seed: int = 123,
) -> Difference:
    """Bootstrap over groups of the difference in rank correlation, both models on the same draw."""
    value = srcc(a, mos) - srcc(b, mos)
    drawn = np.concatenate(
        [
            counted_srcc(a, mos, counts) - counted_srcc(b, mos, counts)
            for counts in group_counts(groups, resamples=resamples, seed=seed)
        ]
    )
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) == 0 or not math.isfinite(value):
        return Difference(value=value, interval=None, p=math.nan)
    low, high = np.percentile(drawn, [2.5, 97.5])
    # One is added to both counts: with 1,000 draws no p-value can honestly be 0.
    beyond = min(int(np.sum(drawn <= 0)), int(np.sum(drawn >= 0)))
    return Difference(
        value=value,
        interval=Interval(low=float(low), high=float(high), method="cluster-bootstrap"),
        p=min(1.0, 2 * (beyond + 1) / (len(drawn) + 1)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction; NaN stays NaN and is not counted."""
    known = [i for i, p in enumerate(p_values) if math.isfinite(p)]
    corrected = list(p_values)
    largest = 0.0
    for rank, i in enumerate(sorted(known, key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(known) - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def krasula(
    prediction: NDArray[np.float64],
    mos: NDArray[np.float64],
    mos_std: NDArray[np.float64],
    *,
    ratings: int | NDArray[np.int64],
    most_pairs: int = 2_000_000,
    seed: int = 123,
) -> Discrimination:
    """Krasula et al.'s analysis of pairs [QoMEX 2016].

    Args:
        prediction: Higher must mean the same as in `mos`.
        mos: The scores.
        mos_std: Standard deviation of the ratings of each image.
        ratings: How many ratings each score is the mean of.
        most_pairs: A seeded sample of this many pairs is taken from larger sets.
        seed: Of that sample.
    """
    first, second = _pairs(len(mos), most_pairs, seed)
    variance = mos_std**2 / np.broadcast_to(np.asarray(ratings, dtype=np.float64), mos.shape)
    gap, spread = mos[first] - mos[second], np.sqrt(variance[first] + variance[second])
    different = np.abs(gap) > stats.norm.ppf(0.975) * spread
    delta = prediction[first] - prediction[second]
    oriented = np.sign(gap[different]) * delta[different]
    auc_different, interval_different = _auc(np.abs(delta[different]), np.abs(delta[~different]))
    # Every pair stands on both sides of the question, once in each order.
    auc_better, _ = _auc(oriented, -oriented)
    return Discrimination(
        n_pairs=len(first),
        n_different=int(np.sum(different)),
        auc_different=auc_different,
        auc_different_interval=interval_different,
        auc_better=auc_better,
        auc_better_interval=_hanley(auc_better, int(np.sum(different)), int(np.sum(different))),
        correct=float(np.mean(oriented > 0)) if len(oriented) else math.nan,
    )


def correlations_between(
    a: NDArray[np.float64], b: NDArray[np.float64], mos: NDArray[np.float64]
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """(A with scores, B with scores, A with B), first of ranks, then of the values themselves."""
    return (srcc(a, mos), srcc(b, mos), srcc(a, b)), (plcc(a, mos), plcc(b, mos), plcc(a, b))


def _auc(
    positive: NDArray[np.float64], negative: NDArray[np.float64]
) -> tuple[float, Interval | None]:
    if not len(positive) or not len(negative):
        return math.nan, None
    ranks = stats.rankdata(np.concatenate([positive, negative]))
    above = float(np.sum(ranks[: len(positive)])) - len(positive) * (len(positive) + 1) / 2
    value = above / (len(positive) * len(negative))
    return value, _hanley(value, len(positive), len(negative))


def _hanley(value: float, n_positive: int, n_negative: int) -> Interval | None:
    """Hanley and McNeil's interval [1982]; too narrow, since pairs share images."""
    if not math.isfinite(value) or min(n_positive, n_negative) < 2:
        return None
    q1, q2 = value / (2 - value), 2 * value**2 / (1 + value)
    variance = (
        value * (1 - value)
        + (n_positive - 1) * (q1 - value**2)
        + (n_negative - 1) * (q2 - value**2)
    ) / (n_positive * n_negative)
    half = 1.959964 * math.sqrt(max(variance, 0.0))
    return Interval(low=max(0.0, value - half), high=min(1.0, value + half), method="hanley-mcneil")


def _pairs(n: int, most: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    if n * (n - 1) // 2 <= most:
        first, second = np.triu_indices(n, 1)
        return first.astype(np.int64), second.astype(np.int64)
    rng = np.random.default_rng(seed)
    first = rng.integers(n, size=most)
    # Shifting by 1..n-1 never meets the image itself.
    return first, (first + rng.integers(1, n, size=most)) % n


def _paired(a: Sequence[float], b: Sequence[float]) -> NDArray[np.float64]:
    if len(a) != len(b):
        raise ValueError(f"paired figures over {len(a)} and {len(b)} splits; use the same splits")
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def _undefined(name: str, reason: str) -> Verdict:
    return Verdict(name=name, statistic=math.nan, p=math.nan, reason=reason)
