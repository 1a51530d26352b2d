"""From stored pixels to what an encoder takes, in one pass over memory."""

import importlib.util
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def preprocess_crops(
    crops: UInt8[Tensor, "b v s s 3"],
    flip: Bool[Tensor, " n"] | None = None,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = True,
) -> Float[Tensor, "b*v 3 s s"]:
    """Mirror and normalise crops: (crops / 255 - mean) / std per channel, image-major.

    Computed in float32 and rounded once to `dtype`, on the device the crops lie on: by one Triton
    kernel on a GPU, on the current stream, without waiting for anything.

    Args:
        crops: Pixels of 0 to 255, red, green, blue.
        flip: Which crops are mirrored left to right, one entry a crop (n = b * v); None: none.
        mean: One per channel, in units of [0, 1].
        std: One per channel, in units of [0, 1], above 0.
        dtype: Of the result.
        channels_last: Whether the result's memory is channels-last or contiguous.
    """
    pixels = crops.flatten(0, 1)
    scale = [1 / (255 * s) for s in std]
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    if pixels.device.type == "cuda":
        fused: Tensor = _preprocess(pixels, flip, scale, shift, dtype, channels_last)
        return fused
    if pixels.device.type == "cpu":
        out = _by_crop(pixels, flip, scale, shift, dtype)
    else:
        out = _expression(pixels, flip, scale, shift, dtype)
    return out if channels_last else out.contiguous()


def normalize(
    crops: UInt8[Tensor, "b v s s 3"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "b*v 3 s s"]:
    """`preprocess_crops` of crops that are never mirrored, in channels-last memory."""
    return preprocess_crops(crops, mean=mean, std=std, dtype=dtype)


def _by_crop(
    pixels: Tensor,
    flip: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """On the CPU.

    One crop at a time stays in the cache between conversion and arithmetic, and whole rows of
    pixels instead of three channels let the loop vectorise: 0.6 ms for 11 crops of 224 against
    3.1 ms for the plain expression (one core).
    """
    n, size = pixels.shape[:2]
    out = torch.empty(pixels.shape, dtype=dtype)
    row_scale = torch.tensor(scale, dtype=torch.float32).repeat(size)
    row_shift = torch.tensor(shift, dtype=torch.float32).repeat(size)
    mirrored = [False] * n if flip is None else flip.tolist()
    for source, target, is_mirrored in zip(pixels, out, mirrored, strict=True):
        # Bytes are mirrored, a quarter of what their floats would move.
        rows = (source.flip(1) if is_mirrored else source).reshape(size, size * 3)
        target.view(size, size * 3).copy_(torch.addcmul(row_shift, rows.float(), row_scale))
    # Bytes of [n, s, s, 3] seen as [n, 3, s, s] are what torch calls channels-last: no copy.
    return out.permute(0, 3, 1, 2)


def _expression(
    pixels: Tensor,
    flip: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Where there is neither Triton nor a CPU: the same arithmetic in plain operators."""
    if flip is not None:
        pixels = torch.where(flip[:, None, None, None], pixels.flip(2), pixels)
    out = torch.empty(pixels.shape, dtype=dtype, device=pixels.device)
    factors = torch.tensor([scale, shift], dtype=torch.float32)
    if pixels.device.type == "cuda":
        # From pinned memory the host does not wait for the copy.
        factors = factors.pin_memory()
    factors = factors.to(pixels.device, non_blocking=True)
    return out.copy_(torch.addcmul(factors[1], pixels, factors[0])).permute(0, 3, 1, 2)


@torch.library.custom_op("lmcl::preprocess_crops", mutates_args=(), device_types="cuda")
def _preprocess(
    pixels: Tensor,
    flip: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        out = _expression(pixels, flip, scale, shift, dtype)
        return out if channels_last else out.contiguous()
    # Triton is there on Linux only, and reads the environment when a kernel is defined.
    from pipeline.preprocess_launch import launch_preprocess

    pixels = pixels.contiguous()
    return launch_preprocess(
        pixels, flip, scale=scale, shift=shift, dtype=dtype, channels_last=channels_last
    )


@_preprocess.register_fake
def _(
    pixels: Tensor,
    flip: Tensor | None,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
    channels_last: bool,
) -> Tensor:
    n, size = pixels.shape[:2]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = (n, 3, size, size)
    return torch.empty(shape, dtype=dtype, device=pixels.device, memory_format=layout)
