"""Where the teacher looks: CLS attention -> best token window -> a crop at native resolution.

The window is chosen on the squeezed whole image; the crop is cut from the image itself, so what is
judged is never resampled (method.md, step 3).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lmcl.errors import ConfigError
from lmcl.utils.validators import check_bounds
from pipeline.saliency_table import SaliencyTable


@dataclass(frozen=True, kw_only=True)
class SaliencyConfig:
    """How the salient crop of an image is found."""

    view: int = 224
    """Side in pixels to which the whole image is squeezed for the teacher."""
    layers: int = 3
    """How many of the last encoder layers are averaged [paper: 3]."""
    window: int = 8
    """Side of the salient window in tokens [paper: 8 of 14]."""
    every: int = 1
    """The teacher looks again every so many epochs [paper: 1]."""
    batch_size: int = 64
    """Images per rank and forward pass while the teacher looks."""

    def __post_init__(self) -> None:
        names = ("view", "layers", "window", "every", "batch_size")
        most = {"view": 8192, "layers": 1024, "window": 1024, "every": 10**6, "batch_size": 10**5}
        check_bounds("saliency", self, least=dict.fromkeys(names, 1), most=most)


def best_window(attention: Float[Tensor, "b g g"], window: int) -> Int[Tensor, "b 2"]:
    """Row and column of the `window` x `window` token square with the greatest attention sum.

    Ties go to the first square in reading order. Sums are taken in float64, so the choice does not
    depend on the batch.

    Raises:
        ConfigError: If the window is larger than the token map.

    Source: [Local Manifold Learning, 2024], saliency cropping; an average pool gives all sums.
    """
    grid = attention.shape[-1]
    if window > grid:
        raise ConfigError(
            f"saliency.window is {window} tokens, but the encoder's map is {grid} x {grid}; "
            f"set saliency.window to at most {grid}"
        )
    sums = functional.avg_pool2d(attention.double()[:, None], window, stride=1)[:, 0]
    best = sums.flatten(1).argmax(dim=1)
    side = grid - window + 1
    return torch.stack([best // side, best % side], dim=1)


def window_to_box(
    window_at: NDArray[np.int64],
    extent: NDArray[np.int64],
    *,
    grid: int,
    window: int,
    size: int,
) -> NDArray[np.int32]:
    """Crop boxes of `size` pixels centred on token windows and moved inside their images.

    Args:
        window_at: [b, 2] row and column of each window's first token.
        extent: [b, 2] heights and widths of the upright images in pixels, after `max_side`.
        grid: Tokens per side of the map.
        window: Tokens per side of the window.
        size: Side of the crop in pixels.

    Returns:
        [b, 4] boxes (y, x, h, w) in pixels; images smaller than the crop get (0, 0, size, size).

    Source: [ours] method.md, step 3 (`salient_crop = native`).
    """
    centre = (window_at + window / 2) / grid * extent
    corner = np.clip(np.round(centre - size / 2), 0, np.maximum(extent - size, 0))
    sides = np.full_like(corner, size)
    return np.concatenate([corner, sides], axis=1).astype(np.int32)


def make_table(ids: NDArray[np.int64], boxes: NDArray[np.int32]) -> SaliencyTable:
    """The table of one pass, sorted by id; pads and repeats of an id collapse into one row."""
    unique, first = np.unique(ids, return_index=True)
    return SaliencyTable(ids=unique, boxes=boxes[first])
