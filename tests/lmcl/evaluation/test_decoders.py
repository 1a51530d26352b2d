import numpy as np
import pytest

from lmcl.errors import LmclError
from lmcl.evaluation.decoders import compare_decoders
from lmcl.evaluation.predict import PartPredictions


def predictions(scores: list[float], decode: str, *, first: int = 0) -> PartPredictions:
    n = len(scores)
    return PartPredictions(
        ids=np.arange(first, first + n),
        score=np.array(scores),
        embedding=np.zeros((n, 2), np.float32),
        decode=decode,
    )


def test_the_differences_are_those_of_the_scores() -> None:
    found = compare_decoders(
        predictions([0.1, 0.4, 0.8], "dali-cpu-2.4"), predictions([0.2, 0.4, 0.5], "dali-gpu-2.4")
    )
    assert found.mean_difference == pytest.approx(-0.2 / 3)
    assert found.mean_absolute_difference == pytest.approx(0.4 / 3)
    assert found.largest_difference == pytest.approx(0.3)
    assert found.srcc == pytest.approx(1.0)
    assert "dali-gpu-2.4 against dali-cpu-2.4 on 3 images" in found.summary()


def test_other_images_are_refused() -> None:
    with pytest.raises(LmclError, match="same images"):
        compare_decoders(predictions([0.1], "a"), predictions([0.1], "b", first=1))
