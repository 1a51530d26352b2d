import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.score_scale import UNKNOWN_SCALE, ScoreScale

NUMBERS = st.floats(-1e3, 1e3)


@given(low=NUMBERS, width=st.floats(0.1, 1e3), raw=st.lists(NUMBERS), higher=st.booleans())
def test_from_unit_inverts_to_unit(
    low: float, width: float, raw: list[float], higher: bool
) -> None:
    score = ScoreScale(kind="mos", low=low, high=low + width, higher_is_better=higher)
    np.testing.assert_allclose(score.from_unit(score.to_unit(np.array(raw))), raw, atol=1e-6)


def test_the_better_end_of_a_dmos_is_one() -> None:
    score = ScoreScale(kind="dmos", low=-2.64, high=111.77, higher_is_better=False)
    np.testing.assert_allclose(score.to_unit(np.array([-2.64, 111.77])), [1.0, 0.0], atol=1e-12)


def test_scores_outside_the_range_are_not_clipped() -> None:
    score = ScoreScale(kind="mos", low=0.0, high=10.0, higher_is_better=True)
    assert score.to_unit(np.array([12.0]))[0] == pytest.approx(1.2)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low < high"):
        ScoreScale(kind="mos", low=low, high=high, higher_is_better=True)


@pytest.mark.parametrize(
    ("scale", "label", "description"),
    [
        (
            ScoreScale(kind="mos", low=1.0, high=5.0, higher_is_better=True),
            "mos 1..5",
            "MOS 1 to 5, higher is better",
        ),
        (
            ScoreScale(kind="dmos", low=-2.64, high=111.77, higher_is_better=False),
            "dmos -2.64..111.77",
            "DMOS -2.64 to 111.77, lower is better",
        ),
        (
            ScoreScale(kind="", low=0.0, high=1.0, higher_is_better=True),
            "0..1",
            "score 0 to 1, higher is better",
        ),
    ],
)
def test_a_scale_is_said_one_way(scale: ScoreScale, label: str, description: str) -> None:
    assert (scale.label, scale.description, scale.is_known) == (label, description, True)


def test_a_scale_that_was_not_recorded_says_so() -> None:
    assert UNKNOWN_SCALE.description == "scale not recorded"
    assert not UNKNOWN_SCALE.is_known


def test_a_range_whose_width_is_no_number_is_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        ScoreScale(kind="mos", low=-1e308, high=1e308, higher_is_better=True)
