"""Adaptive crops: look at an image's crops in a spread-out order until their mean is known.

A crop's score is one draw from the finite set of an image's crops. After k of v crops the mean of
all v is known to about z s sqrt((1/k) (1 - k/v)), s their deviation; where that is narrow enough
the rest is not looked at. One crop says nothing of its own deviation: where a rule begins with one,
a second is looked at where the usual deviation at its score, times how many images of the val part
have such a score, is large: there an error moves an image past many others. All of it depends on
the image alone, never on its neighbours.

Source: sampling without replacement [Cochran, 1977, section 2.5]; the deviation of few crops is
drawn towards the usual one, as an empirical Bayes estimate of variance [Smyth, 2004] does.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
"""Two-sided 95 % of a normal distribution."""
_PRIOR_CROPS = 2.0
"""Crops that the usual deviation weighs as much as."""
_WIDTHS = 60
_KNOTS = 33
_BANDWIDTH = 0.3
"""Of the kernel over first crops' qualities, in units of their deviation."""
_LEAST_FOR_RISK = 200
"""Images that a risk by quality is learned from; with fewer it is noise."""
_MOST_CROPS = 1 << 14
TARGET = 0.997
"""Rank agreement with all crops that the rule is chosen for, on images not learned from; above the
promised .995, since new images are not those it was chosen on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class FirstCrop:
    """When an image's first crop is enough by itself."""

    quality: tuple[float, ...]
    """Of first crops, rising."""
    risk: tuple[float, ...]
    """At each of them: density of images times the usual deviation of a crop."""
    limit: float
    """Least risk that is too much."""

    def __post_init__(self) -> None:
        """Refuse what `choose_rule` cannot have made.

        Raises:
            ValueError: Names what is wrong.
        """
        numbers = (*self.quality, *self.risk, self.limit)
        is_short = 2 <= len(self.quality) <= _MOST_CROPS
        if (
            not is_short
            or len(self.quality) != len(self.risk)
            or not all(map(math.isfinite, numbers))
        ):
            raise ValueError("quality and risk of only are equally many numbers, two or more")
        if any(a >= b for a, b in itertools.pairwise(self.quality)) or min(self.risk) < 0:
            raise ValueError("quality of only rises, and its risk is 0 or more")

    def risk_at(self, quality: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Risk of images whose first crop has a quality; between those listed on a line."""
        return np.asarray(np.interp(quality, self.quality, self.risk))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaptiveRule:
    """When to stop looking at an image's crops."""

    half_width: float
    """Half the 95 % interval of the mean that is narrow enough, in units of quality."""
    usual_spread: float
    """Deviation of the crops of a usual image, in units of quality."""
    first: int
    """Crops that are looked at in any case."""
    step: int
    """Crops that are then added at a time."""
    agreement: float
    """Rank correlation with all crops on the images it was chosen on."""
    share: float
    """Share of their crops that were looked at."""
    only: FirstCrop | None = None
    """Which images one crop is enough for; None: none, or `first` is not 1."""

    def __post_init__(self) -> None:
        """Refuse what `choose_rule` cannot have made.

        Raises:
            ValueError: Names what is wrong.
        """
        numbers = (self.half_width, self.usual_spread, self.agreement, self.share)
        if not all(map(math.isfinite, numbers)) or min(self.half_width, self.usual_spread) < 0:
            raise ValueError("half_width and usual_spread are numbers from 0 on")
        if not (1 <= self.first <= _MOST_CROPS and 1 <= self.step <= _MOST_CROPS):
            raise ValueError(f"first and step lie in 1..{_MOST_CROPS}")
        if self.only is not None and self.first != 1:
            raise ValueError("only is of a rule whose first is 1")

    def is_enough(self, seen: NDArray[np.float64], crops: int, axis: int = -1) -> NDArray[np.bool_]:
        """Whether the mean of the seen crops `[..., k]` is known well enough, of `crops` in all."""
        count = seen.shape[axis]
        if count == 1 < crops and self.only is not None:
            # Not a number is not less than the limit, and goes on.
            return np.asarray(self.only.risk_at(seen.mean(axis)) < self.only.limit)
        squares = np.sum((seen - seen.mean(axis, keepdims=True)) ** 2, axis=axis)
        freedom = count - 1 + _PRIOR_CROPS
        variance = (squares + _PRIOR_CROPS * self.usual_spread**2) / freedom
        error = np.sqrt(variance / count * max(0.0, 1.0 - count / crops))
        return np.asarray(_Z * error <= self.half_width)

    @property
    def description(self) -> str:
        """The rule in words, for a scores file's origin."""
        alone = "" if self.only is None else " where many images have a score like its own"
        return (
            f"adaptive: {self.first}, then{alone} {self.step} at a time, until half the 95 % "
            f"interval of their mean is at most {self.half_width:.4g} of quality"
        )

    def counts(self, crops: int) -> list[int]:
        """How many crops have been looked at after each round: the last is all of them."""
        first = min(self.first, crops)
        return [*range(first, crops, self.step), crops]


def crop_order(boxes: NDArray[np.int32] | Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """Order of an image's crops `[v, 4]` in which any first few lie far apart.

    Begins in the middle; each next crop is the one whose nearest chosen one is furthest away, the
    earlier one of equals. A function of the boxes alone.
    """
    corners = np.asarray(boxes, dtype=np.int64)[:, :2].astype(np.float64)
    middle = (corners.min(axis=0) + corners.max(axis=0)) / 2
    order = [int(np.argmin(np.sum((corners - middle) ** 2, axis=1)))]
    nearest = np.full(len(corners), math.inf)
    while len(order) < len(corners):
        nearest = np.minimum(nearest, np.sum((corners - corners[order[-1]]) ** 2, axis=1))
        nearest[order[-1]] = -1.0
        order.append(int(np.argmax(nearest)))
    return np.array(order, dtype=np.int64)


def crops_needed(rule: AdaptiveRule, crops: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many crops of each image `[n, v]`, in the order of looking, the rule looks at."""
    n, v = crops.shape
    needed = np.full(n, v, dtype=np.int64)
    for count in reversed(rule.counts(v)[:-1]):
        needed[rule.is_enough(crops[:, :count], v)] = count
    return needed


def adaptive_means(rule: AdaptiveRule, crops: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the crops `[n, v]` that the rule looks at."""
    needed = crops_needed(rule, crops)
    seen = np.arange(crops.shape[1])[None, :] < needed[:, None]
    return np.asarray(np.sum(np.where(seen, crops, 0.0), axis=1) / needed)


def choose_rule(crops: NDArray[np.float64]) -> AdaptiveRule | None:
    """The rule with the fewest forward passes whose order agrees with that of all crops.

    Args:
        crops: Qualities `[n, v]` of images the model has not learned from, in the order of looking.

    Returns:
        None if there are too few images or crops to choose one.
    """
    n, v = crops.shape
    whole = crops.mean(axis=1)
    if n < 20 or v < 3 or float(np.ptp(whole)) == 0.0:
        return None
    usual = float(np.sqrt(np.mean(np.var(crops, axis=1, ddof=1))))
    step = max(1, round(v / 9))
    starts: list[tuple[int, FirstCrop | None]] = [
        (min(first, v), None) for first in sorted({max(2, step), 2 * step, 3 * step})
    ]
    if n >= _LEAST_FOR_RISK and usual > 0.0:
        starts += [(1, only) for only in _first_crops(crops)]
    found = []
    for first, only in starts:
        for width in np.geomspace(0.02, 4.0, _WIDTHS) * max(usual, 1e-9):
            rule = AdaptiveRule(
                half_width=float(width),
                usual_spread=usual,
                first=first,
                step=step,
                agreement=1.0,
                share=1.0,
                only=only,
            )
            found.append(_judged(rule, crops, whole))
    good = [rule for rule in found if rule.agreement >= TARGET]
    return min(good, key=lambda rule: (rule.share, -rule.agreement), default=None)


def _first_crops(crops: NDArray[np.float64]) -> list[FirstCrop]:
    """What makes one crop enough for 5, 10, to 90 % of images `[n, v]`."""
    first, scale = crops[:, 0], float(np.std(crops[:, 0]))
    if scale <= 0.0:
        return []
    knots = np.linspace(first.min(), first.max(), _KNOTS)
    weight = np.exp(-0.5 * ((knots[:, None] - first) / (_BANDWIDTH * scale)) ** 2)
    error = np.sqrt(weight @ (first - crops.mean(axis=1)) ** 2 / weight.sum(axis=1))
    risk = weight.mean(axis=1) * error
    one = FirstCrop(quality=tuple(knots.tolist()), risk=tuple(risk.tolist()), limit=0.0)
    limits = np.quantile(one.risk_at(first), np.arange(1, 19) / 20)
    return [dataclasses.replace(one, limit=float(limit)) for limit in limits]


def _judged(
    rule: AdaptiveRule, crops: NDArray[np.float64], whole: NDArray[np.float64]
) -> AdaptiveRule:
    # Scoring reads rules and chooses none: it goes without scipy.
    from scipy import stats

    agreement = float(stats.spearmanr(adaptive_means(rule, crops), whole).statistic)
    share = float(np.mean(crops_needed(rule, crops)) / crops.shape[1])
    return dataclasses.replace(
        rule, agreement=agreement if math.isfinite(agreement) else 0.0, share=share
    )
