import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.sample import Score

NUMBERS = st.floats(-1e3, 1e3)


@given(low=NUMBERS, width=st.floats(0.1, 1e3), raw=st.lists(NUMBERS), higher=st.booleans())
def test_from_unit_inverts_to_unit(
    low: float, width: float, raw: list[float], higher: bool
) -> None:
    score = Score(kind="mos", low=low, high=low + width, higher_is_better=higher)
    np.testing.assert_allclose(score.from_unit(score.to_unit(np.array(raw))), raw, atol=1e-6)


def test_the_better_end_of_a_dmos_is_one() -> None:
    score = Score(kind="dmos", low=-2.64, high=111.77, higher_is_better=False)
    np.testing.assert_allclose(score.to_unit(np.array([-2.64, 111.77])), [1.0, 0.0], atol=1e-12)


def test_scores_outside_the_range_are_not_clipped() -> None:
    score = Score(kind="mos", low=0.0, high=10.0, higher_is_better=True)
    assert score.to_unit(np.array([12.0]))[0] == pytest.approx(1.2)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_an_empty_range_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="low < high"):
        Score(kind="mos", low=low, high=high, higher_is_better=True)
