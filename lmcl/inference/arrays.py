"""One rule from arrays and tensors of any kind to the pixels of an image.

* The channel axis is the one that has 1, 3 or 4 entries: `[h, w, c]` or `[c, h, w]`. Where both
  ends have, it is the first of a tensor and the last of an array. `[h, w]` is grey.
* Grey becomes three equal channels, alpha is dropped, as of files.
* Bytes are taken as they are, 16 bits (uint16) are rounded to 8, other integers lie in 0..255.
* Floats lie in [0, 1]; up to a quarter beyond, as resampling overshoots, is clamped.

The order of channels cannot be seen: it is red, green, blue. OpenCV's blue, green, red has to be
turned by the caller (`image[..., ::-1]`).
"""

import sys

import numpy as np
from jaxtyping import Shaped, UInt8

_CHANNELS = (1, 3, 4)
OVERSHOOT = 0.25
"""How far floats may leave [0, 1]; bicubic resampling leaves it by .14. Normalised pixels leave it
by more."""


def is_tensor(value: object) -> bool:
    """Whether it is torch's; torch is not imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_array_like(value: object) -> bool:
    """An array, a tensor, or what turns itself into an array (JAX, TensorFlow, CuPy on a CPU)."""
    return is_tensor(value) or hasattr(value, "__array__")


def as_array(value: object) -> tuple[Shaped[np.ndarray, "..."], bool]:
    """The numbers of an array-like on the host, and whether channels come first by custom."""
    if not is_tensor(value):
        return np.asarray(value), False
    torch = sys.modules["torch"]
    tensor = value.detach().cpu()  # type: ignore[attr-defined]
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.numpy(), True


def rgb_pixels(
    values: Shaped[np.ndarray, "..."], *, channels_first: bool
) -> tuple[UInt8[np.ndarray, "h w 3"], bool]:
    """RGB of one image by the rule above, and whether floats had to be clamped.

    Args:
        values: `[h, w]`, `[h, w, c]` or `[c, h, w]`.
        channels_first: What is meant where both ends could be channels.

    Raises:
        ValueError: If it is no such image; the message says what to do.
    """
    _refuse_shape(values)
    pixels = _channels_last(values, channels_first=channels_first)
    narrow, overshot = _bytes(pixels[..., :3])
    if narrow.shape[2] == 1:
        narrow = np.repeat(narrow, 3, axis=2)
    return np.ascontiguousarray(narrow), overshot


def _refuse_shape(values: np.ndarray) -> None:
    got = f"got {list(values.shape)} {values.dtype}"
    if values.ndim not in (2, 3):
        raise ValueError(
            f"an image has shape [h, w], [h, w, c] or [c, h, w], {got}; give a batch [b, c, h, w] "
            "to score() itself, not inside a list"
        )
    ends = {values.shape[0], values.shape[-1]} if values.ndim == 3 else {1}
    if not ends & set(_CHANNELS):
        raise ValueError(
            f"an image has 1, 3 or 4 channels in its first or last axis, {got}; choose three of "
            "its channels, in the order red, green, blue"
        )
    if not values.size:
        raise ValueError(f"an image has at least one pixel, {got}; leave it out")


def _channels_last(values: np.ndarray, *, channels_first: bool) -> np.ndarray:
    if values.ndim == 2:
        return values[..., None]
    first, last = (values.shape[axis] in _CHANNELS for axis in (0, 2))
    if first and (channels_first or not last):
        return np.moveaxis(values, 0, 2)
    return values


def _bytes(values: np.ndarray) -> tuple[np.ndarray, bool]:
    """Levels of 0..255, and whether floats were clamped."""
    if values.dtype == np.uint8:
        return values, False
    if values.dtype == np.uint16:
        return np.rint(values / 257).astype(np.uint8), False
    if values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 255:
            raise ValueError(
                f"an integer image lies in 0..255, got {low}..{high} ({values.dtype}); scale it to "
                "bytes, or give 16 bits as uint16"
            )
        return values.astype(np.uint8), False
    if values.dtype.kind != "f":
        raise ValueError(
            f"an image has pixels of bytes, 16 bits or floats, got {values.dtype}; convert it"
        )
    least, most = float(values.min()), float(values.max())
    # A comparison with NaN is false, so what is asked is that values are inside.
    if not (least >= -OVERSHOOT and most <= 1 + OVERSHOOT):
        raise ValueError(
            f"a float image lies in [0, 1], without NaN, got {least:.4g}..{most:.4g}; divide by "
            "255, and do not normalise it"
        )
    wide = values.astype(np.promote_types(values.dtype, np.float32), copy=False)
    return np.rint(wide.clip(0, 1) * 255).astype(np.uint8), least < 0 or most > 1
