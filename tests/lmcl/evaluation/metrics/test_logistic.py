import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcl.evaluation.metrics import fit_logistic, plcc

SETS = {
    "koniq": lambda rng: np.clip(rng.normal(58.7, 15.6, 400), 3.9, 88.4),
    "live": lambda rng: np.clip(rng.normal(48.6, 27.0, 400), -2.64, 111.77),
    "csiq": lambda rng: np.clip(rng.beta(1.1, 2.0, 400) * 1.02 - 0.01, 0.0, 1.0),
}
WARPS = {
    "linear": lambda z: z,
    "sigmoid": lambda z: 1.0 / (1.0 + np.exp(-2.5 * z)),
    "exp": lambda z: np.exp(1.5 * z),
    "rescaled": lambda z: 1e4 + 1e-3 * z,
}


def torture_grid(seeds):
    """Sets x warps x directions x noise x seeds: with ten, the 720 fits of evaluation.md 2.2."""
    for name, warp, sign, noise, seed in itertools.product(
        SETS, WARPS, (1, -1), (0.1, 0.35, 0.8), range(seeds)
    ):
        rng = np.random.default_rng([seed, list(SETS).index(name), int(100 * noise)])
        mos = SETS[name](rng)
        z = (mos - mos.mean()) / mos.std() + noise * rng.normal(size=400)
        yield WARPS[warp](sign * z), mos


@pytest.mark.parametrize("seeds", [1, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["logistic4", "logistic5"])
def test_no_failure_on_the_720_fits(form, seeds) -> None:
    fits, fallbacks = 0, 0
    for prediction, mos in torture_grid(seeds):
        fit = fit_logistic(prediction, mos, form=form)
        mapped = fit(prediction)
        line = np.polyval(np.polyfit(prediction, mos, 1), prediction)
        fits += 1
        fallbacks += fit.status != "ok"
        assert np.all(np.isfinite(mapped))
        assert np.sum((mapped - mos) ** 2) <= np.sum((line - mos) ** 2) * (1 + 1e-5) + 1e-9
    assert fits == 72 * seeds
    assert fallbacks == 0


@settings(max_examples=25, deadline=None)
@given(st.floats(0.01, 1000.0), st.floats(-1000.0, 1000.0), st.sampled_from([1, -1]))
def test_the_mapped_values_do_not_depend_on_scale_or_direction(scale, shift, sign) -> None:
    rng = np.random.default_rng(3)
    mos = rng.uniform(0, 100, 120)
    prediction = np.tanh((mos - 40) / 30) + 0.1 * rng.normal(size=120)
    plain = fit_logistic(prediction, mos)(prediction)
    moved = sign * scale * prediction + shift
    assert fit_logistic(moved, mos)(moved) == pytest.approx(plain, abs=1e-3)


def test_a_known_curve_is_found_again() -> None:
    x = np.linspace(-4, 6, 300)
    truth = 15 + 70 / (1 + np.exp(-(x - 1.5) / 0.8))
    fit = fit_logistic(x, truth)
    assert fit.status == "ok"
    assert fit(x) == pytest.approx(truth, abs=1e-4)


def test_a_curve_worse_than_a_line_is_refused_and_says_so() -> None:
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 1, 200)
    fit = fit_logistic(x, x, form="logistic4")
    assert fit.status in ("ok", "linear_fallback")
    assert plcc(fit(x), x) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize(
    ("prediction", "reason"), [(np.zeros(50), "constant"), (np.arange(5.0), "too few")]
)
def test_what_cannot_be_fitted_is_nan_with_a_reason(prediction, reason) -> None:
    fit = fit_logistic(prediction, np.arange(float(len(prediction))))
    assert fit.status == "none"
    assert reason in fit.reason
    assert np.all(np.isnan(fit(prediction)))
