import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmcl.evaluation import significance as statistics


def two_models(
    rng: np.random.Generator, *, n: int = 150, gap: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, and two models with partly shared errors; the first is better by `gap`."""
    mos, shared = rng.normal(size=n), rng.normal(size=n)
    a = mos + 0.4 * shared + (0.5 - gap) * rng.normal(size=n)
    return a, mos + 0.4 * shared + 0.5 * rng.normal(size=n), mos


@pytest.mark.parametrize("test", [statistics.williams, statistics.meng, statistics.steiger])
def test_dependent_correlation_tests_reject_equal_models_one_time_in_twenty(test) -> None:
    rng = np.random.default_rng(0)
    rejected = 0
    for _ in range(600):
        a, b, mos = two_models(rng)
        _, values = statistics.correlations_between(a, b, mos)
        rejected += test(*values, len(mos)).p < 0.05
    assert 0.03 <= rejected / 600 <= 0.08


@pytest.mark.parametrize("test", [statistics.williams, statistics.meng, statistics.steiger])
def test_dependent_correlation_tests_find_a_real_difference_that_fisher_misses(test) -> None:
    r_a, r_b, r_ab, n = 0.90, 0.87, 0.95, 200
    z = (math.atanh(r_a) - math.atanh(r_b)) / math.sqrt(2 / (n - 3))
    assert 2 * stats.norm.sf(z) > 0.05
    assert test(r_a, r_b, r_ab, n).p < 0.005


def test_the_three_dependent_tests_agree_on_a_large_sample() -> None:
    p = [
        t(0.90, 0.88, 0.9, 400).p
        for t in (statistics.williams, statistics.meng, statistics.steiger)
    ]
    assert max(p) / min(p) < 1.6


@pytest.mark.parametrize("test", [statistics.williams, statistics.meng])
def test_a_model_against_itself_has_no_p_value_but_a_reason(test) -> None:
    found = test(0.9, 0.9, 1.0, 100)
    assert math.isnan(found.p)
    assert found.reason


def test_f_test_equals_the_f_distribution_and_warns_of_heavy_tails() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(scale=1.3, size=120), rng.normal(size=120)
    found = statistics.f_test(a, b)
    assert found.statistic == pytest.approx(np.var(a, ddof=1) / np.var(b, ddof=1))
    assert found.p == pytest.approx(2 * stats.f.sf(found.statistic, 119, 119))
    assert found.reason == ""
    assert "kurtosis" in statistics.f_test(rng.standard_t(2, size=120), b).reason


def test_paired_tests_over_splits_agree_with_scipy() -> None:
    a = [0.81, 0.84, 0.79, 0.86, 0.83, 0.82, 0.85, 0.80, 0.84, 0.83]
    b = [0.80, 0.82, 0.80, 0.84, 0.81, 0.81, 0.82, 0.79, 0.83, 0.80]
    assert statistics.wilcoxon(a, b).p == pytest.approx(
        stats.wilcoxon(np.subtract(a, b), zero_method="pratt").pvalue
    )
    assert statistics.sign_test(a, b).p == pytest.approx(stats.binomtest(9, 10).pvalue)


def test_nadeau_bengio_is_more_careful_than_the_plain_paired_t_test() -> None:
    rng = np.random.default_rng(2)
    a, b = (rng.normal(m, 0.01, 10).tolist() for m in (0.85, 0.84))
    plain = stats.ttest_rel(a, b)
    found = statistics.nadeau_bengio(a, b, n_train=700, n_test=200)
    assert found.statistic == pytest.approx(plain.statistic * math.sqrt(0.1 / (0.1 + 2 / 7)))
    assert found.p > plain.pvalue


def test_few_splits_are_said_to_be_too_few() -> None:
    assert "never below" in statistics.wilcoxon([0.8, 0.9, 0.85], [0.7, 0.8, 0.8]).reason
    assert math.isnan(statistics.wilcoxon([0.8, 0.9], [0.8, 0.9]).p)


def test_bootstrap_difference_needs_the_groups() -> None:
    rng = np.random.default_rng(3)
    groups = np.repeat(np.arange(15), 20)
    mos = rng.uniform(0, 100, 300)
    shift = np.repeat(rng.normal(scale=30, size=(15, 2)), 20, axis=0)
    a, b = mos + shift[:, 0], mos + shift[:, 1]
    grouped = statistics.srcc_difference(a, b, mos, groups)
    alone = statistics.srcc_difference(a, b, mos, np.arange(300))
    assert grouped.interval is not None
    assert alone.interval is not None
    assert grouped.interval.high - grouped.interval.low > alone.interval.high - alone.interval.low
    assert 0 < grouped.p <= 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=12))
def test_holm_never_lowers_a_p_value_and_keeps_their_order(p) -> None:
    corrected = statistics.holm(p)
    order = np.argsort(p, kind="stable")
    assert all(c >= v for c, v in zip(corrected, p, strict=True))
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)
    assert max(corrected) <= 1


def test_holm_on_a_textbook_row() -> None:
    corrected = statistics.holm([0.01, 0.04, math.nan, 0.03])
    assert corrected[:2] == pytest.approx([0.03, 0.06])
    assert corrected[3] == pytest.approx(0.06)
    assert math.isnan(corrected[2])


def test_krasula_separates_a_good_model_from_noise() -> None:
    rng = np.random.default_rng(4)
    mos = rng.uniform(0, 100, 120)
    sd = np.full(120, 15.0)
    good = statistics.krasula(mos + rng.normal(scale=5, size=120), mos, sd, ratings=25)
    noise = statistics.krasula(rng.normal(size=120), mos, sd, ratings=25)
    assert good.n_pairs == 120 * 119 // 2
    assert good.auc_better > 0.98
    assert good.correct > 0.95
    assert good.auc_different > 0.85
    assert noise.auc_better == pytest.approx(0.5, abs=0.08)
    assert noise.auc_different == pytest.approx(0.5, abs=0.08)


def test_krasula_auc_is_the_mann_whitney_statistic() -> None:
    rng = np.random.default_rng(5)
    mos = rng.uniform(0, 10, 30)
    prediction = mos + rng.normal(size=30)
    found = statistics.krasula(prediction, mos, np.full(30, 1.0), ratings=4)
    first, second = np.triu_indices(30, 1)
    different = np.abs(mos[first] - mos[second]) > stats.norm.ppf(0.975) * math.sqrt(0.5)
    gap = np.abs(prediction[first] - prediction[second])
    u = stats.mannwhitneyu(gap[different], gap[~different]).statistic
    assert found.auc_different == pytest.approx(u / (different.sum() * (~different).sum()))


def test_a_sample_of_pairs_gives_nearly_the_same_answer() -> None:
    rng = np.random.default_rng(6)
    mos = rng.uniform(0, 100, 400)
    prediction, sd = mos + rng.normal(scale=12, size=400), np.full(400, 15.0)
    every = statistics.krasula(prediction, mos, sd, ratings=20)
    some = statistics.krasula(prediction, mos, sd, ratings=20, most_pairs=20_000)
    assert some.n_pairs == 20_000
    assert some.auc_better == pytest.approx(every.auc_better, abs=0.01)
