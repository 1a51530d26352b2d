"""Host side of the kernel in `_preprocess_triton.py`: the result's memory, grid and arguments."""

import torch
import triton
from torch import Tensor

from pipeline import _preprocess_triton as device

_BLOCK = 2048


def launch_preprocess(
    pixels: Tensor,
    flip: Tensor | None,
    *,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    """Launch on the current stream; no argument is read by the host.

    Args:
        pixels: uint8 [n, s, s, 3], contiguous.
        flip: bool [n] on the same device; None mirrors nothing.
        scale: Factor of each channel.
        shift: What is added to each channel.
        dtype: Of the result.
        channels_last: Layout of the result's memory.

    Returns:
        [n, 3, s, s].
    """
    n, size = pixels.shape[:2]
    shape = (n, size, size, 3) if channels_last else (n, 3, size, size)
    out = torch.empty(shape, dtype=dtype, device=pixels.device)
    if n:
        device.preprocess[(n, triton.cdiv(size * size * 3, _BLOCK))](
            pixels, pixels if flip is None else flip.view(torch.uint8), out, size, *scale, *shift,
            HAS_FLIP=flip is not None, CHANNELS_LAST=channels_last, BLOCK=_BLOCK,
        )  # fmt: skip
    return out.permute(0, 3, 1, 2) if channels_last else out
