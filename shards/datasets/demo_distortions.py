"""Ten ways to damage a picture at five levels, tuned so that equal levels look equally bad."""

import io
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from shards.datasets.demo_contents import Pixels, Rng, to_pixels
from shards.image_formats import open_image

LEVELS = 5


def distort(pixels: Pixels, *, family: str, level: int, rng: Rng) -> NDArray[np.uint8]:
    """A damaged copy of a picture.

    Args:
        pixels: [h, w, 3] in 0..1.
        family: One of `FAMILIES`, or `pristine`.
        level: 1 (just visible) to 5 (bad); ignored for `pristine`.
        rng: For noise and positions.
    """
    if family == "pristine":
        return _to_bytes(pixels)
    return _to_bytes(_FAMILIES[family](pixels, level - 1, rng))


def _blur(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    radius = (0.8, 1.4, 2.3, 3.6, 5.5)[level]
    return _filtered(pixels, ImageFilter.GaussianBlur(radius))


def _motion(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    length = (3, 5, 9, 15, 24)[level]
    angle = rng.uniform(0, np.pi)
    steps = np.linspace(-0.5, 0.5, 2 * length) * length
    total = np.zeros_like(pixels)
    for step in steps:
        shift = (round(float(step * np.sin(angle))), round(float(step * np.cos(angle))))
        total += _shifted(pixels, *shift)
    return np.asarray(total / len(steps), np.float32)


def _noise(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    sigma = (0.025, 0.05, 0.09, 0.16, 0.28)[level]
    return pixels + rng.standard_normal(pixels.shape).astype(np.float32) * np.float32(sigma)


def _impulse(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    share = (0.004, 0.015, 0.04, 0.10, 0.22)[level]
    drawn = rng.random(pixels.shape[:2])
    out = pixels.copy()
    out[drawn < share / 2] = 0
    out[drawn > 1 - share / 2] = 1
    return out


def _jpeg(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    quality = (35, 18, 9, 4, 1)[level]
    stream = io.BytesIO()
    Image.fromarray(_to_bytes(pixels)).save(stream, "JPEG", quality=quality, subsampling=2)
    return to_pixels(open_image(stream.getvalue()))


def _quantise(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    steps = (12, 8, 5, 3, 2)[level]
    return np.asarray(np.round(pixels * (steps - 1)) / (steps - 1), np.float32)


def _contrast(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    factor = (0.72, 0.52, 0.36, 0.22, 0.11)[level]
    return (pixels - 0.5) * np.float32(factor) + np.float32(0.5)


def _colour_noise(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    # Coloured grain of two pixels that leaves brightness alone. A plain colour cast would not do:
    # on pictures with drawn palettes nobody could tell it from the picture's own colours.
    sigma = (0.03, 0.06, 0.11, 0.2, 0.34)[level]
    height, width, _ = pixels.shape
    grain = rng.standard_normal((-(-height // 2), -(-width // 2), 3)).astype(np.float32)
    grain -= grain.mean(axis=2, keepdims=True)
    grain = grain.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]
    return pixels + grain * np.float32(sigma)


def _pixelate(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    cell = (2.0, 3.0, 4.5, 7.0, 11.0)[level]
    height, width = pixels.shape[:2]
    image = Image.fromarray(_to_bytes(pixels))
    small = (max(1, round(width / cell)), max(1, round(height / cell)))
    coarse = image.resize(small, Image.Resampling.BOX)
    return to_pixels(coarse.resize((width, height), Image.Resampling.NEAREST))


def _blocks(pixels: Pixels, level: int, rng: Rng) -> Pixels:
    share = (0.02, 0.06, 0.13, 0.25, 0.42)[level]
    side = 12
    height, width = pixels.shape[:2]
    out = pixels.copy()
    cells = -(-height // side) * -(-width // side)
    for cell in rng.choice(cells, max(1, round(cells * share)), replace=False):
        y, x = (int(cell) // -(-width // side)) * side, (int(cell) % -(-width // side)) * side
        out[y : y + side, x : x + side] = rng.random(3, dtype=np.float32)
    return out


_FAMILIES: dict[str, Callable[[Pixels, int, Rng], Pixels]] = {
    "gaussian-blur": _blur,
    "motion-blur": _motion,
    "white-noise": _noise,
    "impulse-noise": _impulse,
    "jpeg": _jpeg,
    "quantisation": _quantise,
    "contrast-loss": _contrast,
    "colour-noise": _colour_noise,
    "pixelation": _pixelate,
    "block-loss": _blocks,
}
FAMILIES = tuple(_FAMILIES)


def _filtered(pixels: Pixels, kernel: ImageFilter.GaussianBlur) -> Pixels:
    return to_pixels(Image.fromarray(_to_bytes(pixels)).filter(kernel))


def _shifted(pixels: Pixels, dy: int, dx: int) -> Pixels:
    """The picture moved by whole pixels, its border repeated."""
    height, width = pixels.shape[:2]
    rows = np.clip(np.arange(height) + dy, 0, height - 1)
    columns = np.clip(np.arange(width) + dx, 0, width - 1)
    moved: Pixels = pixels[rows][:, columns]
    return moved


def _to_bytes(pixels: Pixels) -> NDArray[np.uint8]:
    return (np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)
