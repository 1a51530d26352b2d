"""PNGs of 16 bits per channel, which Pillow reads with the lower byte cut off, or clipped.

Pillow's decoder undoes compression, filters and interlacing; it is asked for bytes rather than for
pixels. Of grey it is told that there are twice as many channels of 8 bits, which look alike to the
PNG filters; of colour it decodes the upper bytes, then the lower ones. Never more is decompressed
than the header promises, and numbers of 16 bits exist for a strip of rows only.

Source of the filters: PNG specification, third edition, section 9 (they work on bytes, and look as
many bytes back as a pixel has).
"""

import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int16, UInt8
from PIL import Image, ImageFile

from shards.image_formats import open_image

_GREY, _GREY_ALPHA = 0, 4
# Channels of 8 bits that have the same bytes per pixel: grey and alpha, RGB and alpha.
_AS_8_BITS = {_GREY: 4, _GREY_ALPHA: 6}
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}
# First row and column of each interlacing pass, and the distance to the next.
_ADAM7 = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
_STRIP_PIXELS = 1 << 20


def is_png16(data: bytes) -> bool:
    """Whether the header of a PNG says 16 bits per channel."""
    return data[8:16] == b"\0\0\0\rIHDR" and data[24:25] == b"\x10"


def decode_png16(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    """Upper 8 bits of a PNG of 16 bits, rounded (v / 257), as RGB; alpha is dropped.

    An image of p pixels needs 7 p bytes and a strip.

    Raises:
        ShardError: If it cannot be opened as an image.
        OSError: If the file is damaged.
        ValueError: If it has no 16 bits per channel.
    """
    if not is_png16(data):
        raise ValueError("not a PNG of 16 bits per channel")
    kind = data[25]
    _refuse_short(data)
    return _decode_grey(data, kind) if kind in _AS_8_BITS else _decode_colour(data)


def round_16_bits(
    upper: UInt8[np.ndarray, "*shape"], lower: UInt8[np.ndarray, "*shape"]
) -> UInt8[np.ndarray, "*shape"]:
    """`round((256 upper + lower) / 257)`: what is above or below 257 times the upper byte."""
    over: Int16[np.ndarray, "*shape"] = lower.astype(np.int16) - upper
    return upper + (over > 128).astype(np.uint8) - (over < -128).astype(np.uint8)


def _decode_grey(data: bytes, kind: int) -> UInt8[np.ndarray, "h w 3"]:
    header = data[12:24] + bytes([8, _AS_8_BITS[kind]]) + data[26:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    with open_image(data[:12] + header + checksum + data[33:]) as image:
        image.load()
        out = np.empty((image.height, image.width, 3), np.uint8)
        for rows, strip in _strips(image):
            out[rows] = round_16_bits(strip[..., 0], strip[..., 1])[..., None]
    return out


def _decode_colour(data: bytes) -> UInt8[np.ndarray, "h w 3"]:
    with open_image(data) as image:
        image.load()
        out = np.empty((image.height, image.width, 3), np.uint8)
        for rows, strip in _strips(image):
            out[rows] = strip[..., :3]
    with open_image(data) as image:
        # "RGB;16B" takes the first of two bytes, "RGB;16L" the second.
        image.tile = [
            tile._replace(args=str(tile.args).replace("16B", "16L")) for tile in image.tile
        ]
        image.load()
        for rows, strip in _strips(image):
            out[rows] = round_16_bits(out[rows], strip[..., :3])
    return out


def _refuse_short(data: bytes) -> None:
    """Refuse a stream that ends too early: Pillow's decoder fills the image up with zeros."""
    width, height, _, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    missing = sum(
        rows * (1 + columns * 2 * _CHANNELS.get(kind, 1))
        for rows, columns in (
            (len(range(y, height, down)), len(range(x, width, right)))
            for y, x, down, right in (_ADAM7 if interlaced else ((0, 0, 1, 1),))
        )
        if columns
    )
    stream = zlib.decompressobj()
    try:
        for part in _image_data(data):
            while part and missing > 0 and not stream.eof:
                missing -= len(stream.decompress(part, min(missing, _STRIP_PIXELS)))
                part = stream.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"the PNG's image data are damaged ({error})") from error
    if missing > 0:
        raise ValueError(f"the PNG's image data end {missing:,} bytes too early")


def _image_data(data: bytes) -> Iterator[memoryview | bytes]:
    view, at = memoryview(data), 8
    while at + 12 <= len(data):
        size = int.from_bytes(view[at : at + 4], "big")
        if bytes(view[at + 4 : at + 8]) == b"IDAT":
            yield view[at + 8 : at + 8 + size]
        at += 12 + size


def _strips(image: ImageFile.ImageFile) -> Iterator[tuple[slice, UInt8[np.ndarray, "y w c"]]]:
    """An image by strips of about a million pixels: which rows, and their bytes."""
    height = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, height):
        below = min(image.height, top + height)
        strip: Image.Image = image.crop((0, top, image.width, below))
        yield slice(top, below), np.asarray(strip)
