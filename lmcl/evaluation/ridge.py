"""Ridge and kernel ridge regression in closed form, chosen by cross-validation inside the data.

Features are brought to mean 0 and deviation 1, so that one weight means the same for every encoder.
Few images are solved in the dual (a matrix of images), few features in the primal (a matrix of
features). Everything is float64 and deterministic.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FOLDS = 5
WEIGHTS = tuple(10.0 ** (exponent / 2) for exponent in range(-10, 5))
"""Of the penalty, in units of the mean of the kernel's diagonal: 1e-5 to 1e2."""
WIDTHS = (0.35, 0.7)
"""Of the Gaussian kernel, in units of the median distance between two training images."""
_MOST_KERNEL = 3000
"""Images up to which the Gaussian kernel is tried: it takes their number cubed."""
_FEW, _REPEATS = 200, 5
"""Up to so many images the folds are drawn so many times: one draw says little then."""
_MOST_OF_MEDIAN = 1000


@dataclasses.dataclass(frozen=True, kw_only=True)
class RidgeChoice:
    """What cross-validation chose, and how it did there."""

    weight: float
    """Of the penalty (`WEIGHTS`)."""
    width: float | None
    """Of the Gaussian kernel (`WIDTHS`); None: linear."""
    rmse: float
    """Root mean square error of images that were held out, in the unit of the target."""
    folds: int
    repeats: int
    """Times the folds were drawn."""

    @property
    def kernel(self) -> str:
        """`linear` or `gaussian`."""
        return "linear" if self.width is None else "gaussian"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """Means and deviations of features over the training images."""

    mean: Floats
    scale: Floats
    """What is multiplied by: 0 for features without spread; the mean squared length is 1 then."""

    def __call__(self, features: NDArray[np.floating]) -> Floats:
        """Features `[n, f]` on the scale of the training images."""
        return np.asarray((features.astype(np.float64) - self.mean) * self.scale)


def fit_scaling(features: NDArray[np.floating]) -> Scaling:
    """Scaling of `[n, f]` features: mean 0, deviation 1, and 1 for the mean squared length.

    Raises:
        ValueError: If no feature differs between images, or one is not finite.
    """
    values = features.astype(np.float64)
    if not np.all(np.isfinite(values)):
        raise ValueError("a feature is not finite")
    mean, deviation = values.mean(axis=0), values.std(axis=0)
    # Rounding leaves a little spread where there is none.
    has_spread = deviation > 1e-6 * np.maximum(np.abs(mean), 1e-6)
    if not has_spread.any():
        raise ValueError("no feature differs between images")
    scale = np.zeros_like(mean)
    scale[has_spread] = 1 / (deviation[has_spread] * math.sqrt(int(has_spread.sum())))
    return Scaling(mean=mean, scale=scale)


def draw_folds(groups: NDArray[np.int64], *, folds: int, seed: int) -> NDArray[np.int64]:
    """The fold of every image, `[n]`; images of one group have the same, sizes are nearly equal."""
    names, code, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    # Large groups first: small ones then fill the folds up.
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of = np.zeros(folds, np.int64), np.zeros(len(names), np.int64)
    for group in order:
        fold = int(np.argmin(filled))
        fold_of[group] = fold
        filled[fold] += sizes[group]
    return np.asarray(fold_of[code.reshape(-1)])


def choose_ridge(
    features: Floats, target: Floats, groups: NDArray[np.int64], *, seed: int = 0
) -> RidgeChoice:
    """Penalty and kernel with the least error on held-out folds of the training images.

    Args:
        features: `[n, f]`, scaled (`fit_scaling`).
        target: `[n]` scores.
        groups: `[n]`; images of one group stay in one fold.
        seed: Of the folds.

    Raises:
        ValueError: If there are fewer than two groups: nothing can be held out then.
    """
    count = min(FOLDS, len(np.unique(groups)))
    if count < 2:
        raise ValueError("all images are of one group")
    repeats = _REPEATS if len(target) <= _FEW else 1
    widths: list[float | None] = [None, *(WIDTHS if len(target) <= _MOST_KERNEL else ())]
    squares = {width: np.zeros(len(WEIGHTS)) for width in widths}
    for draw in range(repeats):
        fold = draw_folds(groups, folds=count, seed=seed + draw)
        for held, width in itertools.product(range(count), widths):
            out = fold == held
            found = _solve(features[~out], target[~out], features[out], width, WEIGHTS)
            squares[width] += np.sum((found - target[out, None]) ** 2, axis=0)
    errors = [(squares[w][i], w, WEIGHTS[i]) for w in widths for i in range(len(WEIGHTS))]
    # Equal errors: the earlier one, linear and with the smaller penalty.
    total, width, weight = min(errors, key=lambda one: one[0])
    return RidgeChoice(
        weight=weight,
        width=width,
        rmse=math.sqrt(total / (repeats * len(target))),
        folds=count,
        repeats=repeats,
    )


def predict_ridge(choice: RidgeChoice, features: Floats, target: Floats, others: Floats) -> Floats:
    """Predictions `[m]` for other images, of the choice fitted on all training images."""
    return _solve(features, target, others, choice.width, (choice.weight,))[:, 0]


def _solve(
    train: Floats, target: Floats, others: Floats, width: float | None, weights: Sequence[float]
) -> Floats:
    """Predictions `[m, w]` for other images under every weight of the penalty."""
    middle, penalty = float(target.mean()), np.asarray(weights)
    if width is not None:
        distance = _median_distance(train)
        gram = _gaussian(train, train, width * distance)
        return middle + _dual(gram, _gaussian(others, train, width * distance), target, penalty)
    centre = train.mean(axis=0)
    a, b = train - centre, others - centre
    if len(a) <= a.shape[1]:
        return middle + _dual(a @ a.T, b @ a.T, target, penalty)
    values, vectors = np.linalg.eigh(a.T @ a)
    along = vectors.T @ (a.T @ (target - middle))
    return np.asarray(middle + b @ (vectors @ (along[:, None] / _damped(values, penalty))))


def _dual(gram: Floats, cross: Floats, target: Floats, penalty: Floats) -> Floats:
    values, vectors = np.linalg.eigh(gram)
    along = vectors.T @ (target - target.mean())
    return np.asarray(cross @ (vectors @ (along[:, None] / _damped(values, penalty))))


def _damped(values: Floats, penalty: Floats) -> Floats:
    """Eigenvalues [k, w] with the penalty added; rounding makes some a little negative."""
    return np.asarray(np.maximum(values, 0.0)[:, None] + penalty)


def _squared_distances(a: Floats, b: Floats) -> Floats:
    lengths = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :]
    return np.asarray(np.maximum(lengths - 2 * (a @ b.T), 0.0))


def _gaussian(a: Floats, b: Floats, width: float) -> Floats:
    return np.asarray(np.exp(-_squared_distances(a, b) / (2 * width**2)))


def _median_distance(train: Floats) -> float:
    """Of pairs of at most a thousand images, evenly spaced; 1 where most are the same."""
    some = train[:: max(1, len(train) // _MOST_OF_MEDIAN)]
    pairs = _squared_distances(some, some)[np.triu_indices(len(some), k=1)]
    return math.sqrt(float(np.median(pairs))) if len(pairs) and np.median(pairs) > 0 else 1.0
