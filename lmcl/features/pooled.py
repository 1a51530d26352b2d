"""Pooled features: one vector an image of what a frozen encoder sees, for `lmcl probe`.

At several depths, means and deviations over all places of all of an image's evaluation crops; a
readout in closed form takes nothing else. They are small (some kilobytes an image), computed once,
and kept in a file like the crops' features of `lmcl.features.build`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int32
from numpy.typing import NDArray
from torch import Tensor, nn

from lmcl.distributed import RankContext
from lmcl.features.build import feature_key, preprocessing_key
from lmcl.features.partial import PartialFeatures, fill_by_batches, hold_file
from lmcl.models.conv_vit import ConvVit
from lmcl.models.encoder import Encoder
from lmcl.models.preprocess import Preprocessing, autocast, preprocess
from lmcl.models.stem import LevelStem, at_least_float32
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, evaluation_boxes, frame_sizes
from pipeline.loader import Loader, decode_choice
from shards.read import ShardSet

_IMAGES = 4
"""Images a batch while features are computed."""
_CROPS = 16
"""Crops a forward pass."""
_DEPTHS = (0.25, 0.5, 0.75)
"""Of a transformer: after so much of its blocks, and after all of them."""
_RECIPE = "pooled-1"
"""Rises when the same encoder gives other numbers; part of the file's name."""


@dataclass(frozen=True, kw_only=True)
class PooledFeatures:
    """Maker of pooled features with one encoder, and of the files that keep them."""

    folder: Path
    """Where they are kept."""
    shard_set: ShardSet
    encoder: Encoder
    """In evaluation mode, on the context's device."""
    has_trained_blocks: bool
    """Whether the blocks above a stem have learned; random ones have nothing to say."""
    crops: CropConfig
    """The evaluation crops are seen."""
    preprocessing: Preprocessing
    context: RankContext
    """Of one process."""

    def make(self, ids: NDArray[np.int64]) -> Float[np.ndarray, "n f"]:
        """Features of some images, in the order of rising ids; read where they are kept already.

        Args:
            ids: Rows of the set's sample table, rising.
        """
        boxes = self._boxes(ids)
        path = self.folder / f"pooled-{self._key(ids, boxes)}.npy"
        if not path.is_file():
            with hold_file(path, "lmcl probe: features"):
                if not path.is_file():
                    self._fill(path, ids, boxes)
        return np.asarray(np.load(path, mmap_mode="r"))

    def _fill(self, path: Path, ids: NDArray[np.int64], boxes: NDArray[np.int32]) -> None:
        """Compute what is missing; a later process goes on where this one is stopped."""
        partial = PartialFeatures(path, shape=(len(ids), self._width()), dtype=np.dtype(np.float32))
        loader = Loader(
            self.shard_set,
            ids,
            crops=replace(self.crops, evaluation=boxes.shape[1]),
            batch_size=min(_IMAGES, len(ids)),
            mode="eval",
            seed=0,
            device=self.context.device,
            decode=self.context.decode,
        )
        fill_by_batches(
            partial,
            loader,
            ids,
            lambda batch: self._of_batch(batch)[batch.valid.cpu()].numpy(),
            title="features of the frozen encoder",
            progress=self.context.progress,
        )

    @torch.no_grad()
    def _of_batch(self, batch: CropBatch) -> Float[Tensor, "b f"]:
        """Features of the images of a batch, on the host; crops at one place are seen once."""
        images, views = batch.boxes.shape[:2]
        is_new = _first_of_their_place(batch.boxes)
        image_of = torch.arange(images).repeat_interleave(views)[is_new]
        shown = preprocess(batch.crops, self.preprocessing)[is_new.to(self.context.device)]
        parts = [self._of_crops(some) for some in torch.split(shown, _CROPS)]
        mean, variance = (torch.cat(column) for column in zip(*parts, strict=True))
        return torch.stack(
            [_over_crops(mean[image_of == i], variance[image_of == i]) for i in range(images)]
        ).float()

    def _of_crops(self, pixels: Float[Tensor, "n 3 s s"]) -> tuple[Tensor, Tensor]:
        """Means and variances [n, c] over the places of each crop, all depths in a row; float64."""
        with autocast(self.context.device, self.preprocessing.precision):
            levels = depth_features(self.encoder, pixels, has_blocks=self.has_trained_blocks)
        found = [torch.var_mean(level.cpu().double(), dim=1, correction=0) for level in levels]
        variance, mean = (torch.cat(column, dim=1) for column in zip(*found, strict=True))
        return mean, variance

    @torch.no_grad()
    def _width(self) -> int:
        blank = torch.zeros((1, 3, self.crops.size, self.crops.size), device=self.context.device)
        return 2 * self._of_crops(blank)[0].shape[1]

    def _boxes(self, ids: NDArray[np.int64]) -> Int32[np.ndarray, "n k 4"]:
        samples = self.shard_set.samples
        frames = frame_sizes(samples.height[ids], samples.width[ids], self.crops)
        return evaluation_boxes(ids, frames, self.crops)

    def _key(self, ids: NDArray[np.int64], boxes: NDArray[np.int32]) -> str:
        crops, seen = self.crops, self._seen()
        recipe = decode_choice(self.shard_set, self.context.decode, self.context.device).recipe
        return feature_key(
            self.shard_set,
            ids,
            boxes,
            layers=seen,
            rest=(
                _RECIPE,
                crops.size,
                crops.max_side,
                crops.short_side,
                recipe,
                preprocessing_key(self.preprocessing),
                getattr(seen, "key", type(seen).__name__),
            ),
        )

    def _seen(self) -> nn.Module:
        """What the features depend on: of a hybrid with random blocks its stem alone."""
        encoder = self.encoder
        is_stem = isinstance(encoder, ConvVit) and not self.has_trained_blocks
        return encoder.stem if is_stem else encoder  # type: ignore[return-value]


