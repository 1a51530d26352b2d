"""Thresholds: the cut that keeps a promise, its cost, and the file of rules."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from lmcl.errors import LmclError
from lmcl.evaluation.threshold import (
    THRESHOLDS,
    ThresholdRule,
    choose_cut,
    find_rule,
    judge,
    proportion,
    read_rules,
    threshold_curve,
    write_rule,
)

QUALITIES = st.lists(st.tuples(st.integers(0, 12), st.floats(0, 1)), min_size=3, max_size=40).map(
    lambda pairs: (np.array([p[0] / 12 for p in pairs]), np.array([p[1] for p in pairs]))
)


@pytest.mark.parametrize(("hits", "of"), [(0, 7), (7, 7), (95, 100), (1, 600)])
def test_intervals_of_shares_are_clopper_and_pearsons(hits: int, of: int) -> None:
    found = proportion(hits, of)
    expected = stats.binomtest(hits, of).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_a_share_of_nothing_is_known_to_be_anything() -> None:
    assert (proportion(0, 0).low, proportion(0, 0).high) == (0.0, 1.0)


@settings(deadline=None, max_examples=40)
@given(QUALITIES)
def test_the_curve_counts_what_a_cut_does(pair: tuple[np.ndarray, np.ndarray]) -> None:
    quality, truth = pair
    curve = threshold_curve(quality, truth, bad_below=0.5)
    assert len(curve.cut) == len(np.unique(quality))
    for cut, rejected, caught in zip(curve.cut, curve.rejected, curve.caught, strict=True):
        found = judge(quality, truth, cut=float(cut), bad_below=0.5)
        assert found.rejected.hits == rejected
        assert found.precision.hits == found.recall.hits == caught


@settings(deadline=None, max_examples=40)
@given(QUALITIES, st.floats(0.05, 1.0))
def test_each_promise_is_kept_and_no_cut_that_keeps_it_costs_less(
    pair: tuple[np.ndarray, np.ndarray], wanted: float
) -> None:
    quality, truth = pair
    assume(np.any(truth < 0.5))
    curve = threshold_curve(quality, truth, bad_below=0.5)

    def at(cut: float):
        return judge(quality, truth, cut=cut, bad_below=0.5)

    recall = at(choose_cut(curve, "recall", wanted))
    assert recall.recall.value >= wanted
    fewer = curve.rejected < recall.rejected.hits
    assert np.all(curve.recall[fewer] < wanted)
    if np.max(curve.precision) >= wanted:
        precise = at(choose_cut(curve, "precision", wanted))
        assert precise.precision.value >= wanted
        more = curve.rejected > precise.rejected.hits
        assert np.all(curve.precision[more] < wanted)
    if curve.rejected[0] <= wanted * len(quality):
        share = at(choose_cut(curve, "reject-share", wanted))
        assert share.rejected.value <= wanted + 1e-9


def test_a_promise_that_no_cut_keeps_says_what_the_best_one_does() -> None:
    quality, truth = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.9, 0.1, 0.9, 0.9])
    curve = threshold_curve(quality, truth, bad_below=0.5)
    with pytest.raises(LmclError, match=r"the best has 0\.500") as raised:
        choose_cut(curve, "precision", 0.9)
    assert raised.value.exit_code == 3
    with pytest.raises(LmclError, match="less than one image"):
        choose_cut(curve, "reject-share", 0.2)
    with pytest.raises(LmclError, match="none of the 4 images"):
        choose_cut(threshold_curve(quality, truth, bad_below=0.05), "recall", 0.5)


def rule(name: str = "careful", **changes) -> ThresholdRule:
    quality = np.linspace(0, 1, 20)
    found = judge(quality, quality, cut=0.4, bad_below=0.3)
    values = {
        "name": name,
        "cut": 0.4,
        "bad_below": 0.3,
        "target": "precision",
        "wanted": 0.9,
        "split": "s",
        "val": found,
        "test": found,
    }
    return ThresholdRule(**(values | changes))


def test_rules_are_kept_by_name_and_replaced_by_it(tmp_path) -> None:
    write_rule(tmp_path, rule("a"))
    write_rule(tmp_path, rule("b"))
    write_rule(tmp_path, rule("a", cut=0.5))
    assert sorted(read_rules(tmp_path)) == ["a", "b"]
    assert find_rule(tmp_path, "a") == rule("a", cut=0.5)
    with pytest.raises(LmclError, match=r"it has: a, b"):
        find_rule(tmp_path, "c")


@pytest.mark.parametrize("name", ["", "../up", "a b", "x" * 81, "-x", "a/b", "é"])
def test_a_name_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        rule(name)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[" * 99_999,
        '{"format_version": 2, "rules": []}',
        '{"format_version": 1}',
        " " * (1 << 21),
    ],
    ids=["no-json", "nested", "version", "no-rules", "huge"],
)
def test_a_damaged_file_is_one_sentence_with_a_way_out(tmp_path, text: str) -> None:
    (tmp_path / THRESHOLDS).write_text(text)
    with pytest.raises(LmclError, match="lmcl threshold RUN") as raised:
        read_rules(tmp_path)
    assert raised.value.exit_code == 5
