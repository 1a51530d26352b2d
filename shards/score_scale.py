"""The scale of a score: its kind, its ends, and which end is better.

One class from a set's labels to a model's answers and a report's axes. A newcomer's trap: scores
are always raw, in their set's own scale and direction; only `to_unit` turns them into "higher is
better, 0 to 1", and it never clips.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["mos", "dmos", ""]

MOST_SCORE = 1e15
"""No score and no end of a scale is further from 0: sums and squares of scores stay finite."""

MOST_SPREAD = 0.75
"""How far an image's ratings can deviate, 1 being the scale's length: two opinions at its ends
deviate by 0.71, more opinions by less."""


@dataclass(frozen=True, kw_only=True)
class ScoreScale:
    """The scale of a set's raw scores, and of what a model trained on the set answers."""

    kind: Kind
    """Mean opinion score, difference to the reference's, or empty: neither, or not recorded."""
    low: float
    """Lower end of the set's own range."""
    high: float
    """Upper end of the set's own range."""
    higher_is_better: bool
    """Direction of the raw score; a column called `dmos` may well be a MOS (KADID-10k)."""

    def __post_init__(self) -> None:
        is_range = self.low < self.high and math.isfinite(self.high - self.low)
        if not (is_range or (math.isnan(self.low) and math.isnan(self.high))):
            raise ValueError(f"a score range needs low < high, got {self.low} .. {self.high}")

    @property
    def is_known(self) -> bool:
        """False for `UNKNOWN_SCALE`: a run that recorded none."""
        return math.isfinite(self.low)

    @property
    def name(self) -> str:
        """How the scores are called on axes: `MOS`, `DMOS` or `score`."""
        return self.kind.upper() or "score"

    @property
    def label(self) -> str:
        """Kind and range, as in scores files after the set's name: `mos 0..100`."""
        return f"{self.kind} {self.low:g}..{self.high:g}".lstrip()

    @property
    def description(self) -> str:
        """Kind, range and direction, as a sentence's end: `MOS 1 to 5, higher is better`."""
        if not self.is_known:
            return "scale not recorded"
        better = "higher" if self.higher_is_better else "lower"
        return f"{self.name} {self.low:g} to {self.high:g}, {better} is better"

    def to_unit(self, raw: NDArray[Any] | float) -> NDArray[np.float64]:
        """Raw scores as "higher is better", 0 at the worse end of the range and 1 at the better.

        A raw score outside the range leaves [0, 1]; nothing is clipped. NaN stays NaN.
        """
        unit = (np.asarray(raw, np.float64) - self.low) / (self.high - self.low)
        return unit if self.higher_is_better else 1.0 - unit

    def from_unit(self, unit: NDArray[Any] | float) -> NDArray[np.float64]:
        """The inverse of `to_unit`."""
        values = np.asarray(unit, np.float64)
        if not self.higher_is_better:
            values = 1.0 - values
        return self.low + values * (self.high - self.low)


def scale_of_range(low: float, high: float, *, lower_is_better: bool) -> ScoreScale:
    """The scale that `--score-range LOW HIGH` and `--lower-is-better` say.

    Raises:
        ValueError: If the ends are no two finite numbers, the lower one first.
    """
    if not (low < high and math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"--score-range needs two finite numbers, LOW < HIGH, got {low:g} {high:g}"
        )
    kind: Kind = "dmos" if lower_is_better else "mos"
    return ScoreScale(kind=kind, low=low, high=high, higher_is_better=not lower_is_better)


UNKNOWN_SCALE = ScoreScale(kind="", low=math.nan, high=math.nan, higher_is_better=True)
"""Of a run that did not record its scale."""
