"""Decoder comparison: what another decode recipe changes about a model's scores."""

from dataclasses import dataclass

import numpy as np

from lmcl.errors import LmclError
from lmcl.evaluation.metrics import srcc
from lmcl.evaluation.predict import PartPredictions


@dataclass(frozen=True, kw_only=True)
class DecoderComparison:
    """Scores of the same images by the same model under two decode recipes, [0, 1] units."""

    first: str
    """Recipe of the predictions that were written down."""
    second: str
    n: int
    mean_difference: float
    """Mean of second - first."""
    mean_absolute_difference: float
    largest_difference: float
    """Largest absolute difference of one image."""
    srcc: float
    """Rank correlation between the two; NaN below two images or where one is constant."""

    def summary(self) -> str:
        """The comparison in one line."""
        return (
            f"{self.second} against {self.first} on {self.n} images: scores (0 to 1) differ by "
            f"{self.mean_absolute_difference:.5f} on average, {self.largest_difference:.5f} at "
            f"most, mean {self.mean_difference:+.5f}; SRCC between the two {self.srcc:.5f}"
        )


def compare_decoders(first: PartPredictions, second: PartPredictions) -> DecoderComparison:
    """Compare predictions of one part that differ in nothing but the decoder.

    Raises:
        LmclError: If they are of other images.
    """
    if not np.array_equal(first.ids, second.ids):
        raise LmclError(
            f"decoders are compared on the same images, but {first.decode} scored "
            f"{len(first.ids)} and {second.decode} {len(second.ids)}; evaluate the same part twice"
        )
    difference = second.score - first.score
    return DecoderComparison(
        first=first.decode,
        second=second.decode,
        n=len(difference),
        mean_difference=float(difference.mean()),
        mean_absolute_difference=float(np.abs(difference).mean()),
        largest_difference=float(np.abs(difference).max()),
        srcc=srcc(first.score, second.score),
    )
