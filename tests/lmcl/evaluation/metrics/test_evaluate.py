import json
import math

import numpy as np
import pytest

from lmcl.evaluation.metrics import bootstrap, evaluate, fit_mapping, krcc, plcc, srcc
from lmcl.evaluation.metrics.bootstrap import (
    PairSigns,
    counted_plcc,
    counted_srcc,
    group_counts,
)
from lmcl.evaluation.metrics.evaluate import FIGURES


def scores(n: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mos = rng.uniform(0, 100, n)
    return mos + rng.normal(scale=12, size=n), mos


def test_every_figure_is_finite_on_ordinary_scores() -> None:
    prediction, mos = scores()
    found = evaluate(prediction, mos, mos_std=np.full(len(mos), 10.0))
    assert all(math.isfinite(found.figure(name)) for name in FIGURES)
    assert found.reasons == {}
    assert set(found.intervals) >= {"srcc", "krcc", "plcc_raw", "plcc_fit4"}


def test_an_inverted_model_shows_a_negative_sign_before_and_after_the_mapping() -> None:
    prediction, mos = scores()
    found = evaluate(-prediction, mos)
    assert found.srcc < -0.8
    assert found.plcc_raw < -0.8
    assert found.plcc_fit4 < -0.8


def test_constant_predictions_are_nan_with_a_reason() -> None:
    found = evaluate(np.full(40, 0.5), np.arange(40.0))
    assert math.isnan(found.srcc)
    assert math.isnan(found.plcc_fit4)
    assert "predictions are equal" in found.reasons["srcc"]


def test_predictions_that_are_not_finite_are_counted_and_never_dropped() -> None:
    prediction, mos = scores(50)
    prediction[[3, 8]] = math.nan, math.inf
    found = evaluate(prediction, mos)
    assert found.n == 50
    assert all(math.isnan(found.figure(name)) for name in FIGURES)
    assert found.reasons["srcc"] == "2 of 50 predictions are not finite"


def test_unlabelled_images_are_counted_apart() -> None:
    prediction, mos = scores(50)
    mos[:10] = math.nan
    found = evaluate(prediction, mos)
    assert (found.n, found.n_unlabelled) == (40, 10)


def test_shared_references_widen_the_interval() -> None:
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(20), 30)
    mos = rng.uniform(0, 100, 600)
    prediction = mos + np.repeat(rng.normal(scale=25, size=20), 30) + rng.normal(size=600)
    plain, grouped = evaluate(prediction, mos), evaluate(prediction, mos, group=group)
    width = [e.intervals["srcc"].high - e.intervals["srcc"].low for e in (plain, grouped)]
    assert width[1] > 2 * width[0]
    assert grouped.intervals["srcc"].method == "cluster-bootstrap"
    assert grouped.n_groups == 20


def test_the_bootstrap_gives_the_same_interval_on_every_run() -> None:
    prediction, mos = scores(120)
    group = np.arange(120) // 6
    first, second = (evaluate(prediction, mos, group=group) for _ in range(2))
    assert first.intervals == second.intervals


def test_too_few_groups_give_no_interval_rather_than_a_narrow_one() -> None:
    prediction, mos = scores(40)
    assert evaluate(prediction, mos, group=np.arange(40) // 10).intervals == {}
    assert evaluate(prediction, mos, group=np.arange(40) // 8).intervals != {}


def test_outliers_are_counted_in_standard_deviations_of_the_ratings() -> None:
    mos = np.linspace(0, 10, 100)
    prediction = mos.copy()
    prediction[::10] += np.where(np.arange(10) % 2, 6.0, -6.0)
    identity = fit_mapping(mos, mos, fit_on="other")
    found = evaluate(prediction, mos, mos_std=np.full(100, 2.0), mapping=identity)
    assert found.outlier_ratio == pytest.approx(0.1)
    assert math.isnan(evaluate(prediction, mos).outlier_ratio)


def test_a_mapping_fitted_elsewhere_is_used_as_it_is() -> None:
    prediction, mos = scores()
    here, there = slice(150, None), slice(0, 150)
    mapping = fit_mapping(prediction[there], mos[there], fit_on="val")
    found = evaluate(prediction[here], mos[here], mapping=mapping)
    before = evaluate(prediction[there], mos[there])
    assert (found.fit4, found.fit5, found.fit_on) == (before.fit4, before.fit5, "val")
    mapped4, mapped5 = before.fit4(prediction[here]), before.fit5(prediction[here])
    rmse = float(np.sqrt(np.mean((mapped4 - mos[here]) ** 2)))
    assert found.rmse_fit4 == pytest.approx(rmse)
    assert found.plcc_fit5 == pytest.approx(np.corrcoef(mapped5, mos[here])[0, 1])


def test_half_precision_predictions_collapse_to_ties_without_moving_the_rank_correlation() -> None:
    rng = np.random.default_rng(6)
    mos = rng.uniform(20, 80, 2015)
    prediction = (mos + rng.normal(scale=7, size=2015)).astype(np.float32)
    bf16 = (prediction.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    assert len(np.unique(bf16)) < 400
    assert evaluate(bf16, mos).srcc == pytest.approx(evaluate(prediction, mos).srcc, abs=5e-4)


def test_json_holds_null_where_a_figure_is_nan() -> None:
    text = json.dumps(evaluate(np.zeros(9), np.arange(9.0)).to_json(), allow_nan=False)
    assert json.loads(text)["srcc"] is None


def test_columns_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="mos has 3 values, the predictions 4"):
        evaluate(np.zeros(4), np.zeros(3))


def test_counted_rounds_equal_copied_rows_even_under_ties() -> None:
    rng = np.random.default_rng(8)
    x, y = rng.integers(0, 9, 60).astype(float), rng.integers(0, 9, 60).astype(float)
    (counts,) = group_counts(np.arange(60) // 4, resamples=20, seed=1)
    found = (counted_srcc(x, y, counts), counted_plcc(x, y, counts), PairSigns(x, y).krcc(counts))
    for drawn, ranked, linear, ordered in zip(counts, *found, strict=True):
        rows = np.repeat(np.arange(60), drawn.astype(int))
        assert len(rows) == 60
        assert ranked == pytest.approx(srcc(x[rows], y[rows]), abs=1e-12)
        assert linear == pytest.approx(plcc(x[rows], y[rows]), abs=1e-12)
        assert ordered == pytest.approx(krcc(x[rows], y[rows]), abs=1e-12)


def test_kendalls_interval_by_expansion_is_that_of_exact_counting(monkeypatch) -> None:
    prediction, mos = scores(1200)
    group = np.arange(1200) // 4
    exact = evaluate(prediction, mos, group=group, resamples=200).intervals["krcc"]
    monkeypatch.setattr(bootstrap, "_MOST_EXACT", 100)
    expanded = evaluate(prediction, mos, group=group, resamples=200).intervals["krcc"]
    assert expanded.low == pytest.approx(exact.low, abs=0.004)
    assert expanded.high == pytest.approx(exact.high, abs=0.004)
