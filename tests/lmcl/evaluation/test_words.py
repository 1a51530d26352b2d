import numpy as np
import pytest

from lmcl.evaluation.metrics import evaluate
from lmcl.evaluation.words import caution_words, figures_words, sets_words

X = np.linspace(0, 1, 40)


def test_figures_and_no_caution_where_images_are_enough() -> None:
    found = evaluate(X, X)
    assert figures_words(found) == "SRCC 1.0000  PLCC 1.0000  (40 images)"
    assert caution_words(found) == ""


def test_few_images_are_cautioned_of_with_the_interval() -> None:
    found = evaluate(X[:20], X[:20] + 0.3 * np.sin(9 * X[:20]))
    interval = found.intervals["srcc"]
    said = f"reaches from {interval.low:.2f} to {interval.high:.2f}"
    assert caution_words(found) == (f"caution: 20 images are few, a 95 % interval of SRCC {said}")


@pytest.mark.parametrize(
    ("x", "y", "why"),
    [
        (X[:1], X[:1], "one image has no correlation (1 image)"),
        (X[:5] * 0, X[:5], "all predictions are equal (5 images)"),
        (X[:5], X[:5] * 0, "all scores are equal (5 images)"),
        (X[:5], X[:5] * np.nan, "no image has a score (0 images)"),
    ],
)
def test_a_missing_figure_says_why(x: np.ndarray, y: np.ndarray, why: str) -> None:
    found = evaluate(x, y)
    assert figures_words(found) == f"SRCC and PLCC are not defined: {why}"
    assert caution_words(found) == ""


def test_a_mean_over_sets_of_which_one_has_no_figure_is_none() -> None:
    found = {"a": evaluate(X, X), "b": evaluate(X[:1], X[:1])}
    assert sets_words(found)[-1] == "mean over 2 sets: not defined, as one of them has no SRCC"
    assert sets_words({"a": found["a"]})[-1] == "mean over 1 sets: SRCC 1.0000"
