"""Decode image files to upright RGB: the one rule, written in Pillow.

DALI's CPU decoder gives the same bits (tests/pipeline/test_decode.py); what it gives for files it
cannot read, and for images that need padding, comes from here too.
"""

import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image
from PIL import __version__ as _pillow_version

from pipeline.errors import PipelineError
from pipeline.png16 import decode_png16, is_png16, round_16_bits
from shards.decoder_notes import decoder_notes
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, describe_damage, open_image, orientation_of, upright
from shards.png import find_png_damage

PILLOW_RECIPE = f"torch-pillow-{'.'.join(_pillow_version.split('.')[:2])}"
"""Name of these pixels; it is older than the rule that nothing here needs torch."""

_STRIP_ROWS = 256
_PHOTOMETRIC = 262


def decode_rgb(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Decode by this project's rule.

    * The orientation that EXIF asks for is applied.
    * Grey becomes three equal channels; palettes and 1-bit images are expanded.
    * Alpha is dropped: the colours are taken as stored, nothing is blended.
    * 16 bits become 8 by rounding v / 257 (Pillow would clip grey and cut colours off).
    * CMYK is converted by Pillow's simple formula, colour profiles are not applied.

    The array may be read-only.

    Raises:
        PipelineError: If the bytes are no image, or a damaged one.
    """
    return _decode(data)


def decode_noted(data: bytes) -> tuple[UInt8[np.ndarray, "h w 3"], tuple[str, ...]]:
    """`decode_rgb`, and what the decoder remarked on: damage that it decoded over.

    Raises:
        PipelineError: As `decode_rgb`.
    """
    with decoder_notes() as notes:
        pixels = _decode(data)
    return pixels, notes.all()


def _decode(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    try:
        with open_image(data) as opened:
            if opened.format == "PNG":
                # Pillow would decode over what makes DALI's decoder stop.
                if damage := find_png_damage(data):
                    raise PipelineError(f"not a readable image ({damage})", exit_code=3)
                if is_png16(data):
                    return _narrow_png16(data, opened)
            if is_white_zero(opened):
                return _upright_pixels(to_rgb(opened), opened)
            return to_rgb(upright(opened))
    except (PipelineError, ShardError) as error:
        raise PipelineError(str(error), exit_code=3) from error
    except UNREADABLE as error:
        reason = f"not a readable image ({describe_damage(error, data)})"
        raise PipelineError(reason, exit_code=3) from error


def to_rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """RGB of an opened image: alpha is dropped, 16 bits are rounded to 8, other modes converted."""
    if image.mode == "RGB":
        return np.asarray(image)
    if "A" in image.mode or "transparency" in image.info:
        return np.ascontiguousarray(np.asarray(image.convert("RGBA"))[..., :3])
    if image.mode.startswith("I;16") or image.mode == "I":
        return _narrow_grey(image)
    return np.array(image.convert("RGB"))


def is_white_zero(image: Image.Image) -> bool:
    """Whether zero is white in a TIFF of 16 bits: Pillow turns those of 1 to 8 bits, but not it."""
    tags = getattr(image, "tag_v2", {}) if image.mode.startswith("I;16") else {}
    return bool(tags) and tags.get(_PHOTOMETRIC) == 0


def _narrow_grey(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    """Grey of 16 bits, a strip at a time: wider numbers take ten times a picture's memory."""
    narrow, is_negative = np.empty((image.height, image.width, 3), np.uint8), is_white_zero(image)
    for top in range(0, image.height, _STRIP_ROWS):
        rows = slice(top, min(image.height, top + _STRIP_ROWS))
        wide = np.asarray(image.crop((0, rows.start, image.width, rows.stop))).astype(np.int32)
        grey = wide.clip(0, 0xFFFF).astype(np.uint16)
        if is_negative:
            grey = 0xFFFF - grey
        narrow[rows] = round_16_bits(*_bytes_of(grey))[..., None]
    return narrow


def _bytes_of(
    wide: UInt16[np.ndarray, "h w"],
) -> tuple[UInt8[np.ndarray, "h w"], UInt8[np.ndarray, "h w"]]:
    return (wide >> 8).astype(np.uint8), (wide & 255).astype(np.uint8)


def _narrow_png16(data: bytes, opened: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    return _upright_pixels(decode_png16(data), opened)


def _upright_pixels(
    pixels: UInt8[np.ndarray, "h w 3"], opened: Image.Image
) -> UInt8[np.ndarray, "y x 3"]:
    orientation = orientation_of(opened)
    if orientation == 1:
        return pixels
    carrier = Image.fromarray(pixels)
    carrier.getexif()[0x0112] = orientation
    return np.array(upright(carrier))


def resize_rgb(
    pixels: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "height width 3"]:
    """Resize with the triangle filter, widened where it shrinks (antialiased), in float32.

    DALI's `INTERP_TRIANGULAR` differs by at most 3 levels of 255, by 0.01-0.04 on average.
    """
    if pixels.shape[:2] == (height, width):
        return pixels
    small = np.empty((height, width, 3), np.uint8)
    for channel in range(3):
        # Pillow rounds bytes between its two passes; floats it does not.
        plane = Image.fromarray(pixels[..., channel].astype(np.float32))
        wide = np.asarray(plane.resize((width, height), Image.Resampling.BILINEAR))
        small[..., channel] = np.rint(wide).clip(0, 255)
    return small


def reflect_pad(pixels: UInt8[np.ndarray, "h w 3"], least: int) -> UInt8[np.ndarray, "y x 3"]:
    """Continue an image below and to the right by its mirror image until it measures `least`.

    The edge itself is not repeated; an image so small that once is not enough is mirrored on and on
    (an image one pixel wide repeats that pixel).
    """
    below, right = (max(least - side, 0) for side in pixels.shape[:2])
    if not below and not right:
        return pixels
    return np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="reflect")
