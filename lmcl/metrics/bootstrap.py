"""Resampling whole groups: images that show one reference are not independent of each other."""

import math

import numpy as np
from numpy.typing import NDArray

from lmcl.metrics.correlation import Interval, plcc, srcc


def group_resamples(
    groups: NDArray[np.int64], *, resamples: int, seed: int
) -> list[NDArray[np.int64]]:
    """Row indices of each bootstrap round: as many groups as there are, drawn with replacement."""
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    draws = rng.integers(len(members), size=(resamples, len(members)))
    return [np.concatenate([members[i] for i in draw]) for draw in draws]


def bootstrap_intervals(
    prediction: NDArray[np.float64],
    mapped: NDArray[np.float64],
    mos: NDArray[np.float64],
    groups: NDArray[np.int64],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Interval]:
    """Percentile intervals of `srcc`, `plcc_raw` and `plcc_fit4`; the mapping is not refitted.

    Args:
        prediction: As the model gave them.
        mapped: After the 4-parameter mapping, negated if the model is inverted.
        mos: The scores.
        groups: Whole numbers; equal means dependent.
        resamples: Rounds.
        seed: Of the draws.
    """
    rows = group_resamples(groups, resamples=resamples, seed=seed)
    values = {
        "srcc": [srcc(prediction[r], mos[r]) for r in rows],
        "plcc_raw": [plcc(prediction[r], mos[r]) for r in rows],
        "plcc_fit4": [plcc(mapped[r], mos[r]) for r in rows if np.isfinite(mapped[0])],
    }
    found = {name: _percentiles(np.array(drawn)) for name, drawn in values.items()}
    return {name: interval for name, interval in found.items() if interval is not None}


def _percentiles(drawn: NDArray[np.float64]) -> Interval | None:
    kept = drawn[np.isfinite(drawn)]
    # A round in which one column is constant has no correlation; half of them is no distribution.
    if len(kept) == 0 or len(kept) < math.ceil(len(drawn) / 2):
        return None
    low, high = np.percentile(kept, [2.5, 97.5])
    return Interval(low=float(low), high=float(high), method="cluster-bootstrap")
