"""Preprocessing: pixels or kept features to what a network takes, and autocast."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipeline.normalize import preprocess_crops

PRECISIONS: dict[Literal["no", "bf16", "fp16"], torch.dtype] = {
    "no": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Values of `runtime.precision`: the type networks compute in."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How pixels reach a network; the same for training, saliency and scoring."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    precision: torch.dtype
    """Autocast type; float32 = no autocast."""


def preprocess(crops: Tensor, preprocessing: Preprocessing, flip: Tensor | None = None) -> Tensor:
    """What a network takes of a batch: pixels are normalised, kept features stay as they are.

    Pixels arrive in the type the network computes in, rounded once, as autocast would round them.

    Args:
        crops: Pixels [b, v, s, s, 3], or features [b, v, t, c], which cannot be mirrored.
        preprocessing: Mean and deviation of pixels, and the type of the result.
        flip: Which crops are mirrored left to right, [b * v]; None: none.

    Raises:
        ValueError: If features are to be mirrored.
    """
    if crops.is_floating_point():
        if flip is not None:
            raise ValueError(
                "kept features were asked to be mirrored, but those of a mirrored crop are others; "
                "set train.flip = false, or runtime.cells = '' to see pixels"
            )
        return crops.flatten(0, 1)
    return preprocess_crops(
        crops,
        flip,
        mean=preprocessing.mean,
        std=preprocessing.std,
        dtype=preprocessing.precision,
    )


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Autocast of the networks; switched off for float32."""
    enabled = precision != torch.float32
    return torch.autocast(device.type, dtype=precision if enabled else None, enabled=enabled)
