"""Rounds of crops: what is looked at, in which shapes, and that neighbours do not matter."""

import numpy as np
import pytest

from lmcl.evaluation.adaptive import AdaptiveRule, crops_needed
from lmcl.inference.adaptive_scoring import CropOutputs, look_adaptively, look_at_all

RULE = AdaptiveRule(half_width=0.05, usual_spread=0.05, first=3, step=2, agreement=1.0, share=1.0)
GRID = np.array([(y, x, 8, 8) for y in (0, 10, 20) for x in (0, 10, 20)], dtype=np.int32)


def crops_of(values: np.ndarray) -> list[np.ndarray]:
    """Crops of one pixel whose value is the answer, in 1/255."""
    return [np.tile(row[:, None, None, None], (1, 1, 1, 3)) for row in values.astype(np.uint8)]


class Network:
    """Answers with the first pixel, and remembers how many crops it was shown of how many."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, crops) -> CropOutputs:
        pixels = np.stack(crops)[:, :, 0, 0, 0].astype(np.float64)
        self.shapes.append(pixels.shape)
        return CropOutputs(pixels / 255, pixels[..., None].astype(np.float32))


@pytest.fixture
def values() -> np.ndarray:
    rng = np.random.default_rng(0)
    spread = np.array([0, 2, 5, 10, 40, 90])[:, None]
    return np.clip(128 + spread * rng.normal(size=(6, 9)), 0, 255).round()


def test_as_many_crops_are_seen_as_the_rule_asks_and_no_more(values: np.ndarray) -> None:
    network = Network()
    seen = look_adaptively(RULE, crops_of(values), [GRID] * 6, network)
    ordered = np.stack([values[i][seen_order(i)] for i in range(6)]) / 255
    assert [len(one.quality) for one in seen] == crops_needed(RULE, ordered).tolist()
    assert sum(a * b for a, b in network.shapes) == sum(len(one.quality) for one in seen)
    for i, one in enumerate(seen):
        assert np.array_equal(values[i][one.places] / 255, one.quality)


def seen_order(_image: int) -> np.ndarray:
    from lmcl.evaluation.adaptive import crop_order

    return crop_order(GRID)


def test_an_image_alone_is_seen_as_it_is_in_company(values: np.ndarray) -> None:
    together = look_adaptively(RULE, crops_of(values), [GRID] * 6, Network())
    for i, one in enumerate(together):
        (alone,) = look_adaptively(RULE, crops_of(values[i : i + 1]), [GRID], Network())
        assert np.array_equal(alone.places, one.places)
        assert np.array_equal(alone.quality, one.quality)


def test_without_a_rule_all_crops_are_seen_in_their_own_order(values: np.ndarray) -> None:
    seen = look_at_all(Network()(crops_of(values)))
    assert np.array_equal(np.stack([one.quality for one in seen]), values / 255)
    assert all(np.array_equal(one.places, np.arange(9)) for one in seen)


def test_an_answer_that_is_no_number_is_looked_at_to_the_end() -> None:
    class Broken(Network):
        def __call__(self, crops) -> CropOutputs:
            found = super().__call__(crops)
            return found._replace(quality=found.quality * np.nan)

    (seen,) = look_adaptively(RULE, crops_of(np.ones((1, 9))), [GRID], Broken())
    assert len(seen.quality) == 9
