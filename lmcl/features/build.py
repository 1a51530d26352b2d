"""Feature cache: run a frozen stem once, keep its features in a file, map them into every run.

A stem that never learns gives the same features for the same crop in every epoch and under every
seed. With crops drawn from a pool of places (`crops.pool`) and salient crops that can only lie
where the teacher's window can (`possible_salient_boxes`), all of them are known beforehand, and
dozens of runs on the same images need the pixels once (docs/decisions/0008).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from lmcl.distributed import RankContext
from lmcl.errors import ConfigError
from lmcl.features.cache import FeatureCache, FeatureCaches
from lmcl.features.partial import PartialFeatures, fill_by_batches, hold_file, tell_cost
from lmcl.models.preprocess import Preprocessing, autocast, preprocess
from lmcl.models.quality_model import QualityModel
from lmcl.models.saliency import SaliencyConfig, window_to_box
from lmcl.models.stem import LevelStem
from pipeline.batch import CropBatch
from pipeline.boxes import (
    BoxRule,
    CropConfig,
    centre_boxes,
    evaluation_boxes,
    frame_sizes,
    pool_boxes,
    scaled_sizes,
)
from pipeline.loader import Loader, Mode, decode_choice
from shards.read import ShardSet

_IMAGES = 4
"""Images a batch while features are computed."""
_CROPS = 16
"""Crops a forward pass: more of them and their maps no longer stay in a processor's cache."""


def check_cacheable(student: QualityModel, *, pool: int | None, flip: bool) -> LevelStem:
    """The frozen stem whose features can be kept.

    Raises:
        ConfigError: If what a crop looks like to the networks can change during a run.
    """
    stem = getattr(student.encoder, "stem", None)
    asked = "runtime.cells keeps what a frozen stem makes of fixed places"
    if not isinstance(stem, LevelStem) or not stem.is_frozen:
        raise ConfigError(
            f"{asked}, but here the stem learns; set encoder.name = 'hybrid' and encoder.frozen to "
            "all of its stem's levels (13 for squeezenet1_1), or runtime.cells = ''"
        )
    if pool is None:
        raise ConfigError(
            f"{asked}, but crops are drawn from anywhere; set crops.pool (8, say), or "
            "runtime.cells = ''"
        )
    if flip:
        raise ConfigError(
            f"{asked}, and a mirrored crop is another one; set train.flip = false, or "
            "runtime.cells = ''"
        )
    return stem


def possible_salient_boxes(
    extent: Int64[np.ndarray, "n 2"], *, grid: int, saliency: SaliencyConfig, size: int
) -> Int32[np.ndarray, "n k 4"]:
    """Every box that `window_to_box` can give for images of these sizes.

    Images with fewer different ones than others repeat their last.
    """
    side = grid - saliency.window + 1
    windows = np.stack(np.divmod(np.arange(side * side), side), axis=1)
    kinds, inverse = np.unique(extent, axis=0, return_inverse=True)
    places = [
        np.unique(
            window_to_box(
                windows,
                np.broadcast_to(kind, windows.shape),
                grid=grid,
                window=saliency.window,
                size=size,
            ),
            axis=0,
        )
        for kind in kinds
    ]
    most = max(map(len, places))
    even = np.stack([np.pad(one, ((0, most - len(one)), (0, 0)), mode="edge") for one in places])
    return np.asarray(even[inverse.reshape(-1)])


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """One feature file: which crops of which images."""

    mode: Mode
    ids: Int64[np.ndarray, " n"]
    boxes: Int32[np.ndarray, "n k 4"]
    crops: CropConfig
    path: Path

    @property
    def count(self) -> int:
        """Crops of all images."""
        return int(self.boxes.shape[0] * self.boxes.shape[1])

    def open(self) -> FeatureCache:
        """The finished file."""
        return FeatureCache(
            ids=self.ids, boxes=self.boxes, values=np.load(self.path, mmap_mode="r")
        )


