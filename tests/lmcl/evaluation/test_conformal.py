"""Intervals keep their promise: exact finite-sample coverage, whatever the model and the errors."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmcl.evaluation.conformal import Conformal, conformal_quantile, fit_conformal


@pytest.mark.parametrize(
    ("n", "confidence", "rank"),
    [(9, 0.9, 9), (19, 0.9, 18), (99, 0.9, 90), (100, 0.9, 91), (199, 0.95, 190), (1, 0.5, 1)],
)
def test_the_quantile_is_the_exact_order_statistic(n: int, confidence: float, rank: int) -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(scores, confidence) == rank


@settings(deadline=None)
@given(n=st.integers(0, 60), confidence=st.floats(0.01, 0.99))
def test_too_few_images_promise_nothing_finite(n: int, confidence: float) -> None:
    rank = math.ceil((n + 1) * confidence - 1e-9)
    found = conformal_quantile(np.arange(1.0, n + 1), confidence)
    assert found == (rank if rank <= n else math.inf)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1.0, 2.0, math.nan])
def test_what_is_no_confidence_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        conformal_quantile([1.0], confidence)


def heteroscedastic(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions with a bias, errors that grow with a spread which is seen with noise."""
    quality, spread = rng.uniform(size=n), rng.gamma(2.0, 0.03, size=n)
    truth = 0.1 + 0.8 * quality + rng.standard_t(3, size=n) * spread
    return quality, truth, spread * rng.uniform(0.7, 1.4, size=n)


@pytest.mark.parametrize(("n", "confidence"), [(39, 0.9), (120, 0.8), (450, 0.9)])
def test_coverage_on_exchangeable_images_is_what_was_promised(n: int, confidence: float) -> None:
    rng, covered, rounds, fresh = np.random.default_rng(n), 0, 250, 40
    for _ in range(rounds):
        quality, truth, spread = heteroscedastic(rng, n + fresh)
        others = rng.uniform(size=200)
        fitted = fit_conformal(quality[:n], truth[:n], spread[:n], floor=0.02, edges_from=others)
        below, above = fitted.reach(quality[n:], spread[n:], confidence=confidence)
        error = truth[n:] - quality[n:]
        covered += int(np.sum((-below <= error) & (error <= above)))
    share = covered / (rounds * fresh)
    # Between the promise and 1 / (n + 1) of the smallest class above it, up to the noise of draws.
    smallest = n / len(fitted.residuals) / 2
    noise = 4 * math.sqrt(confidence * (1 - confidence) * (1 / (rounds * fresh) + 1 / (rounds * n)))
    assert confidence - noise <= share <= confidence + 1 / smallest + noise


def test_classes_of_quality_hold_the_promise_where_errors_depend_on_it() -> None:
    rng = np.random.default_rng(3)
    n = 4000
    quality = rng.uniform(size=2 * n)
    truth = quality + rng.normal(size=2 * n) * np.where(quality < 1 / 3, 0.2, 0.02)
    flat = np.full(2 * n, 0.05)
    fitted = fit_conformal(
        quality[:n], truth[:n], flat[:n], floor=0.01, edges_from=rng.uniform(size=3000)
    )
    assert len(fitted.residuals) == 3
    below, above = fitted.reach(quality, flat, confidence=0.9)
    inside = (quality - below <= truth) & (truth <= quality + above)
    for low in (quality[n:] < 0.3, quality[n:] > 0.4):
        assert abs(np.mean(inside[n:][low]) - 0.9) < 0.03


def test_few_images_make_one_class_and_unlabelled_ones_are_left_out() -> None:
    quality = np.linspace(0, 1, 50)
    truth = np.where(np.arange(50) % 5 == 0, math.nan, quality + 0.1)
    fitted = fit_conformal(quality, truth, np.zeros(50), floor=0.5, edges_from=quality)
    assert (len(fitted.residuals), fitted.n) == (1, 40)
    below, above = fitted.reach([0.5], [0.0], confidence=0.9)
    assert (below, above) == (pytest.approx([0.0]), pytest.approx([0.1]))


def test_an_interval_reaches_to_the_side_on_which_the_model_errs() -> None:
    rng = np.random.default_rng(5)
    quality = rng.uniform(size=3000)
    # A fifth of the images are odd: the model finds them too good, and nothing says which they are.
    truth = quality + rng.normal(size=3000) * 0.02 - (np.arange(3000) % 5 == 0) * 0.2
    flat = np.zeros(3000)
    fitted = fit_conformal(quality, truth, flat, floor=0.05, edges_from=quality)
    below, above = fitted.reach(quality, flat, confidence=0.9)
    assert np.all(below > 3 * above)
    assert np.all(above > 0)
    absolute = Conformal(
        floor=0.05,
        edges=(),
        residuals=(tuple(np.sort(np.abs(truth - quality) / 0.05).tolist()),),
    )
    odd = truth < quality - 0.1
    reached = [
        np.mean(truth[odd] >= (quality - one.reach(quality, flat, confidence=0.9)[0])[odd])
        for one in (fitted, absolute)
    ]
    assert reached[0] > reached[1] + 0.1


