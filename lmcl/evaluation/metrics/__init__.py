"""How well predictions agree with opinion scores: correlations, mappings, errors, intervals.

Everything is float64 numpy on the CPU, over the whole set at once. A figure that cannot be computed
is NaN and carries its reason; nothing is dropped silently (docs/reports.md).
"""

from lmcl.evaluation.metrics.correlation import Interval, krcc, no_correlation, plcc, srcc
from lmcl.evaluation.metrics.evaluate import (
    LEAST_GROUPS,
    Evaluation,
    LogisticMapping,
    evaluate,
    fit_mapping,
)
from lmcl.evaluation.metrics.logistic import LogisticFit, fit_logistic

__all__ = [
    "LEAST_GROUPS",
    "Evaluation",
    "Interval",
    "LogisticFit",
    "LogisticMapping",
    "evaluate",
    "fit_logistic",
    "fit_mapping",
    "krcc",
    "no_correlation",
    "plcc",
    "srcc",
]
