"""Sketches of the images a model has seen: exact up to a size, samples beyond it."""

from pathlib import Path

import numpy as np
import pytest

from lmcl.errors import LmclError
from lmcl.models.training_images import (
    MOST_KEPT,
    TRAINING_IMAGES,
    ImageSketch,
    TrainingImages,
    read_training_images,
    sketch_images,
    unite,
    write_training_images,
)


def digests(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


@pytest.mark.parametrize("count", [0, 1, 300, MOST_KEPT])
def test_every_image_of_a_usual_set_is_known(count: int) -> None:
    images, others = digests(count), digests(200, seed=1)
    sketch = sketch_images(np.concatenate([images, images]))
    assert sketch.count == count
    assert sketch.is_whole
    assert sketch.holds(images).all()
    assert not sketch.holds(others).any()


def test_of_more_images_a_share_is_known_that_is_stated() -> None:
    images = digests(3 * MOST_KEPT)
    sketch = sketch_images(images)
    assert len(sketch.values) == MOST_KEPT
    assert sketch.share == pytest.approx(1 / 3)
    assert sketch.holds(images).sum() == MOST_KEPT
    assert sketch.holds(images[:3000]).mean() == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("sizes", [(10, 20), (2 * MOST_KEPT, 50), (2 * MOST_KEPT, 3 * MOST_KEPT)])
def test_united_sketches_are_those_of_all_images_together(sizes: tuple[int, int]) -> None:
    one, two = digests(sizes[0], seed=2), digests(sizes[1], seed=3)
    found = unite((sketch_images(one), sketch_images(two)))
    truth = sketch_images(np.concatenate([one, two]))
    assert found == truth


def test_what_came_before_counts_and_a_model_that_says_nothing_is_said() -> None:
    first, second = (
        TrainingImages(learned=sketch_images(digests(5, seed=n)), selected=ImageSketch())
        for n in (1, 2)
    )
    assert second.after(first).seen(digests(5, seed=1)).all()
    assert second.after(first).knows_all
    assert not second.after(None).knows_all
    assert not first.after(second.after(None)).is_complete


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    assert read_training_images(tmp_path) is None
    images = TrainingImages(
        learned=sketch_images(digests(9)),
        selected=sketch_images(digests(2, seed=4)),
        set_sha256="a",
    )
    write_training_images(tmp_path, images)
    assert read_training_images(tmp_path) == images


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"learned": {"count": 1, "hashes": "AAAA"}, "selected": {}}',
        '{"learned": {"count": 0, "hashes": "AAAAAAAAAAA="}, "selected": {}}',
        '{"learned": {"count": 99999, "hashes": ""}, "selected": {}}',
        '{"learned": {}, "selected": {}, "format_version": 2}',
    ],
    ids=["no-json", "half-a-hash", "more-than-counted", "too-few", "version"],
)
def test_a_damaged_file_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / TRAINING_IMAGES).write_text(text)
    with pytest.raises(LmclError, match="does not say which images the model has seen") as refused:
        read_training_images(tmp_path)
    assert refused.value.exit_code == 5