def test_few_images_have_no_sides() -> None:
    quality = np.linspace(0, 1, 30)
    fitted = fit_conformal(quality, quality + 0.1, np.zeros(30), floor=0.5, edges_from=quality)
    below, above = fitted.reach([0.5], [0.0], confidence=0.9)
    assert not fitted.is_signed
    assert below == above == pytest.approx([0.1])


def test_an_image_whose_crops_disagree_has_a_wider_interval() -> None:
    fitted = Conformal(floor=0.1, edges=(), residuals=(tuple(np.linspace(0, 1, 99).tolist()),))
    near, far = fitted.reach([0.5, 0.5], [0.0, 0.1], confidence=0.9)[1]
    assert far == pytest.approx(2 * near)


@pytest.mark.parametrize(
    "changes",
    [
        {"floor": 0.0},
        {"floor": math.nan},
        {"edges": (0.5,)},
        {"residuals": ((0.2, 0.1),)},
        {"residuals": ((math.inf,),)},
        {"residuals": ((-0.1, 0.1),)},
        {"below": 0.0},
        {"below": math.nan},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_no_training_has_written_is_refused(changes: dict[str, object]) -> None:
    sound = {"floor": 0.1, "edges": (), "residuals": ((0.1, 0.2),)}
    Conformal(**sound)
    with pytest.raises(ValueError, match=r"floor|edges|residuals|classes"):
        Conformal(**(sound | changes))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(20, 80))
def test_the_rank_of_a_new_residual_is_uniform(seed: int, n: int) -> None:
    """The law behind coverage: among n exchangeable others every rank is equally likely."""
    rng = np.random.default_rng(seed)
    draws = rng.exponential(size=(400, n + 1))
    inside = [one[-1] <= conformal_quantile(one[:-1], 0.9) for one in draws]
    expected = math.ceil((n + 1) * 0.9 - 1e-9) / (n + 1) if n >= 9 else 1.0
    assert stats.binomtest(sum(inside), len(inside), expected).pvalue > 1e-7


def lopsided(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predictions, truth and group; one image of five is of a group that is found too good."""
    quality, odd = rng.uniform(size=n), rng.uniform(size=n) < 0.2
    error = np.where(odd, rng.normal(-0.1, 0.15, n), rng.normal(0.02, 0.06, n))
    return quality, quality + error, np.where(odd, "odd", "usual")


def test_misses_are_shared_out_so_that_groups_keep_the_promise() -> None:
    rng = np.random.default_rng(7)
    inside = {name: [] for name in ("odd", "usual", "odd, equal shares", "all")}
    for _ in range(40):
        quality, truth, group = lopsided(rng, 360)
        fresh, people, of = lopsided(rng, 400)
        flat, others = np.zeros(360), rng.uniform(size=300)
        for groups in (group, None):
            fitted = fit_conformal(
                quality, truth, flat, floor=0.05, edges_from=others, groups=groups
            )
            below, above = fitted.reach(fresh, np.zeros(400), confidence=0.9)
            is_in = (fresh - below <= people) & (people <= fresh + above)
            if groups is None:
                assert fitted.below == 0.5
                inside["odd, equal shares"] += is_in[of == "odd"].tolist()
                continue
            assert fitted.below < 0.5
            inside["all"] += is_in.tolist()
            for name in ("odd", "usual"):
                inside[name] += is_in[of == name].tolist()
    share = {name: np.mean(values) for name, values in inside.items()}
    assert share["odd, equal shares"] < 0.82
    assert share["odd"] > 0.84
    assert share["usual"] > 0.88
    assert abs(share["all"] - 0.9) < 0.02


def test_a_group_of_few_has_no_say_and_one_alone_neither() -> None:
    quality, truth, group = lopsided(np.random.default_rng(0), 150)
    group[np.flatnonzero(group == "odd")[39:]] = "usual"
    usual = fit_conformal(quality, truth, np.zeros(150), floor=0.05, edges_from=quality)
    for groups in (group, np.full(150, "")):
        found = fit_conformal(
            quality, truth, np.zeros(150), floor=0.05, edges_from=quality, groups=groups
        )
        assert found == usual


def test_a_side_too_rare_for_the_images_has_an_equal_share() -> None:
    rising = tuple(np.linspace(-1, 1, 79).tolist())
    made = [
        Conformal(floor=1.0, edges=(), residuals=(rising,), is_signed=True, below=below)
        for below in (0.2, 0.5)
    ]
    rare, equal = (one.reach([0.5], [0.0], confidence=0.95) for one in made)
    assert rare == equal
    wider, usual = (one.reach([0.5], [0.0], confidence=0.9) for one in made)
    assert wider[0] > usual[0]
    assert wider[1] < usual[1]
