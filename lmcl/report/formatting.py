"""How figures and intervals are written for readers, in the page and in Markdown alike."""

import math

from lmcl.evaluation.metrics import LEAST_GROUPS, Evaluation

_NAMES = {
    "srcc": "SRCC",
    "krcc": "KRCC",
    "plcc_raw": "PLCC, raw",
    "plcc_fit4": "PLCC, fitted",
    "plcc_fit5": "PLCC, 5-parameter fit",
    "rmse_raw": "RMSE, raw",
    "rmse_fit4": "RMSE, fitted",
    "mae_raw": "MAE, raw",
    "mae_fit4": "MAE, fitted",
    "outlier_ratio": "Outlier ratio",
}
UNKNOWN = "\N{EN DASH}"


def figure_name(name: str) -> str:
    """How a figure is called for readers."""
    return _NAMES[name]


def format_figure(value: float, digits: int = 3) -> str:
    """A figure with a real minus sign; a dash if it is NaN."""
    if not math.isfinite(value):
        return UNKNOWN
    text = f"{value:.{digits}f}"
    return (text[1:] if float(text) == 0.0 and text[0] == "-" else text).replace(
        "-", "\N{MINUS SIGN}"
    )


def format_interval(evaluation: Evaluation, name: str, digits: int = 3) -> str:
    """The interval of a figure as `low to high`; empty if there is none."""
    interval = evaluation.intervals.get(name)
    if interval is None:
        return ""
    return f"{format_figure(interval.low, digits)} to {format_figure(interval.high, digits)}"


def reason_of_no_interval(evaluation: Evaluation, name: str) -> str:
    """Why a figure has no interval, as a clause; empty if it has one."""
    if name in evaluation.intervals:
        return ""
    if name in evaluation.reasons:
        return evaluation.reasons[name]
    few = min(LEAST_GROUPS, evaluation.n)
    if evaluation.n_groups < few:
        groups = "one group" if evaluation.n_groups == 1 else f"{evaluation.n_groups} groups"
        return f"{groups} of images that depend on each other; an interval needs {few}"
    return f"{evaluation.n} images are too few"


def format_p(p: float) -> str:
    """A p-value as readers expect it."""
    if not math.isfinite(p):
        return UNKNOWN
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"
