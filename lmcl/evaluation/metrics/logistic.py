"""The monotone mapping from predictions to opinion scores that PLCC and RMSE are taken after.

The initial values in circulation fail on heads that end in a sigmoid (234 of 720 fits for the
4-parameter form, up to 381 for the 5-parameter form). Standardising both columns, orienting by the
sign of the rank correlation and starting from several slopes leaves no failure
(tests/lmcl/evaluation/metrics/test_logistic.py repeats the 720).
"""

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special

from lmcl.evaluation.metrics.correlation import is_constant, srcc

Form = Literal["logistic4", "logistic5"]
Status = Literal["ok", "linear_fallback", "none"]

# Relative slack when the curve's residual is compared with the straight line's: for data that are
# exactly linear the best logistic lies at infinity, and the optimiser stops just short of it.
_SLACK = 1e-6
_GRID = 512
# On linear data the parameters run away for ever; a few dozen steps reach the line to 1e-6.
_MAX_STEPS = 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogisticFit:
    """A fitted mapping, kept with everything needed to apply it again."""

    form: Form
    """Which formula was asked for."""
    status: Status
    """`linear_fallback` if the curve was refused, `none` if nothing could be fitted."""
    reason: str
    """Why the status is not `ok`; empty if it is."""
    parameters: tuple[float, ...]
    """Of the curve (docs/reports.md) in standardised predictions; of a line: slope, offset."""
    centre: float
    """Mean of the predictions the fit has seen."""
    scale: float
    """Their standard deviation."""
    target_centre: float
    """Mean of the scores."""
    target_scale: float
    """Their standard deviation."""
    sign: int
    """-1 if the predictions fall as the scores rise, else 1."""

    def __call__(self, prediction: NDArray[np.float64]) -> NDArray[np.float64]:
        """Predictions in the units of the scores; NaN everywhere if nothing could be fitted."""
        if self.status == "none":
            return np.full(len(prediction), math.nan)
        z = self.sign * (prediction - self.centre) / self.scale
        curve = _CURVES[self.form] if self.status == "ok" else _line
        return self.target_centre + self.target_scale * curve(z, np.array(self.parameters))


def fit_logistic(
    prediction: NDArray[np.float64], mos: NDArray[np.float64], *, form: Form = "logistic4"
) -> LogisticFit:
    """Fit the mapping; a curve that is not finite, not monotone or worse than a line is refused.

    Source: VQEG's 4-parameter form; the 5-parameter form of Sheikh et al. [2006].
    """
    if len(prediction) < 6 or is_constant(prediction) or is_constant(mos):
        few = len(prediction) < 6
        reason = f"{len(prediction)} samples are too few" if few else "a column is constant"
        return _nothing(form, reason)
    sign = -1 if srcc(prediction, mos) < 0 else 1
    x_mean, x_sd = float(np.mean(prediction)), float(np.std(prediction))
    y_mean, y_sd = float(np.mean(mos)), float(np.std(mos))
    x, y = sign * (prediction - x_mean) / x_sd, (mos - y_mean) / y_sd
    line = np.array([float(np.mean(x * y)), 0.0])
    parameters, reason = _best_curve(x, y, line, form)
    return LogisticFit(
        form=form,
        status="linear_fallback" if reason else "ok",
        reason=reason,
        parameters=tuple(float(p) for p in (line if reason else parameters)),
        centre=x_mean,
        scale=x_sd,
        target_centre=y_mean,
        target_scale=y_sd,
        sign=sign,
    )


def _best_curve(
    x: NDArray[np.float64], y: NDArray[np.float64], line: NDArray[np.float64], form: Form
) -> tuple[NDArray[np.float64], str]:
    """Best acceptable parameters over all starts, or the reason why there are none."""
    curve = _CURVES[form]
    limit = float(np.sum((_line(x, line) - y) ** 2)) * (1.0 + _SLACK) + 1e-12
    grid = np.linspace(x.min(), x.max(), _GRID)
    best, best_cost, reason = line, math.inf, ""
    for parameters in _candidates(x, y, line, form):
        cost = float(np.sum((curve(x, parameters) - y) ** 2))
        refusal = _refusal(curve(grid, parameters), cost, limit)
        if refusal:
            reason = reason or refusal
        elif cost < best_cost:
            best, best_cost = parameters, cost
    return best, "" if math.isfinite(best_cost) else reason


