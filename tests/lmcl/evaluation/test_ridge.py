"""Ridge in closed form: the formula, folds that respect groups, and what is chosen."""

import numpy as np
import pytest

from lmcl.evaluation.ridge import (
    RidgeChoice,
    choose_ridge,
    draw_folds,
    fit_scaling,
    predict_ridge,
)


def linear(n: int, f: int, *, noise: float, seed: int = 0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, f))
    return features, features @ rng.normal(size=f) + noise * rng.normal(size=n)


@pytest.mark.parametrize(("n", "f"), [(12, 30), (30, 12)], ids=["dual", "primal"])
def test_predictions_are_those_of_the_normal_equations(n: int, f: int) -> None:
    features, target = linear(n + 5, f, noise=0.1)
    known, others = features[:n], features[n:]
    choice = RidgeChoice(weight=0.3, width=None, rmse=0.0, folds=5, repeats=1)
    centred = known - known.mean(axis=0)
    slope = np.linalg.solve(
        centred.T @ centred + 0.3 * np.eye(f), centred.T @ (target[:n] - target[:n].mean())
    )
    expected = target[:n].mean() + (others - known.mean(axis=0)) @ slope
    np.testing.assert_allclose(predict_ridge(choice, known, target[:n], others), expected)


def test_a_kernel_ridge_is_that_of_its_formula() -> None:
    features, target = linear(20, 3, noise=0.1)
    known, others, y = features[:15], features[15:], target[:15]
    apart = np.linalg.norm(known[:, None] - known[None], axis=2)
    width = 0.7 * np.median(apart[np.triu_indices(15, k=1)])

    def kernel(a: np.ndarray) -> np.ndarray:
        return np.exp(-(np.linalg.norm(a[:, None] - known[None], axis=2) ** 2) / (2 * width**2))

    expected = y.mean() + kernel(others) @ np.linalg.solve(
        kernel(known) + 0.01 * np.eye(15), y - y.mean()
    )
    choice = RidgeChoice(weight=0.01, width=0.7, rmse=0.0, folds=5, repeats=1)
    np.testing.assert_allclose(predict_ridge(choice, known, y, others), expected, rtol=1e-6)


def test_images_of_one_group_stay_in_one_fold_and_folds_are_even() -> None:
    groups = np.repeat(np.arange(23), np.arange(23) % 5 + 1)
    fold = draw_folds(groups, folds=5, seed=3)
    assert all(len(set(fold[groups == group])) == 1 for group in range(23))
    assert np.ptp(np.bincount(fold, minlength=5)) <= 2


def test_the_held_out_error_is_that_of_folds_fitted_without_them() -> None:
    features, target = linear(250, 8, noise=0.5)
    features = fit_scaling(features)(features)
    groups = np.arange(250)
    choice = choose_ridge(features, target, groups)
    fold, squares = draw_folds(groups, folds=5, seed=0), []
    for held in range(5):
        out = fold == held
        found = predict_ridge(choice, features[~out], target[~out], features[out])
        squares.append((found - target[out]) ** 2)
    assert choice.rmse == pytest.approx(np.sqrt(np.mean(np.concatenate(squares))))
    assert (choice.folds, choice.repeats) == (5, 1)


def test_a_straight_target_gets_a_line_and_a_bent_one_the_kernel() -> None:
    features, straight = linear(220, 6, noise=0.3)
    features = fit_scaling(features)(features)
    bent = np.sum(features**2, axis=1)
    chosen = [choose_ridge(features, target, np.arange(220)) for target in (straight, bent)]
    assert [choice.kernel for choice in chosen] == ["linear", "gaussian"]
    assert chosen[1].rmse < 0.5 * bent.std()


def test_noise_gets_a_strong_penalty_and_a_clean_line_a_weak_one() -> None:
    features, target = linear(40, 6, noise=0.0)
    features = fit_scaling(features)(features)
    assert choose_ridge(features, target, np.arange(40)).weight <= 0.01
    noise = np.random.default_rng(5).normal(size=40)
    assert choose_ridge(features, noise, np.arange(40)).weight >= 1.0


def test_forty_labels_are_enough_to_find_a_signal_and_the_choice_is_always_the_same() -> None:
    rng = np.random.default_rng(5)
    features = fit_scaling(raw := rng.normal(size=(140, 300)))(raw)
    signal = raw[:, :60].sum(axis=1)
    choice = choose_ridge(features[:40], signal[:40], np.arange(40))
    found = predict_ridge(choice, features[:40], signal[:40], features[40:])
    assert choice.repeats == 5
    assert np.corrcoef(found, signal[40:])[0, 1] > 0.2
    assert choice == choose_ridge(features[:40], signal[:40], np.arange(40))


def test_features_without_spread_count_for_nothing_and_one_group_is_refused() -> None:
    features = np.column_stack([np.full(9, 7.0), np.arange(9.0)])
    scaled = fit_scaling(features)(features)
    assert not scaled[:, 0].any()
    assert np.mean(np.sum(scaled**2, axis=1)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="one group"):
        choose_ridge(scaled, np.arange(9.0), np.zeros(9, np.int64))
    with pytest.raises(ValueError, match="no feature differs"):
        fit_scaling(np.ones((4, 2)))
    with pytest.raises(ValueError, match="not finite"):
        fit_scaling(np.array([[1.0], [np.nan]]))
