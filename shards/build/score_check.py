"""Whether scores can be what they are said to be: inside their scale, not all alike.

A score outside `--score-range` stops a build: it would leave 0..1, and nothing after it would be
what it seems. What is only strange (most scores equal, a spread on another scale) is a line.
"""

import array

import numpy as np

from shards.errors import ShardError
from shards.sample import Sample
from shards.score_scale import MOST_SPREAD, ScoreScale
from shards.text import printable

_ALIKE = 0.5
_FEW = 10


class ScoreCheck:
    """Looks at the scores of a set, one sample after another."""

    def __init__(self, scale: ScoreScale) -> None:
        self._scale = scale
        self._values = array.array("d")
        self._outside = self._spread = 0
        self._first_outside = self._first_spread = ""
        self._widest = 0.0

    def add(self, sample: Sample) -> None:
        """Look at a sample."""
        if sample.mos is None:
            return
        self._values.append(sample.mos)
        scale = self._scale
        # A score that was written with fewer digits than its scale is not outside.
        margin = 1e-9 * (scale.high - scale.low)
        if not scale.low - margin <= sample.mos <= scale.high + margin:
            self._first_outside = self._first_outside or _place(sample, sample.mos)
            self._outside += 1
        if sample.mos_std is not None and sample.mos_std > MOST_SPREAD * (scale.high - scale.low):
            self._first_spread = self._first_spread or _place(sample, sample.mos_std)
            self._spread += 1
            self._widest = max(self._widest, sample.mos_std)

    def refuse_outside(self, name: str) -> None:
        """Stop if scores leave their scale.

        Raises:
            ShardError: With their number, the first of them and the range they have.
        """
        if not self._outside:
            return
        values, scale = np.frombuffer(self._values), self._scale
        raise ShardError(
            f"{name}: {self._outside:,} of {values.size:,} scores are outside the scale "
            f"{scale.low:g} .. {scale.high:g}, first {self._first_outside}; scores lie between "
            f"{values.min():g} and {values.max():g}: correct the rows, or give the scale's ends "
            "with `--score-range LOW HIGH`",
            exit_code=3,
        )

    def notes(self, name: str) -> list[str]:
        """What is strange, a line each."""
        if not self._values:
            return []
        values = np.frombuffer(self._values)
        low, high = values.min(), values.max()
        found = []
        if low == high and values.size > 1:
            found.append(
                f"{name}: all {values.size:,} scores are {low:g}; nothing can be learned from them"
            )
        elif values.size >= _FEW and (alike := _most_common(values))[1] > _ALIKE * values.size:
            found.append(
                f"{name}: {alike[1]:,} of {values.size:,} scores are {alike[0]:g}, while all lie "
                f"between {low:g} and {high:g}; if {alike[0]:g} stands for no score, remove those "
                "rows"
            )
        if self._spread:
            found.append(
                f"{name}: {self._spread:,} deviations are larger than the scale {self._scale.low:g}"
                f" .. {self._scale.high:g} allows, up to {self._widest:g}, first "
                f"{self._first_spread}; they are on another scale than the scores"
            )
        return found


def _most_common(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> tuple[float, int]:
    found, counts = np.unique(values, return_counts=True)
    place = int(np.argmax(counts))
    return float(found[place]), int(counts[place])


def _place(sample: Sample, value: float) -> str:
    row = f"row {sample.row} " if sample.row is not None else ""
    return f"{row}{printable(sample.path, 80)}: {value:g}"
