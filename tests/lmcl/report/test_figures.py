"""Axes and names inside the report's drawings."""

import re

import numpy as np
import pytest

from lmcl.evaluation.threshold import Curve
from lmcl.report.figures import interval_axis, threshold_chart


@pytest.mark.parametrize(
    "axis",
    [(0.66, 0.95), (0.81, 0.99), (-1.02, 1.02), (0.835, 0.875), (0.499, 0.501), (0.1, 0.9)],
    ids=str,
)
def test_an_axis_beside_dots_has_two_numbers_at_least(axis: tuple[float, float]) -> None:
    numbers = re.findall(r"<text[^>]*>([^<]+)</text>", str(interval_axis(axis)))
    assert 2 <= len(numbers) <= 5
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("cuts", [[0.1], [0.9], [0.3, 0.31, 0.32]], ids=str)
def test_names_of_cuts_stand_over_the_curves_inside_the_chart_and_apart(cuts: list[float]) -> None:
    curve = Curve(
        cut=np.linspace(0.0, 1.0, 11),
        rejected=np.arange(1, 12),
        caught=np.minimum(np.arange(1, 12), 4),
        bad=4,
        n=11,
    )
    drawn = str(threshold_chart(curve, [(f"a-rule-with-a-name-{c}", c) for c in cuts]))
    names = [m for m in re.finditer(r"<text[^>]*>a-rule-with-a-name", drawn)]
    assert len(names) == len(cuts)
    assert min(m.start() for m in names) > drawn.rindex("<polyline")
    assert len({re.search(r' y="([^"]*)"', m[0])[1] for m in names}) == len(cuts)
    for m, cut in zip(names, cuts, strict=True):
        assert ('text-anchor="end"' in m[0]) is (cut > 0.5)