def _candidates(
    x: NDArray[np.float64], y: NDArray[np.float64], line: NDArray[np.float64], form: Form
) -> list[NDArray[np.float64]]:
    """Local optima from every start; for the 5-parameter form also the best 4-parameter curve.

    The free 5-parameter optimum is often not monotone; the 4-parameter curve is the member of the
    same family without the linear term, so a monotone curve is always among the candidates.
    """
    curve, jacobian = _CURVES[form], _JACOBIANS[form]
    # Of a degenerate fit scipy computes a covariance that overflows; we use the parameters alone,
    # and check them ourselves.
    with np.errstate(over="ignore", invalid="ignore"):
        found = [
            optimize.leastsq(
                lambda p: curve(x, p) - y,
                start,
                Dfun=lambda p: jacobian(x, p),
                maxfev=_MAX_STEPS,
                full_output=True,  # or scipy warns where we check the result ourselves
            )[0]
            for start in _starts(form, y, float(line[0]))
        ]
    if form == "logistic5":
        four, refused = _best_curve(x, y, line, "logistic4")
        if not refused:
            top, bottom, middle, width = four
            found.append(np.array([top - bottom, 1 / _width(width), middle, 0, (top + bottom) / 2]))
    return found


def _refusal(values: NDArray[np.float64], cost: float, limit: float) -> str:
    if not (np.all(np.isfinite(values)) and math.isfinite(cost)):
        return "the curve is not finite"
    if np.any(np.diff(values) < -1e-9):
        return "the curve is not monotone on the range of the predictions"
    return "the curve fits worse than a straight line" if cost > limit else ""


def _starts(form: Form, y: NDArray[np.float64], slope: float) -> list[NDArray[np.float64]]:
    top, bottom = float(y.max()), float(y.min())
    # A wide logistic around zero is the straight line a + slope * x: the last start.
    if form == "logistic4":
        near_line = np.array([10.0 * slope, -10.0 * slope, 0.0, 5.0])
        return [np.array([top, bottom, 0.0, s]) for s in (1.0, 0.5, 2.0)] + [near_line]
    return [np.array([top - bottom, s, 0.0, 0.1, 0.0]) for s in (1.0, 0.5, 2.0)] + [
        np.array([0.1, 1.0, 0.0, slope, 0.0])
    ]


def _logistic4(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b1 - b2) / (1 + exp(-(x - b3) / |b4|)) + b2."""
    rise = special.expit((x - p[2]) / _width(p[3]))
    return np.asarray(p[1] + (p[0] - p[1]) * rise, dtype=np.float64)


def _logistic5(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    """b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5."""
    bend = special.expit(p[1] * (x - p[2])) - 0.5
    return np.asarray(p[0] * bend + p[3] * x + p[4], dtype=np.float64)


def _line(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(p[0] * x + p[1], dtype=np.float64)


def _jacobian4(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    width = _width(p[3])
    z = (x - p[2]) / width
    s = special.expit(z)
    steep = (p[0] - p[1]) * s * (1.0 - s) / width
    return np.stack([s, 1.0 - s, -steep, -steep * z * np.sign(p[3])], axis=1)


def _jacobian5(x: NDArray[np.float64], p: NDArray[np.float64]) -> NDArray[np.float64]:
    s = special.expit(p[1] * (x - p[2]))
    steep = p[0] * s * (1.0 - s)
    return np.stack([s - 0.5, steep * (x - p[2]), -steep * p[1], x, np.ones_like(x)], axis=1)


def _width(b4: float) -> float:
    return max(abs(float(b4)), 1e-6)


_CURVES = {"logistic4": _logistic4, "logistic5": _logistic5}
_JACOBIANS = {"logistic4": _jacobian4, "logistic5": _jacobian5}


def _nothing(form: Form, reason: str) -> LogisticFit:
    return LogisticFit(
        form=form,
        status="none",
        reason=reason,
        parameters=(),
        centre=0.0,
        scale=1.0,
        target_centre=0.0,
        target_scale=1.0,
        sign=1,
    )
