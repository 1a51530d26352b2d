"""Adaptive crops: order of looking, when to stop, and how the rule is chosen."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lmcl.evaluation.adaptive import (
    TARGET,
    AdaptiveRule,
    FirstCrop,
    adaptive_means,
    choose_rule,
    crop_order,
    crops_needed,
)
from pipeline.boxes import CropConfig, evaluation_boxes, frame_sizes


def rule(**changes) -> AdaptiveRule:
    values = {
        "half_width": 0.05,
        "usual_spread": 0.05,
        "first": 3,
        "step": 2,
        "agreement": 1.0,
        "share": 1.0,
    }
    return AdaptiveRule(**(values | changes))


def simulated(n: int, v: int, *, seed: int, within: float) -> np.ndarray:
    """Crop qualities of images, some of which are uniform and some not."""
    rng = np.random.default_rng(seed)
    spread = within * rng.gamma(1.0, 1.0, size=(n, 1))
    return rng.normal(0.5, 0.2, size=(n, 1)) + spread * rng.normal(size=(n, v))


@pytest.mark.parametrize("count", [1, 2, 5, 9, 16, 25])
@pytest.mark.parametrize("size", [(600, 800), (224, 900), (224, 224)])
def test_every_crop_is_looked_at_once_and_the_first_lie_apart(
    count: int, size: tuple[int, int]
) -> None:
    crops = CropConfig(size=224, evaluation=count)
    frames = frame_sizes(np.array([size[0]]), np.array([size[1]]), crops)
    boxes = evaluation_boxes(np.array([0]), frames, crops)[0]
    order = crop_order(boxes)
    assert sorted(order.tolist()) == list(range(count))
    if count == 25 and size == (600, 800):
        corners = boxes[order[:5], :2]
        assert set(map(tuple, corners[1:].tolist())) == {(0, 0), (0, 576), (376, 0), (376, 576)}


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_more_agreement_between_crops_never_needs_more_of_them(seed: int) -> None:
    crops = simulated(1, 25, seed=seed, within=0.1)
    calm = crops.mean() + (crops - crops.mean()) * 0.5
    assert crops_needed(rule(), calm)[0] <= crops_needed(rule(), crops)[0]


def test_the_first_crops_are_always_seen_and_all_of_them_where_they_disagree() -> None:
    flat, wild = np.full((1, 9), 0.4), np.where(np.arange(9) % 2, 0.0, 1.0)[None]
    assert crops_needed(rule(half_width=0.1), flat)[0] == 3
    assert crops_needed(rule(half_width=0.1), wild)[0] == 9
    assert adaptive_means(rule(half_width=0.1), wild)[0] == pytest.approx(wild.mean())


def test_nothing_is_left_to_be_known_once_all_crops_are_seen() -> None:
    assert rule(half_width=0.0).is_enough(np.array([0.1, 0.9, 0.3]), 3)


def test_the_chosen_rule_keeps_the_order_with_fewer_crops_on_other_images() -> None:
    found = choose_rule(simulated(400, 25, seed=0, within=0.03))
    assert found is not None
    assert found.agreement >= TARGET
    fresh = simulated(600, 25, seed=1, within=0.03)
    agreement = stats.spearmanr(adaptive_means(found, fresh), fresh.mean(1)).statistic
    assert agreement >= 0.995
    assert np.mean(crops_needed(found, fresh)) / 25 <= 0.4


@pytest.mark.parametrize("crops", [np.ones((100, 9)), np.random.rand(5, 9), np.random.rand(99, 2)])
def test_too_little_to_choose_from_is_no_rule(crops: np.ndarray) -> None:
    assert choose_rule(crops) is None


def test_an_image_is_judged_by_itself() -> None:
    crops = simulated(50, 16, seed=4, within=0.1)
    alone = np.concatenate([crops_needed(rule(), one[None]) for one in crops])
    assert np.array_equal(crops_needed(rule(), crops), alone)


@pytest.mark.parametrize("changes", [{"first": 0}, {"step": 0}, {"half_width": np.nan}])
def test_what_no_training_has_written_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"first|half_width"):
        rule(**changes)


def crowded(n: int, *, seed: int) -> np.ndarray:
    """Four crops of images, most of which have nearly the same quality, and some are far off."""
    rng = np.random.default_rng(seed)
    mean = np.where(rng.uniform(size=n) < 0.5, rng.normal(0.6, 0.02, n), rng.uniform(0, 0.5, n))
    return mean[:, None] + rng.normal(0, 0.004, size=(n, 4))


def test_one_crop_is_enough_where_few_images_have_such_a_score() -> None:
    found = choose_rule(crowded(400, seed=0))
    assert found is not None
    assert found.only is not None
    fresh = crowded(600, seed=1)
    needed = crops_needed(found, fresh)
    assert np.mean(needed) / 4 < 0.5
    far = fresh[:, 0] < 0.45
    assert np.mean(needed[far] == 1) > 0.9
    assert np.mean(needed[~far] == 1) < 0.85
    assert stats.spearmanr(adaptive_means(found, fresh), fresh.mean(1)).statistic >= 0.995
    alone = np.concatenate([crops_needed(found, one[None]) for one in fresh])
    assert np.array_equal(needed, alone)


def test_few_images_say_nothing_of_one_crop() -> None:
    found = choose_rule(crowded(199, seed=0))
    assert found is not None
    assert (found.only, found.first) == (None, 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"quality": (0.5,), "risk": (0.1,)},
        {"risk": (0.1,)},
        {"quality": (0.5, 0.5)},
        {"risk": (0.1, -0.1)},
        {"limit": np.nan},
    ],
    ids=str,
)
def test_a_first_crop_that_no_training_has_written_is_refused(changes: dict[str, object]) -> None:
    sound = {"quality": (0.2, 0.8), "risk": (0.1, 0.3), "limit": 0.2}
    with pytest.raises(ValueError, match="only"):
        FirstCrop(**(sound | changes))
    with pytest.raises(ValueError, match="first is 1"):
        rule(first=2, only=FirstCrop(**sound))
