"""Do the intervals keep their promise? Coverage of scores, over all and inside portions."""

import dataclasses
import math

import numpy as np
from numpy.typing import NDArray

from lmcl.evaluation.calibration import CONFIDENCE
from lmcl.evaluation.predictions import Predictions
from lmcl.evaluation.threshold import Proportion, proportion


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """How often people's scores lie in the intervals of some images."""

    kind: str
    """Empty for all images; subset or distortion."""
    name: str
    covered: Proportion
    width: float
    """Mean width, in units of the scores."""

    @property
    def keeps(self) -> bool:
        """Whether the promised share lies in the 95 % interval of the found one."""
        return self.covered.low <= CONFIDENCE <= self.covered.high


def coverages(p: Predictions, portions: list[tuple[str, str]]) -> list[Coverage]:
    """Coverage over all images and inside portions; empty if the predictions have no intervals.

    Args:
        p: Predictions of images that the intervals were not made on.
        portions: Kind and name of each, e.g. ("subset", "night").
    """
    known = np.isfinite(p.lower) & np.isfinite(p.upper) & np.isfinite(p.mos)
    if not np.any(known):
        return []
    found = [_coverage(p, known, "", "all images")]
    for kind, name in portions:
        mine = known & (getattr(p, kind) == name)
        if np.any(mine):
            found.append(_coverage(p, mine, kind, name))
    return found


def _coverage(p: Predictions, mine: NDArray[np.bool_], kind: str, name: str) -> Coverage:
    inside = (p.lower <= p.mos) & (p.mos <= p.upper)
    widths = (p.upper - p.lower)[mine]
    return Coverage(
        kind=kind,
        name=name,
        covered=proportion(int(np.sum(inside & mine)), int(np.sum(mine))),
        width=float(np.mean(widths)) if len(widths) else math.nan,
    )
