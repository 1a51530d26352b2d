"""From the shared score to the scale of each of several sets: one rising line a set."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

MOST_SETS = 64
"""Of one model."""
_MIDDLE = 0.5
"""Lines turn about the middle of the scale, so that slope and offset do not move each other."""
_LEAST_STD = 0.01
"""Smaller deviations say nothing about a slope."""


class SetScales(nn.Module):
    """Lines from the shared score to each set's own, both in [0, 1] units (decision 0017).

    The first set's is the identity: its scale is the shared one. A slope is the exponential of a
    parameter, so no line ever falls, and within a set the order of the scores is the shared one.

    Args:
        sets: How many, at least 2.
    """

    def __init__(self, sets: int) -> None:
        super().__init__()
        self.log_slope = nn.Parameter(torch.zeros(sets - 1))
        self.offset = nn.Parameter(torch.zeros(sets - 1))

    def forward(self, score: Float[Tensor, "*n"], sets: Int64[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """Scores on the scale of the set of each, in [0, 1] units.

        Args:
            score: Shared ones.
            sets: Number of each one's set.
        """
        slope, offset = self._lines()
        return _MIDDLE + offset[sets] + slope[sets] * (score - _MIDDLE)

    def to_shared(
        self, score: Float[Tensor, "*n"], sets: Int64[Tensor, "*n"]
    ) -> Float[Tensor, "*n"]:
        """The inverse: what on the shared scale a set's own score stands for."""
        slope, offset = self._lines()
        return _MIDDLE + (score - _MIDDLE - offset[sets]) / slope[sets]

    def _lines(self) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
        nothing = self.offset.new_zeros(1)
        return torch.cat([nothing, self.log_slope]).exp(), torch.cat([nothing, self.offset])

    @torch.no_grad()
    def match_moments(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Begin where equally good images of all sets would have equal scores.

        Args:
            mean: Of each set's train scores, [0, 1] units.
            std: Their deviations.
        """
        means, deviations = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
        deviations = deviations.clamp(min=_LEAST_STD)
        slope = deviations[1:] / deviations[0]
        self.log_slope.copy_(slope.log())
        self.offset.copy_(means[1:] - _MIDDLE - slope * (means[0] - _MIDDLE))
