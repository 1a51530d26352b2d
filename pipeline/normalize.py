"""From stored pixels to what an encoder takes, in one pass over memory."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor


def normalize(
    crops: UInt8[Tensor, "b v s s 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b*v 3 s s"]:
    """(crops / 255 - mean) / std per channel, image-major, in channels-last memory.

    Computed in float32 and rounded once to `dtype`, on the device the crops lie on.

    Args:
        crops: Pixels of 0 to 255, red, green, blue.
        mean: One per channel, in units of [0, 1].
        std: One per channel, in units of [0, 1], above 0.
        dtype: Of the result.
    """
    scale = torch.tensor([1 / (255 * s) for s in std], dtype=torch.float32, device=crops.device)
    shift = torch.tensor(
        [-m / s for m, s in zip(mean, std, strict=True)], dtype=torch.float32, device=crops.device
    )
    pixels = crops.flatten(0, 1)
    n, size = pixels.shape[:2]
    out = torch.empty(pixels.shape, dtype=dtype, device=crops.device)
    if crops.device.type == "cpu":
        # One crop at a time stays in the cache between conversion and arithmetic, and whole rows of
        # pixels instead of three channels let the loop vectorise: 0.6 ms for 11 crops of 224
        # against 3.1 ms for the plain expression (one core).
        row_scale, row_shift = scale.repeat(size), shift.repeat(size)
        rows = (n, size, size * 3)
        for source, target in zip(pixels.view(rows), out.view(rows), strict=True):
            target.copy_(torch.addcmul(row_shift, source.float(), row_scale))
    else:
        out.copy_(torch.addcmul(shift, pixels, scale))
    # Bytes of [n, s, s, 3] seen as [n, 3, s, s] are what torch calls channels-last: no copy.
    return out.permute(0, 3, 1, 2)
