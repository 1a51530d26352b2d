"""Split-conformal prediction intervals: residuals of images the model did not learn from.

An image's interval reaches from its score by a quantile of the errors on the calibration images,
each divided by how far the image's own crops disagree: upwards by one of those that were too low,
downwards by one of those that were too high, as a model errs to one side where its images are odd.
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

    @property
    def n(self) -> int:
        """Calibration images."""
        return sum(map(len, self.residuals))

    def reach(
        self, quality: Numbers, spread: Numbers, *, confidence: float
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far intervals reach below and above a quality; infinite if n is small.

        Both are at least 0, so that an interval holds what the model says.
        """
        check_confidence(confidence)
        place = np.searchsorted(np.asarray(self.edges), np.asarray(quality), side="right")
        scale = np.asarray(spread, np.float64) + self.floor
        ends = []
        for sign in (-1.0, 1.0):
            level = (1 + confidence) / 2 if self.is_signed else confidence
            errors = [np.asarray(one) * (sign if self.is_signed else 1.0) for one in self.residuals]
            of_class = np.array([max(conformal_quantile(one, level), 0.0) for one in errors])
            ends.append(np.asarray(of_class[place] * scale))
        return ends[0], ends[1]


def fit_conformal(
    quality: NDArray[np.float64],
    truth: NDArray[np.float64],
    spread: NDArray[np.float64],
    *,
    floor: float,
    edges_from: NDArray[np.float64],
) -> Conformal:
    """Residuals of calibration images.

    Args:
        quality: Predictions on images the model has not learned from, in [0, 1] units.
        truth: What people said of them, in the same units; NaN is left out.
        spread: Deviation of each image's crops.
        floor: What is added to it; of other images than these, so that the promise stays exact.
        edges_from: Predictions on other images; classes hold equal shares of them.
    """
    known = np.isfinite(truth) & np.isfinite(quality)
    quality, truth, spread = quality[known], truth[known], spread[known]
    floor = max(float(floor), _TINY)
    normalised = (truth - quality) / (spread + floor)
    edges = _edges(quality, edges_from)
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