def depth_features(
    encoder: Encoder, pixels: Float[Tensor, "n 3 s s"], *, has_blocks: bool
) -> list[Float[Tensor, "n t c"]]:
    """What an encoder knows at several depths: places x features, the shallowest first.

    Of a stem its levels; of blocks that have learned the patches after a quarter, a half and three
    quarters of them, the last ones after the final norm, and CLS as a level of one place.
    """
    levels: list[Tensor] = []
    if isinstance(encoder, ConvVit):
        levels += _stem_levels(encoder, pixels)
        if not has_blocks:
            return levels
    return [*levels, *_block_levels(encoder, pixels)]


def _stem_levels(encoder: ConvVit, pixels: Tensor) -> Sequence[Tensor]:
    stem = encoder.stem
    if isinstance(stem, LevelStem):
        return torch.split(at_least_float32(stem.cells(pixels)), list(stem.widths), dim=-1)
    return [stem(pixels)[0]]


def _block_levels(encoder: Encoder, pixels: Tensor) -> list[Tensor]:
    blocks, kept = encoder.layers(), list[Tensor]()
    places = sorted({max(1, round(len(blocks) * depth)) for depth in _DEPTHS} - {len(blocks)})

    def keep(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        kept.append(output[:, encoder.prefix :])

    hooks = [blocks[place - 1].register_forward_hook(keep) for place in places]
    try:
        tokens = encoder.tokens(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    return [*kept, tokens[:, 1:], tokens[:, :1]]


def _first_of_their_place(boxes: Int32[Tensor, "b v 4"]) -> Tensor:
    """Which crops [b * v] are the first of their image at their place."""
    same = (boxes[:, :, None] == boxes[:, None, :]).all(-1).cpu()
    return ~torch.tril(same, diagonal=-1).any(-1).reshape(-1)


def _over_crops(mean: Float[Tensor, "k c"], variance: Float[Tensor, "k c"]) -> Float[Tensor, " f"]:
    """Means, then deviations, over the places of all crops of one image."""
    between = mean.var(dim=0, correction=0)
    return torch.cat([mean.mean(dim=0), (variance.mean(dim=0) + between).sqrt()])
