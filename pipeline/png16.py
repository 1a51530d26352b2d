"""Colour PNGs of 16 bits per channel, which Pillow reads with the lower byte cut off.

Rare (a few scientific cameras write them), so simple rather than fast: 0.1 s for a megapixel.
"""

import struct
import zlib

import numpy as np
from jaxtyping import UInt8, UInt16

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


def decode_png16(data: bytes) -> UInt16[np.ndarray, "h w c"]:
    """All channels of a PNG of 16 bits, as stored.

    Raises:
        ValueError: If the file is damaged or has no 16 bits per channel.
    """
    width, height, depth, kind, _, _, interlaced = struct.unpack(">IIBBBBB", data[16:29])
    if depth != 16 or kind not in _CHANNELS:
        raise ValueError(f"a PNG of {depth} bits and colour type {kind} is not one of 16 bits")
    try:
        raw = np.frombuffer(zlib.decompress(_image_data(data)), dtype=np.uint8)
    except (zlib.error, struct.error) as error:
        raise ValueError(f"the PNG's image data are damaged ({error})") from error
    pixel_bytes = 2 * _CHANNELS[kind]
    pixels = np.zeros((height, width, pixel_bytes), dtype=np.uint8)
    at = 0
    for y, x, step_y, step_x in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = pixels[y::step_y, x::step_x]
        if not part.size:
            continue
        size = part.shape[0] * (1 + part.shape[1] * pixel_bytes)
        if at + size > raw.size:
            raise ValueError(f"the PNG's image data end after {raw.size} bytes")
        rows = raw[at : at + size].reshape(part.shape[0], -1)
        part[:] = _unfilter(rows[:, 0], rows[:, 1:].reshape(part.shape))
        at += size
    return pixels.view(">u2").astype(np.uint16)


def _image_data(data: bytes) -> bytes:
    parts, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(parts)


def _unfilter(
    filters: UInt8[np.ndarray, " h"], coded: UInt8[np.ndarray, "h w c"]
) -> UInt8[np.ndarray, "h w c"]:
    """Undo the five PNG filters, all rows of an antidiagonal at a time.

    A pixel needs its left, upper and upper left neighbours, which lie on earlier antidiagonals.

    Source: PNG specification, third edition, section 9.
    """
    height, width, _ = coded.shape
    # One row above and one column to the left, both zero, as the specification has it.
    out = np.zeros((height + 1, width + 1, coded.shape[2]), dtype=np.int16)
    kinds = filters[:, None].astype(np.int16)
    for diagonal in range(height + width - 1):
        y = np.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        left, up, corner = out[y + 1, x], out[y, x + 1], out[y, x]
        guess = np.select(
            [kinds[y] == kind for kind in range(5)],
            [np.zeros_like(left), left, up, (left + up) // 2, _paeth(left, up, corner)],
        )
        out[y + 1, x + 1] = (coded[y, x] + guess) & 255
    return out[1:, 1:].astype(np.uint8)


def _paeth(
    left: np.ndarray,
    up: np.ndarray,
    corner: np.ndarray,  # [k, c] each
) -> np.ndarray:
    estimate = left + up - corner
    to_left, to_up, to_corner = (np.abs(estimate - one) for one in (left, up, corner))
    nearest = np.where(to_up <= to_corner, up, corner)
    return np.where((to_left <= to_up) & (to_left <= to_corner), left, nearest)
