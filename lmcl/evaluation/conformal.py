"""Split-conformal prediction intervals: residuals of images the model did not learn from.

An image's interval reaches from its score by a quantile of the errors on the calibration images,
each divided by how far the image's own crops disagree: upwards by one of those that were too low,
downwards by one of those that were too high, as a model errs to one side where its images are odd.
Where the calibration images are of several groups, the misses are shared out between both sides,
and spread and classes are used or not, so that the groups' coverages differ least from the promise.
If a new image and the calibration images could have been drawn in any order, it holds the people's
score with at least the asked probability, whatever the model; numpy alone, so that scoring needs no
scipy.

Source: [Vovk, Gammerman, Shafer, 2005] (Mondrian classes); [Papadopoulos et al., 2002; Lei et al.,
2018] (normalised residuals); [Linusson, Johansson, Loefstroem, 2014] (signed ones).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any] | Sequence[float] | float
"""What numpy makes an array of float64 of."""
MOST_CLASSES = 3
"""Classes of predicted quality with residuals of their own."""
IMAGES_A_CLASS = 100
"""Calibration images for each class; with fewer the quantiles of a class are noise."""
LEAST_IN_CLASS = 40
"""A class with fewer images is joined with the others; where there are fewer in all, residuals lose
their sign."""
SHARES = (0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.6, 0.7, 0.75, 0.8, 0.85)
"""Shares of the misses that may lie below an interval; the usual one first."""
CHOSEN_AT = 0.9
"""Confidence at which shares are compared."""
LEAST_IN_GROUP = 40
"""A group with fewer calibration images has no say."""
_TINY = 1e-6
"""Least spread that residuals are divided by, in units of quality."""


def conformal_quantile(scores: Numbers, confidence: float) -> float:
    """The ceil((n + 1) confidence)-th smallest of n scores: the exact finite-sample quantile.

    Returns:
        Infinity if n is too small for the confidence: no finite interval keeps the promise.

    Raises:
        ValueError: If the confidence is not inside (0, 1).
    """
    check_confidence(confidence)
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    # 1e-9: (9 + 1) * 0.9 is a little more than 9 in binary, and would ask for the tenth.
    rank = math.ceil((len(ordered) + 1) * confidence - 1e-9)
    return float(ordered[rank - 1]) if rank <= len(ordered) else math.inf


def check_confidence(confidence: float) -> None:
    """Refuse what is no probability of an interval.

    Raises:
        ValueError: If it is not inside (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"a confidence lies between 0 and 1, got {confidence:g}; 0.9 is usual")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conformal:
    """Normalised residuals of the calibration images, by class of predicted quality."""

    floor: float
    """Added to an image's spread before residuals are divided by it, in units of quality."""
    edges: tuple[float, ...]
    """Predicted qualities between the classes, rising; one fewer than there are classes."""
    residuals: tuple[tuple[float, ...], ...]
    """(score - prediction) / (spread + floor) of each class's images, rising; without its sign
    unless `is_signed`."""
    is_signed: bool = False
    """Whether residuals have a sign. Those of earlier versions have none, and few images have none
    either: both ends of an interval need twice as many as their distance from the middle."""
    below: float = 0.5
    """Share of the misses that may lie below an interval; of residuals with a sign."""
    uses_spread: bool = True
    """Whether residuals are divided by the spread too, or by the floor alone."""

    def __post_init__(self) -> None:
        """Refuse what `fit_conformal` cannot have made.

        Raises:
            ValueError: Names what is wrong.
        """
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"floor is {self.floor:g}; it is a number above 0")
        if len(self.residuals) != len(self.edges) + 1:
            raise ValueError(f"{len(self.residuals)} classes need {len(self.residuals) - 1} edges")
        for rising in (self.edges, *self.residuals):
            if not all(map(math.isfinite, rising)) or list(rising) != sorted(rising):
                raise ValueError("edges and residuals are finite and rise")
        if not self.is_signed and any(one and one[0] < 0 for one in self.residuals):
            raise ValueError("residuals without a sign are absolute values")
        if not 0 < self.below < 1:
            raise ValueError(f"below is {self.below:g}; the residuals' share lies between 0 and 1")

    @property
    def n(self) -> int:
        """Calibration images."""
        return sum(map(len, self.residuals))

    @property
    def confidences(self) -> tuple[float, ...]:
        """The greatest confidence that each class has intervals for; 0: it has none."""
        sides = 2 if self.is_signed else 1
        return tuple(max(0.0, 1 - sides / (len(one) + 1)) for one in self.residuals)

    def reach(
        self, quality: Numbers, spread: Numbers, *, confidence: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far intervals reach below and above a quality; infinite if n is small.

        Both are at least 0, so that an interval holds what the model says. Where a class has too
        few images for its rarer side, both sides have the same share.
        """
        check_confidence(confidence)
        place = np.searchsorted(np.asarray(self.edges), np.asarray(quality), side="right")
        scale = np.asarray(spread, np.float64) * self.uses_spread + self.floor
        of_class = np.array([self._ends(np.asarray(one), confidence) for one in self.residuals])
        return np.asarray(of_class[place, 0] * scale), np.asarray(of_class[place, 1] * scale)

    def _ends(self, residuals: NDArray[np.float64], confidence: float) -> tuple[float, float]:
        """Residuals of a class that its intervals reach to, below and above."""
        if not self.is_signed:
            end = max(conformal_quantile(residuals, confidence), 0.0)
            return end, end
        ends = (math.inf, math.inf)
        for share in (self.below, 0.5):
            ends = (
                max(conformal_quantile(-residuals, 1 - (1 - confidence) * share), 0.0),
                max(conformal_quantile(residuals, 1 - (1 - confidence) * (1 - share)), 0.0),
            )
            if all(map(math.isfinite, ends)):
                break
        return ends


def fit_conformal(
    quality: NDArray[np.float64],
    truth: NDArray[np.float64],
    spread: NDArray[np.float64],
    *,
    floor: float,
    edges_from: NDArray[np.float64],
    groups: NDArray[Any] | None = None,
) -> Conformal:
    """Residuals of calibration images.

    With two groups or more that have enough images, the way is taken that keeps the promise best in
    the group where it keeps it least. Among so few ways that choice costs next to nothing of the
    promise (docs/decisions/0441).

    Args:
        quality: Predictions on images the model has not learned from, in [0, 1] units.
        truth: What people said of them, in the same units; NaN is left out.
        spread: Deviation of each image's crops.
        floor: What is added to it; of other images than these, so that the promise stays exact.
        edges_from: Predictions on other images; classes hold equal shares of them.
        groups: What each image belongs to, as subsets of its set; None: nothing is known.
    """
    known = np.isfinite(truth) & np.isfinite(quality)
    quality, truth, spread = quality[known], truth[known], spread[known]
    floor = max(float(floor), _TINY)
    edges = _edges(quality, edges_from)
    usual = _residuals(quality, truth, spread, floor=floor, edges=edges, uses_spread=True)
    members = [] if groups is None else _members(np.asarray(groups)[known])
    if len(members) < 2 or not usual.is_signed:
        return usual
    ways = [
        dataclasses.replace(one, below=share)
        for some in dict.fromkeys((tuple(edges.tolist()), ()))
        for uses_spread in (True, False)
        for one in [
            _residuals(
                quality,
                truth,
                spread,
                floor=floor,
                edges=np.asarray(some, dtype=np.float64),
                uses_spread=uses_spread,
            )
        ]
        for share in SHARES
    ]
    return min(ways, key=lambda way: _furthest(way, quality, truth, spread, members))


def _members(groups: NDArray[Any]) -> list[NDArray[np.bool_]]:
    """Which images are of each group that has enough."""
    found = [groups == name for name in np.unique(groups)]
    return [one for one in found if np.sum(one) >= LEAST_IN_GROUP]


def _furthest(
    way: Conformal,
    quality: NDArray[np.float64],
    truth: NDArray[np.float64],
    spread: NDArray[np.float64],
    members: Sequence[NDArray[np.bool_]],
) -> float:
    """How far a group's coverage lies from the promise, where it lies furthest.

    Rounded, so that equal ways come in their own order on every machine.
    """
    below, above = way.reach(quality, spread, confidence=CHOSEN_AT)
    error = truth - quality
    inside = (-below <= error) & (error <= above)
    return round(max(abs(float(np.mean(inside[one])) - CHOSEN_AT) for one in members), 9)


def _residuals(
    quality: NDArray[np.float64],
    truth: NDArray[np.float64],
    spread: NDArray[np.float64],
    *,
    floor: float,
    edges: NDArray[np.float64],
    uses_spread: bool,
) -> Conformal:
    normalised = (truth - quality) / (spread * uses_spread + floor)
    place = np.searchsorted(edges, quality, side="right")
    counts = np.bincount(place, minlength=len(edges) + 1)
    is_signed = bool(counts.min() >= LEAST_IN_CLASS)
    if not is_signed:
        normalised = np.abs(normalised)
    classes = [np.sort(normalised[place == c]).tolist() for c in range(len(edges) + 1)]
    return Conformal(
        floor=floor,
        edges=tuple(edges.tolist()),
        residuals=tuple(map(tuple, classes)),
        is_signed=is_signed,
        uses_spread=uses_spread,
    )


def _edges(quality: NDArray[np.float64], edges_from: NDArray[Any]) -> NDArray[np.float64]:
    """Edges of as many classes as have enough calibration images each."""
    most = min(MOST_CLASSES, len(quality) // IMAGES_A_CLASS)
    for classes in range(most, 1, -1):
        edges = np.quantile(edges_from, np.arange(1, classes) / classes)
        counts = np.bincount(np.searchsorted(edges, quality, side="right"), minlength=classes)
        if counts.min() >= LEAST_IN_CLASS:
            return np.asarray(edges, dtype=np.float64)
    return np.zeros(0)
