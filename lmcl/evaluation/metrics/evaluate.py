"""All figures of one model on one set of images, in the set's own units."""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmcl.evaluation.metrics.bootstrap import bootstrap_intervals
from lmcl.evaluation.metrics.correlation import (
    Interval,
    krcc,
    krcc_interval,
    no_correlation,
    plcc,
    plcc_interval,
    srcc,
    srcc_interval,
)
from lmcl.evaluation.metrics.logistic import LogisticFit, fit_logistic

FitOn = Literal["test", "val", "train", "other"]
LEAST_GROUPS = 5
"""With fewer groups than these a bootstrap over them says nothing; there is no interval then."""
FIGURES = (
    "srcc",
    "krcc",
    "plcc_raw",
    "plcc_fit4",
    "plcc_fit5",
    "rmse_raw",
    "rmse_fit4",
    "mae_raw",
    "mae_fit4",
    "outlier_ratio",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticMapping:
    """Both mappings from predictions to scores, fitted on other images than those judged."""

    fit4: LogisticFit
    """The 4-parameter form."""
    fit5: LogisticFit
    """The 5-parameter form."""
    fit_on: FitOn
    """Which part they were fitted on."""
    n: int
    """Labelled images they were fitted on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Figures of one model on one set; a NaN figure has a sentence in `reasons`.

    Correlations keep their sign: a model that is inverted shows a negative value, before and after
    the mapping.
    """

    n: int
    """Labelled images the figures are taken over."""
    n_unlabelled: int
    """Images without a score; there is nothing to compare them with."""
    n_groups: int
    """Independent groups (references, or the images themselves)."""
    srcc: float
    """Spearman's rank correlation, average ranks."""
    krcc: float
    """Kendall's tau-b."""
    plcc_raw: float
    """Pearson's correlation of the predictions as they are."""
    plcc_fit4: float
    """Pearson's correlation after the 4-parameter mapping, signed as the ranks are."""
    plcc_fit5: float
    """The same after the 5-parameter mapping."""
    rmse_raw: float
    """Root mean square error of the predictions as they are, in units of the scores."""
    rmse_fit4: float
    """The same after the 4-parameter mapping."""
    mae_raw: float
    """Mean absolute error of the predictions as they are."""
    mae_fit4: float
    """The same after the 4-parameter mapping."""
    outlier_ratio: float
    """Share of images off by more than two deviations of their ratings, after the mapping."""
    fit4: LogisticFit
    """The 4-parameter mapping."""
    fit5: LogisticFit
    """The 5-parameter mapping."""
    fit_on: FitOn
    """Which part the mapping was fitted on; `test`: the judged images themselves."""
    intervals: dict[str, Interval]
    """95 % intervals by the figure's name."""
    reasons: dict[str, str]
    """Why a figure is NaN, by its name."""

    def figure(self, name: str) -> float:
        """One of `FIGURES` by name."""
        return float(getattr(self, name))

    def to_json(self) -> dict[str, Any]:
        """What stands in metrics.json: NaN becomes null, so that every JSON reader takes it."""
        found = dataclasses.asdict(self)
        for name in FIGURES:
            found[name] = None if math.isnan(found[name]) else found[name]
        return found


def fit_mapping(prediction: ArrayLike, mos: ArrayLike, *, fit_on: FitOn) -> LogisticMapping:
    """Both mappings on the labelled images of one part, to be applied to another.

    A mapping that cannot be fitted has the status `none` and says why.
    """
    x, y = _column(prediction, "prediction"), _column(mos, "mos")
    _require_equal_length(x, y, "mos")
    labelled = np.isfinite(y)
    x, y = x[labelled], y[labelled]
    return LogisticMapping(
        fit4=fit_logistic(x, y, form="logistic4"),
        fit5=fit_logistic(x, y, form="logistic5"),
        fit_on=fit_on,
        n=len(y),
    )


def evaluate(
    prediction: ArrayLike,
    mos: ArrayLike,
    *,
    mos_std: ArrayLike | None = None,
    group: ArrayLike | None = None,
    mapping: LogisticMapping | None = None,
    resamples: int = 1000,
    seed: int = 123,
) -> Evaluation:
    """Compare predictions with scores.

    Args:
        prediction: One value per image, any finite scale; float32 or better.
        mos: The set's raw scores; NaN marks an unlabelled image, which is counted and left out.
        mos_std: Standard deviation of each image's ratings, for the outlier ratio; NaN: unknown.
        group: What makes images dependent, e.g. the reference they show. If any group has more
            than one image the intervals come from a bootstrap over groups; else they are analytic.
        mapping: Made on another part by `fit_mapping`; else the judged images themselves are used.
        resamples: Bootstrap rounds; 0 leaves the analytic intervals, too narrow for groups.
        seed: Of the bootstrap.

    Raises:
        ValueError: If the columns differ in length.

    A prediction that is not finite is never dropped: all figures are NaN with that reason.
    """
    x, y = _column(prediction, "prediction"), _column(mos, "mos")
    _require_equal_length(x, y, "mos")
    labelled = np.isfinite(y)
    groups = np.arange(len(x)) if group is None else _groups(group, len(x))
    x, y, groups = x[labelled], y[labelled], groups[labelled]
    sd = np.full(len(y), math.nan)
    if mos_std is not None:
        spread = _column(mos_std, "mos_std")
        _require_equal_length(spread, labelled, "mos_std")
        sd = spread[labelled]
    why = _why_not(x, y)
    if why:
        fit_on = mapping.fit_on if mapping else "test"
        return _refused(len(y), int(np.sum(~labelled)), len(np.unique(groups)), fit_on, why)
    mapping = mapping or fit_mapping(x, y, fit_on="test")
    return _evaluate_clean(x, y, sd, groups, int(np.sum(~labelled)), mapping, resamples, seed)


def _evaluate_clean(
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    sd: NDArray[np.float64],
    groups: NDArray[np.int64],
    n_unlabelled: int,
    mapping: LogisticMapping,
    resamples: int,
    seed: int,
) -> Evaluation:
    fit4, fit5 = mapping.fit4, mapping.fit5
    mapped4, mapped5 = fit4(x), fit5(x)
    figures = {
        "srcc": srcc(x, y),
        "krcc": krcc(x, y),
        "plcc_raw": plcc(x, y),
        "plcc_fit4": fit4.sign * plcc(mapped4, y),
        "plcc_fit5": fit5.sign * plcc(mapped5, y),
        "rmse_raw": _rmse(x, y),
        "rmse_fit4": _rmse(mapped4, y),
        "mae_raw": float(np.mean(np.abs(x - y))),
        "mae_fit4": float(np.mean(np.abs(mapped4 - y))),
        "outlier_ratio": _outlier_ratio(mapped4, y, sd),
    }
    reasons = {
        name: _reason(name, x, y, fit4, fit5) for name in FIGURES if math.isnan(figures[name])
    }
    n_groups = len(np.unique(groups))
    if resamples > 0 and n_groups < min(LEAST_GROUPS, len(y)):
        # Too few to resample, and images of one group are no independent sample either.
        intervals = {}
    elif n_groups < len(y) and resamples > 0:
        signed = fit4.sign * mapped4
        intervals = bootstrap_intervals(x, signed, y, groups, resamples=resamples, seed=seed)
    else:
        intervals = _analytic(figures, len(y))
    return Evaluation(
        n=len(y),
        n_unlabelled=n_unlabelled,
        n_groups=n_groups,
        **figures,
        fit4=fit4,
        fit5=fit5,
        fit_on=mapping.fit_on,
        intervals=intervals,
        reasons=reasons,
    )


def _analytic(figures: dict[str, float], n: int) -> dict[str, Interval]:
    found = {
        "srcc": srcc_interval(figures["srcc"], n),
        "krcc": krcc_interval(figures["krcc"], n),
        "plcc_raw": plcc_interval(figures["plcc_raw"], n),
        "plcc_fit4": plcc_interval(figures["plcc_fit4"], n),
        "plcc_fit5": plcc_interval(figures["plcc_fit5"], n),
    }
    return {name: interval for name, interval in found.items() if interval is not None}


def _why_not(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    bad = int(np.sum(~np.isfinite(x)))
    if len(y) == 0:
        return "no image has a score"
    return f"{bad} of {len(x)} predictions are not finite" if bad else ""


def _reason(
    name: str,
    x: NDArray[np.float64],
    y: NDArray[np.float64],
    fit4: LogisticFit,
    fit5: LogisticFit,
) -> str:
    if name == "outlier_ratio":
        return "the standard deviations of the ratings are not known"
    if why := no_correlation(x, y):
        return why
    fit = fit5 if name.endswith("5") else fit4
    return f"no mapping: {fit.reason}"


def _outlier_ratio(
    mapped: NDArray[np.float64], y: NDArray[np.float64], sd: NDArray[np.float64]
) -> float:
    if not np.all(np.isfinite(sd)) or not np.all(np.isfinite(mapped)):
        return math.nan
    return float(np.mean(np.abs(mapped - y) > 2.0 * sd))


def _rmse(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2)))


