import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmcl.evaluation.metrics import krcc, plcc, srcc
from lmcl.evaluation.metrics.correlation import krcc_interval, plcc_interval, srcc_interval

COLUMNS = st.lists(
    st.tuples(st.integers(-20, 20), st.integers(-20, 20)), min_size=3, max_size=40
).map(lambda rows: (np.array(rows, dtype=float)[:, 0], np.array(rows, dtype=float)[:, 1]))


def test_correlations_equal_scipy_under_heavy_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 10, 400).astype(float)
    y = x + rng.integers(-3, 4, 400)
    assert srcc(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert krcc(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert plcc(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_textbook_rank_formula_is_off_under_ties_and_ours_is_not() -> None:
    rng = np.random.default_rng(1)
    y = rng.normal(size=1000)
    x = np.round(2.0 * (y + 0.4 * rng.normal(size=1000)))
    positions = [np.argsort(np.argsort(v)) for v in (x, y)]
    textbook = 1 - 6 * np.sum((positions[0] - positions[1]) ** 2) / (1000 * (1000**2 - 1))
    truth = stats.spearmanr(x, y).statistic
    assert abs(textbook - truth) > 1e-3
    assert srcc(x, y) == pytest.approx(truth, abs=1e-12)


def test_kendall_is_tau_b_on_a_hand_counted_table() -> None:
    # 6 pairs: 4 concordant, 0 discordant, 1 tied in x only, 1 tied in y only; tau-a would be 4/6.
    x, y = np.array([1.0, 1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0, 3.0])
    assert krcc(x, y) == pytest.approx(4 / math.sqrt(5 * 5))


@pytest.mark.parametrize("figure", [srcc, krcc, plcc])
def test_a_constant_column_has_no_correlation(figure) -> None:
    assert math.isnan(figure(np.full(9, 0.1) * 3, np.arange(9.0)))
    assert math.isnan(figure(np.arange(9.0), np.full(9, 4.0)))


@settings(max_examples=50, deadline=None)
@given(COLUMNS)
def test_rank_correlations_ignore_monotone_maps_and_flip_with_the_sign(columns) -> None:
    x, y = columns
    for figure in (srcc, krcc):
        value = figure(x, y)
        assert figure(np.exp(x / 10), y) == pytest.approx(value, abs=1e-9, nan_ok=True)
        assert figure(-x, y) == pytest.approx(-value, abs=1e-9, nan_ok=True)


@settings(max_examples=50, deadline=None)
@given(COLUMNS, st.randoms(use_true_random=False))
def test_the_order_of_images_does_not_matter(columns, random) -> None:
    x, y = columns
    order = list(range(len(x)))
    random.shuffle(order)
    for figure in (srcc, krcc, plcc):
        assert figure(x[order], y[order]) == pytest.approx(figure(x, y), abs=1e-9, nan_ok=True)


def test_pearson_survives_values_at_the_ends_of_float64() -> None:
    x = np.array([1.0, 2.0, 4.0, 3.0])
    assert plcc(x * 1e200, x * 1e-200) == pytest.approx(1.0)


@pytest.mark.parametrize(("n", "half"), [(160, 0.036), (232, 0.030), (600, 0.018), (2000, 0.010)])
def test_rank_interval_has_the_published_half_width(n: int, half: float) -> None:
    interval = srcc_interval(0.90, n)
    assert interval is not None
    assert (interval.high - interval.low) / 2 == pytest.approx(half, abs=0.003)


def test_intervals_cover_the_truth_about_19_times_in_20() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        x = rng.normal(size=80)
        y = 0.7 * x + math.sqrt(1 - 0.49) * rng.normal(size=80)
        interval = plcc_interval(plcc(x, y), 80)
        assert interval is not None
        covered += interval.low <= 0.7 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_no_interval_where_none_is_defined() -> None:
    assert plcc_interval(1.0, 50) is None
    assert srcc_interval(math.nan, 50) is None
    assert krcc_interval(0.5, 4) is None


@pytest.mark.parametrize(("second", "tau"), [(3.0, 1.0), (0.5, -1.0)])
def test_two_images_agree_or_disagree(second: float, tau: float) -> None:
    assert krcc(np.array([1.0, 2.0]), np.array([1.0, second])) == tau
