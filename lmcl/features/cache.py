"""Feature cache: features of a frozen stem in place of pixels, looked up by image and box.

A stem that never learns gives the same features for the same crop in every epoch and under every
seed (docs/decisions/0008). lmcl/features/build.py makes them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor

from lmcl.distributed import RankContext
from lmcl.errors import LmclError
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig
from pipeline.loader import Loader, Mode
from pipeline.saliency_table import SaliencyTable
from shards.read import ShardSet


@dataclass(frozen=True, kw_only=True)
class FeatureCache:
    """Features of some boxes of some images."""

    ids: Int64[np.ndarray, " n"]
    """Increasing rows of the set's sample table."""
    boxes: Int32[np.ndarray, "n k 4"]
    """Places (y, x, h, w) in each image's frame; a whole image is one place at (0, 0)."""
    values: NDArray[np.generic]
    """[n, k, t, c], mapped from a file; bfloat16 as its bits in int16."""

    def find(
        self, ids: Int64[np.ndarray, " b"], boxes: Int32[np.ndarray, "b v 4"]
    ) -> Float[Tensor, "b v t c"]:
        """Features of each image's boxes.

        Raises:
            LmclError: If an image or a place is not in the cache.
        """
        rows = np.searchsorted(self.ids, ids)
        rows = np.minimum(rows, len(self.ids) - 1)
        matches = (self.boxes[rows][:, None] == boxes[:, :, None]).all(-1)
        found = matches.any(-1) & (self.ids[rows] == ids)[:, None]
        if not found.all():
            image, view = np.argwhere(~found)[0]
            raise LmclError(
                f"the feature cache has nothing for box {tuple(boxes[image, view].tolist())} (y, "
                f"x, height, width) of sample {ids[image]}; set runtime.cells = '' to see pixels",
                exit_code=3,
            )
        picked = torch.from_numpy(self.values[rows[:, None], matches.argmax(-1)])
        return picked.view(torch.bfloat16) if picked.dtype == torch.int16 else picked


@dataclass(frozen=True, kw_only=True)
class FeatureCaches:
    """One cache for each way images are shown."""

    train: FeatureCache
    """Random and salient places of the train part."""
    views: FeatureCache
    """Whole images of all parts."""
    judged: FeatureCache
    """Evaluation places of the parts that are judged."""


class FeatureLoader:
    """A loader's batches with features from a cache in place of pixels; nothing is decoded."""

    def __init__(self, loader: Loader, cache: FeatureCache, *, salient: bool, device: torch.device):
        self._loader, self._cache = loader, cache
        self._salient, self._device = salient, device
        self.wait_s = 0.0
        """Features come out of memory: the wait for them is not told apart from a step's time."""
        self.recipe = loader.recipe
        reason = f"{loader.choice.reason}; features of the frozen stem are kept"
        self.choice = replace(loader.choice, reason=reason)

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._loader.steps

    def epoch(
        self, epoch: int, *, start: int = 0, saliency: SaliencyTable | None = None
    ) -> Iterator[CropBatch]:
        """The batches of `Loader.epoch`, with the same ids, boxes and labels."""
        for step in range(start, self.steps):
            request = self._loader.request(
                epoch, step, saliency=saliency if self._salient else None
            )
            features = self._cache.find(request.ids, request.boxes).to(self._device)
            yield self._loader.batch(request, features, epoch)

    def close(self) -> None:
        """Close the loader behind."""
        self._loader.close()

    def __enter__(self) -> "FeatureLoader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@runtime_checkable
class _PixelSource(Protocol):
    def open_loader(
        self, ids: NDArray[np.int64], *, crops: CropConfig, mode: Mode, batch_size: int
    ) -> Any:
        """The loader whose ids, boxes and labels are wanted."""


@dataclass(frozen=True, kw_only=True)
class FeatureSource:
    """Kept features for saliency passes (mode `global`) and evaluation (mode `eval`)."""

    shard_set: ShardSet
    pixels: _PixelSource
    caches: FeatureCaches
    context: RankContext

    def open_loader(
        self, ids: NDArray[np.int64], *, crops: CropConfig, mode: Mode, batch_size: int
    ) -> FeatureLoader:
        """A loader over `ids` in order; nothing is decoded."""
        loader = self.pixels.open_loader(ids, crops=crops, mode=mode, batch_size=batch_size)
        cache = self.caches.views if mode == "global" else self.caches.judged
        return FeatureLoader(loader, cache, salient=False, device=self.context.device)
