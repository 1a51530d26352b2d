"""Figures of a model that learned from several sets: each set's own, and their mean.

Correlations are taken within a set and averaged over the sets: scores of two sets are of different
people, ranges and pictures, and a correlation over all of them would be between the sets' means.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lmcl.evaluation.metrics import Evaluation, evaluate, no_correlation, plcc, srcc
from lmcl.evaluation.predict import PartPredictions
from lmcl.models.set_scales import SetScales
from shards.joined import JoinedSet
from shards.read import ShardSet

_MEANS = ("srcc", "krcc", "plcc_raw")


@dataclass(frozen=True, kw_only=True)
class ValFigures:
    """What an epoch is chosen by."""

    srcc: float | None
    """None where it is not defined."""
    plcc: float | None
    reason: str
    """Why there is none; empty if there is."""
    by_set: dict[str, float] | None = None
    """SRCC of each set, where there are several; `srcc` is their mean."""


def val_figures(shard_set: ShardSet, found: PartPredictions) -> ValFigures:
    """Correlations of predictions on the val part; over several sets their means."""
    mos = shard_set.unit_mos()[found.ids]
    if not isinstance(shard_set, JoinedSet):
        reason = no_correlation(found.score, mos)
        if reason:
            return ValFigures(srcc=None, plcc=None, reason=reason)
        return ValFigures(srcc=srcc(found.score, mos), plcc=plcc(found.score, mos), reason="")
    ranks, lines = {}, []
    for number, name in enumerate(shard_set.names):
        own = shard_set.set_of(found.ids) == number
        if reason := no_correlation(found.score[own], mos[own]):
            return ValFigures(srcc=None, plcc=None, reason=f"{name}: {reason}")
        ranks[name] = srcc(found.score[own], mos[own])
        lines.append(plcc(found.score[own], mos[own]))
    return ValFigures(
        srcc=float(np.mean(list(ranks.values()))),
        plcc=float(np.mean(lines)),
        reason="",
        by_set=ranks,
    )


def to_own_scales(joined: JoinedSet, scales: SetScales, found: PartPredictions) -> PartPredictions:
    """Predictions on the shared scale brought to the scale of each image's set, [0, 1] units."""
    number = joined.set_of(found.ids)
    crops = found.crops
    if crops.size:
        of_crop = np.broadcast_to(number[:, None], crops.shape)
        crops = _apply(scales, crops, of_crop)
    return replace(found, score=_apply(scales, found.score, number), crops=crops)


def to_set_scale(scales: SetScales, number: int, found: PartPredictions) -> PartPredictions:
    """Predictions on the shared scale brought to that of one set, [0, 1] units."""
    crops = found.crops
    if crops.size:
        crops = _apply(scales, crops, np.full(crops.shape, number))
    of_image = np.full(found.score.shape, number)
    return replace(found, score=_apply(scales, found.score, of_image), crops=crops)


def shared_truth(joined: JoinedSet, scales: SetScales) -> NDArray[np.float64]:
    """Every row's score on the shared scale, as far as its set's line can be turned round."""
    mos = torch.from_numpy(np.array(joined.samples.mos))
    number = torch.from_numpy(joined.set_of(joined.samples.id))
    with torch.no_grad():
        found: NDArray[np.float64] = (
            copy.deepcopy(scales).cpu().double().to_shared(mos, number).numpy()
        )
    return found


def set_figures(joined: JoinedSet, found: PartPredictions) -> dict[str, Evaluation]:
    """Figures of each set in its own scale.

    Args:
        joined: The sets.
        found: Predictions on the scale of each image's set (`to_own_scales`).
    """
    samples, figures = joined.samples, {}
    for number, name in enumerate(joined.names):
        own = found.take(joined.set_of(found.ids) == number)
        if not len(own.ids):
            continue
        scale = joined.scale_of(number)
        figures[name] = evaluate(
            scale.from_unit(own.score),
            scale.from_unit(samples.mos[own.ids]),
            mos_std=samples.mos_std[own.ids] * (scale.high - scale.low),
            group=samples.group[own.ids],
        )
    return figures


def sets_tree(joined: JoinedSet, found: PartPredictions) -> dict[str, Any]:
    """Part of metrics.json: each set's figures in its own scale, and means over the sets."""
    figures = set_figures(joined, found)
    means = {
        name: float(np.mean([one.figure(name) for one in figures.values()])) for name in _MEANS
    }
    return {
        "sets": {name: one.to_json() for name, one in figures.items()},
        "mean_over_sets": {k: None if np.isnan(v) else v for k, v in means.items()},
    }


def _apply(
    scales: SetScales, score: NDArray[np.float64], number: NDArray[np.int64]
) -> NDArray[np.float64]:
    device = scales.offset.device
    with torch.no_grad():
        mapped = scales(
            torch.from_numpy(np.ascontiguousarray(score)).to(device),
            torch.from_numpy(np.ascontiguousarray(number)).to(device),
        )
    found: NDArray[np.float64] = mapped.double().cpu().numpy()
    return found
