"""Can the predictions tell apart what people can tell apart? Krasula's analysis of a run's pairs.

It needs the deviation of every image's ratings and their number; where either is not known the
report says so instead of guessing (ratings.toml holds the numbers that are on file).
"""

import dataclasses
import math
import tomllib
from importlib import resources
from typing import Any

import numpy as np

from lmcl.evaluation.predictions import Predictions
from lmcl.evaluation.significance import Discrimination, krasula


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairAnalysis:
    """Krasula's two areas under the curve, or why there are none."""

    found: Discrimination | None
    """None if the analysis could not be made; a NaN inside it has its reason too."""
    ratings: int
    """Ratings that each score is the mean of; 0 if unknown."""
    source: str
    """Where that number comes from."""
    reason: str
    """Why there is no figure, or why one of them is missing; else empty."""

    def to_json(self) -> dict[str, Any]:
        """The `discrimination` of results.json; figures that are not there are null."""
        names = [f.name for f in dataclasses.fields(Discrimination)]
        values = dataclasses.asdict(self.found) if self.found else dict.fromkeys(names)
        return {
            "ratings": self.ratings or None,
            "ratings_source": self.source,
            "reason": self.reason,
            **{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values.items()},
        }


def ratings_of(set_name: str) -> tuple[int, str]:
    """Ratings per image of a set and where the number comes from; 0 if it is not on file."""
    text = resources.files("lmcl.report").joinpath("ratings.toml").read_text(encoding="utf-8")
    entry = tomllib.loads(text).get(set_name.lower())
    return (entry["ratings"], entry["source"]) if entry else (0, "")


def analyse_pairs(p: Predictions, set_name: str, *, ratings: int | None = None) -> PairAnalysis:
    """All pairs of scored images, or a seeded sample of two million of them.

    Args:
        p: Predictions, in the direction of the scores.
        set_name: Of the set they are about.
        ratings: Ratings that each score is the mean of; else what is on file for the set.
    """
    number, source = (ratings, "--ratings") if ratings else ratings_of(set_name)
    scored = p.take(np.isfinite(p.mos))
    reason = _why_not(scored, set_name, number)
    found = None
    if not reason:
        found = krasula(scored.prediction, scored.mos, scored.mos_std, ratings=number)
        reason = _why_in_part(found)
    return PairAnalysis(found=found, ratings=number, source=source, reason=reason)


def _why_not(p: Predictions, set_name: str, ratings: int) -> str:
    unknown = int(np.sum(~np.isfinite(p.mos_std)))
    if len(p) < 2:
        return f"{len(p)} scored images make no pair"
    if unknown == len(p):
        return f"the labels of {set_name} give no standard deviation of an image's ratings"
    if unknown:
        return f"{unknown} of {len(p)} images have no standard deviation of their ratings"
    if not ratings:
        return (
            f"it is not on file how many ratings a score of {set_name} is the mean of; "
            "say so by lmcl report --ratings N"
        )
    if not np.all(np.isfinite(p.prediction)):
        return "not all predictions are finite"
    return ""


def _why_in_part(found: Discrimination) -> str:
    if found.n_different == 0:
        return "no two scores differ significantly"
    if found.n_different == found.n_pairs:
        return "all scores differ significantly, so no pair is similar"
    return ""
