"""The model as a torchmetrics metric: mean quality of images, e.g. while a generator trains.

Imported only by those who want it; `pip install torchmetrics` brings what it needs.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmcl.inference.scorer import Scorer, open_scorer

try:
    from torchmetrics import Metric
except ImportError as error:
    raise ImportError(
        "lmcl.inference.torchmetrics needs the package torchmetrics, which is not installed; "
        "`pip install torchmetrics`"
    ) from error


class ImageQuality(Metric):
    """Mean score of all images seen, in the scale of the training set; no reference images.

    Args:
        model: An open model, its folder, or its name (`starter`, `hf://USER/NAME[@REVISION]`).
        kwargs: Of `torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, model: Scorer | str | Path, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scorer = model if isinstance(model, Scorer) else open_scorer(model)
        # The base class locks this name on instances; direction is known only now.
        self.__dict__["higher_is_better"] = self.scorer.scale.higher_is_better
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def __deepcopy__(self, memo: dict[int, Any]) -> "ImageQuality":
        """A copy with its own sums and the same network, which nothing changes."""
        memo[id(self.scorer)] = self.scorer
        twin: ImageQuality = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin

    def update(self, images: Tensor) -> None:
        """Add a batch `[b, 3, h, w]`: bytes, or floats in [0, 1]."""
        scores = self.scorer.score(images)
        assert isinstance(scores, list)
        self.total += sum(scores)
        self.count += len(scores)

    def compute(self) -> Tensor:
        """Mean score; NaN before the first batch."""
        return self.total / self.count