def _column(values: ArrayLike, name: str) -> NDArray[np.float64]:
    column = np.asarray(values, dtype=np.float64)
    if column.ndim != 1:
        raise ValueError(f"{name} must be one value per image, got shape {column.shape}")
    return column


def _groups(group: ArrayLike, n: int) -> NDArray[np.int64]:
    names = np.asarray(group)
    if names.shape != (n,):
        raise ValueError(f"group must be one name per image, got shape {names.shape} for {n}")
    return np.unique(names.astype(str), return_inverse=True)[1].astype(np.int64)


def _require_equal_length(x: NDArray[Any], y: NDArray[Any], name: str) -> None:
    if len(x) != len(y):
        raise ValueError(
            f"{name} has {len(y)} values, the predictions {len(x)}; give one per image"
        )


def _refused(n: int, n_unlabelled: int, n_groups: int, fit_on: FitOn, why: str) -> Evaluation:
    nothing = np.zeros(0)
    return Evaluation(
        n=n,
        n_unlabelled=n_unlabelled,
        n_groups=n_groups,
        **dict.fromkeys(FIGURES, math.nan),
        fit4=fit_logistic(nothing, nothing, form="logistic4"),
        fit5=fit_logistic(nothing, nothing, form="logistic5"),
        fit_on=fit_on,
        intervals={},
        reasons=dict.fromkeys(FIGURES, why),
    )
