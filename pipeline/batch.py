"""What the loader yields; the shapes of a batch are stated here and nowhere else."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BatchSets:
    """Which of several joined sets a batch's images are of."""

    number: Int64[Tensor, " b"]
    """Of each image's set, padding included."""
    rows: tuple[Int64[Tensor, " _"], ...]
    """Set by set: the rows of its images that count on this rank."""
    images_by_rank: tuple[tuple[int, ...], ...]
    """Set by set: how many of its images count on each rank."""


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """Crops of `b` images, `v` views each: random ones first, the salient one (if any) last."""

    crops: UInt8[Tensor, "b v size size 3"] | Float[Tensor, "b v cells features"]
    """Pixels as decoded, never resampled (but see `CropConfig.max_side` and mode `global`); or
    what a frozen encoder part made of them once (decision 0008)."""
    boxes: Int32[Tensor, "b v 4"]
    """y, x, height, width of each crop in the image's frame (`pipeline.boxes.frame_sizes`)."""
    mos: Float32[Tensor, " b"]
    """Label in [0, 1], higher = better; NaN where the image has none."""
    ids: Int64[Tensor, " b"]
    """Rows of the set's sample table."""
    valid: Bool[Tensor, " b"]
    """False marks padding, which no loss and no metric may count."""
    images: int
    """Images that count on this rank: rows 0 to `images` - 1 are valid, the rest is padding."""
    images_of_all_ranks: int
    """Images that count on all ranks in this step."""
    epoch: int
    """Epoch the batch belongs to."""
    step: int
    """Step within the epoch, the same on every rank."""
    gpu_decoded: Bool[np.ndarray, " b"] | None = None
    """Which images the GPU decoded; the others have the pixels of the CPU recipes. None: no GPU
    decodes here, or the crops are not pixels."""
    sets: BatchSets | None = None
    """In training on several joined sets."""