@dataclass(frozen=True, kw_only=True)
class FeatureCacheBuilder:
    """Builder of the feature caches of a run."""

    folder: Path
    shard_set: ShardSet
    stem: LevelStem
    crops: CropConfig
    saliency: SaliencyConfig
    hub: Literal["salient", "random", "centre"]
    """Which crops are wanted beside the random ones (`objective.hub`)."""
    preprocessing: Preprocessing
    context: RankContext

    def build(self, train: NDArray[np.int64], judged: NDArray[np.int64]) -> FeatureCaches:
        """All feature caches of a run, read where they are there already; rank 0 makes the others.

        Args:
            train: Ids of the train part.
            judged: Ids of all parts that are judged.
        """
        views = self._plan("global", np.union1d(train, judged), self._view_crops(), None)
        grid = round(self._features_of(views)[0] ** 0.5)

        def places(
            ids: Int64[np.ndarray, " b"], frames: Int64[np.ndarray, "b 2"]
        ) -> NDArray[np.int32]:
            size = self.crops.size
            drawn = pool_boxes(ids, frames, size=size, pool=self.crops.pool or 1)
            if self.hub == "centre":
                return np.concatenate([drawn, centre_boxes(frames, size=size)[:, None]], axis=1)
            if self.hub == "random" or not self.crops.salient:
                return drawn
            extent, saliency = self._extent(ids), self.saliency
            salient = possible_salient_boxes(extent, grid=grid, saliency=saliency, size=size)
            return np.concatenate([drawn, salient], axis=1)

        plans = [
            self._plan("eval", np.unique(train), self.crops, places),
            views,
            self._plan("eval", np.unique(judged), self.crops, None),
        ]
        if self.context.is_main:
            self._make([plan for plan in plans if not plan.path.is_file()])
        _wait(self.context)
        first, second, third = (plan.open() for plan in plans)
        return FeatureCaches(train=first, views=second, judged=third)

    def _plan(
        self, mode: Mode, ids: NDArray[np.int64], crops: CropConfig, rule: BoxRule | None
    ) -> "_Plan":
        boxes = self._boxes(mode, ids, crops, rule)
        recipe = decode_choice(self.shard_set, self.context.decode, self.context.device).recipe
        path = self.folder / f"{mode}-{self._key(mode, ids, boxes, crops, recipe)}.npy"
        return _Plan(mode=mode, ids=ids, boxes=boxes, crops=crops, path=path)

    def _make(self, plans: Sequence["_Plan"]) -> None:
        """Compute what is missing, after saying what it takes."""
        if not plans:
            return
        crops = sum(plan.count for plan in plans)
        total = sum(plan.count * _size_of(*self._features_of(plan)) for plan in plans)
        what = f"features of {crops:,} crops (made once, kept in runtime.cells)"
        tell_cost(self.folder, total, what)
        for plan in plans:
            with hold_file(plan.path, "lmcl train: features"):
                if not plan.path.is_file():
                    self._fill(plan)

    @torch.no_grad()
    def _features_of(self, plan: "_Plan") -> tuple[int, int, np.dtype]:
        """Cells and features of one crop of a plan, and the type of their numbers."""
        side = plan.crops.size
        blank = torch.zeros((1, 3, side, side), device=self.context.device)
        with autocast(self.context.device, self.preprocessing.precision):
            features = _bits(self.stem.cells(blank).cpu())
        return features.shape[1], features.shape[2], features.dtype

    def _boxes(
        self, mode: Mode, ids: NDArray[np.int64], crops: CropConfig, rule: BoxRule | None
    ) -> Int32[np.ndarray, "n k 4"]:
        samples = self.shard_set.samples
        heights, widths = samples.height[ids], samples.width[ids]
        if mode == "global":
            boxes = np.zeros((len(ids), 1, 4), np.int32)
            boxes[:, 0, 2:] = scaled_sizes(heights, widths, None)
            return boxes
        frames = frame_sizes(heights, widths, crops)
        return rule(ids, frames) if rule else evaluation_boxes(ids, frames, crops)

    def _fill(self, plan: "_Plan") -> None:
        """Run the stem over a plan's crops; a later process goes on where this one is stopped."""
        cells, width, dtype = self._features_of(plan)
        shape = (*plan.boxes.shape[:2], cells, width)
        partial = PartialFeatures(plan.path, shape=shape, dtype=dtype)

        def rows_of(batch: CropBatch) -> NDArray[np.generic]:
            features = self._features(batch)
            return _bits(features.reshape(-1, shape[1], *features.shape[1:])[batch.valid.cpu()])

        fill_by_batches(
            partial,
            self._loader(plan),
            plan.ids,
            rows_of,
            title="features of the frozen stem",
            progress=self.context.progress,
        )

    def _loader(self, plan: "_Plan") -> Loader:
        ids, boxes = plan.ids, plan.boxes
        return Loader(
            self.shard_set,
            ids,
            crops=replace(plan.crops, evaluation=boxes.shape[1]),
            batch_size=min(_IMAGES, len(ids)),
            mode=plan.mode,
            seed=0,
            device=self.context.device,
            decode=self.context.decode,
            # One row of boxes an id: what an image can be shown by depends on its neighbours' size.
            rule=lambda asked, _frames: boxes[np.searchsorted(ids, asked)],
        )

    @torch.no_grad()
    def _features(self, batch: CropBatch) -> Float[Tensor, "n t c"]:
        shown = preprocess(batch.crops, self.preprocessing)
        with autocast(self.context.device, self.preprocessing.precision):
            return torch.cat([self.stem.cells(part).cpu() for part in torch.split(shown, _CROPS)])

    def _key(
        self,
        mode: Mode,
        ids: NDArray[np.int64],
        boxes: NDArray[np.int32],
        crops: CropConfig,
        recipe: str,
    ) -> str:
        """Everything the features depend on, as a file name."""
        # In the order of earlier versions, so that theirs are found.
        pixels = preprocessing_key(self.preprocessing)
        rest = (mode, crops.size, crops.short_side or crops.max_side, recipe, pixels, self.stem.key)
        return feature_key(self.shard_set, ids, boxes, layers=self.stem.layers, rest=rest)

    def _view_crops(self) -> CropConfig:
        return replace(self.crops, size=self.saliency.view, salient=False)

    def _extent(self, ids: NDArray[np.int64]) -> Int64[np.ndarray, "n 2"]:
        samples = self.shard_set.samples
        return scaled_sizes(samples.height[ids], samples.width[ids], self.crops)


def feature_key(
    shard_set: ShardSet,
    ids: NDArray[np.int64],
    boxes: NDArray[np.int32],
    *,
    layers: nn.Module,
    rest: tuple[object, ...],
) -> str:
    """A hash of what features depend on: images, places, weights, and the `rest`."""
    digest = hashlib.sha256(shard_set.samples.sha256[ids].tobytes())
    for array in (ids, boxes):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, tensor in sorted(layers.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    digest.update(repr(rest).encode())
    return digest.hexdigest()[:20]


def preprocessing_key(preprocessing: Preprocessing) -> str:
    """Part of a cache's file name, spelled as earlier versions did, so that theirs are found."""
    return (
        f"Pixels(mean={preprocessing.mean}, std={preprocessing.std}, "
        f"precision={preprocessing.precision})"
    )


def _size_of(cells: int, features: int, dtype: np.dtype) -> int:
    """Bytes of one crop."""
    return int(cells * features * dtype.itemsize)


def _wait(context: RankContext) -> None:
    if context.world_size > 1:
        torch.distributed.barrier()


def _bits(features: Tensor) -> NDArray[np.generic]:
    """Numpy has no bfloat16."""
    return (features.view(torch.int16) if features.dtype == torch.bfloat16 else features).numpy()
