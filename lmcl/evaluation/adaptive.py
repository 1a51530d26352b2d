"""Adaptive crops: look at an image's crops in a spread-out order until their mean is known.

A crop's score is one draw from the finite set of an image's crops. After k of v crops the mean of
all v is known to about z s sqrt((1/k) (1 - k/v)), s their deviation; where that is narrow enough
the rest is not looked at. All of it depends on the image alone, never on its neighbours.

Source: sampling without replacement [Cochran, 1977, section 2.5]; the deviation of few crops is
drawn towards the usual one, as an empirical Bayes estimate of variance [Smyth, 2004] does.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_Z = 1.959963984540054
"""Two-sided 95 % of a normal distribution."""
_PRIOR_CROPS = 2.0
"""Crops that the usual deviation weighs as much as."""
_WIDTHS = 60
_MOST_CROPS = 1 << 14
TARGET = 0.997
"""Rank agreement with all crops that the rule is chosen for, on images not learned from; above the
promised .995, since new images are not those it was chosen on."""


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

    def is_enough(self, seen: NDArray[np.float64], crops: int, axis: int = -1) -> NDArray[np.bool_]:
        """Whether the mean of the seen crops `[..., k]` is known well enough, of `crops` in all."""
        count = seen.shape[axis]
        squares = np.sum((seen - seen.mean(axis, keepdims=True)) ** 2, axis=axis)
        freedom = count - 1 + _PRIOR_CROPS
        variance = (squares + _PRIOR_CROPS * self.usual_spread**2) / freedom
        error = np.sqrt(variance / count * max(0.0, 1.0 - count / crops))
        return np.asarray(_Z * error <= self.half_width)

    @property
    def description(self) -> str:
        """The rule in words, for a scores file's origin."""
        return (
            f"adaptive: {self.first}, then {self.step} at a time, until half the 95 % interval of "
            f"their mean is at most {self.half_width:.4g} of quality"
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
    found = []
    for first in sorted({max(2, step), max(2, 2 * step), max(3, 3 * step)}):
        for width in np.geomspace(0.02, 4.0, _WIDTHS) * max(usual, 1e-9):
            rule = AdaptiveRule(
                half_width=float(width),
                usual_spread=usual,
                first=min(first, v),
                step=step,
                agreement=1.0,
                share=1.0,
            )
            found.append(_judged(rule, crops, whole))
    good = [rule for rule in found if rule.agreement >= TARGET]
    return min(good, key=lambda rule: (rule.share, -rule.agreement), default=None)


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
