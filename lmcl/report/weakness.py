"""Where a model is worst, in sentences: the portion it misjudges most, and what it never says."""

import math
from collections.abc import Sequence

import numpy as np

from lmcl.evaluation.predictions import Predictions
from lmcl.report.analysis import FEW, Portion
from lmcl.report.formatting import format_figure
from shards.score_scale import ScoreScale

_UNREACHED = 0.02
"""Share of images beyond every prediction that is worth a sentence."""


def weakness(p: Predictions, portions: Sequence[Portion], scale: ScoreScale) -> str:
    """What a reader should know before relying on the model; empty if nothing stands out.

    Args:
        p: Predictions of the headline part.
        portions: Figures inside its subsets and distortions.
        scale: Of the scores.
    """
    said = [_worst_error(portions), _worst_order(portions), *_unreached(p, scale)]
    return " ".join(s for s in said if s)


def _large(portions: Sequence[Portion]) -> list[Portion]:
    return [q for q in portions if q.evaluation.n >= FEW and math.isfinite(q.evaluation.mae_raw)]


def _worst_error(portions: Sequence[Portion]) -> str:
    large = _large(portions)
    if len(large) < 2:
        return ""
    worst = max(large, key=lambda q: q.evaluation.mae_raw)
    e = worst.evaluation
    order = "" if "srcc" in e.reasons else f", SRCC {format_figure(e.srcc, 2)}"
    return (
        f"Where it is worst: {worst.kind} {worst.name} ({e.n} images), mean error "
        f"{format_figure(worst.bias, 2)}, mean absolute error {format_figure(e.mae_raw, 2)}{order}."
    )


def _worst_order(portions: Sequence[Portion]) -> str:
    large = [q for q in _large(portions) if math.isfinite(q.evaluation.srcc)]
    if len(large) < 2:
        return ""
    worst = min(large, key=lambda q: q.evaluation.srcc)
    if worst is max(_large(portions), key=lambda q: q.evaluation.mae_raw):
        return ""
    return (
        f"The order is least to be trusted inside {worst.kind} {worst.name} "
        f"({worst.evaluation.n} images): SRCC {format_figure(worst.evaluation.srcc, 2)}."
    )


def _unreached(p: Predictions, scale: ScoreScale) -> list[str]:
    """Scores of people that no prediction reaches, at either end."""
    known = np.isfinite(p.mos) & np.isfinite(p.prediction)
    if np.sum(known) < FEW:
        return []
    mos, said = p.mos[known], p.prediction[known]
    high, low = float(np.max(said)), float(np.min(said))
    ends = (
        ("above", high, scale.high, int(np.sum(mos > high))),
        ("below", low, scale.low, int(np.sum(mos < low))),
    )
    return [
        f"No prediction lies {side} {format_figure(end, 2)}{_end_of(scale, edge)}, where people "
        f"put {count} of {len(mos)} images."
        for side, end, edge, count in ends
        if count > _UNREACHED * len(mos)
    ]


def _end_of(scale: ScoreScale, edge: float) -> str:
    return f" (the scale ends at {edge:g})" if scale.is_known else ""
