"""Image size from a file's header, without decoding: which files DALI can surely read.

Deliberately narrower than the decoders: a file this module is not sure about is only decoded the
slower way (`pipeline.frames`), while one that it wrongly took for sound could end the process.
"""

import struct

from pipeline.bmp import read_bmp_header
from shards.png import find_png_damage

_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG markers of a frame header; the three left out are tables, an extension and arithmetic."""
_BITS_OF_BMP = (1, 4, 8, 24, 32)
_BITS_OF_PNG = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}


def header_size(data: memoryview) -> tuple[int, int] | None:
    """Height and width as stored, before any orientation; None if the header is not plain."""
    try:
        if bytes(data[:3]) == b"\xff\xd8\xff":
            return _jpeg(data)
        if bytes(data[:8]) == b"\x89PNG\r\n\x1a\n":
            return _png(data)
        if bytes(data[:2]) == b"BM":
            return _bmp(data)
        if bytes(data[:4]) == b"RIFF" and bytes(data[8:12]) == b"WEBP":
            return _webp(data)
    except (IndexError, struct.error):
        return None
    return None


def is_jpeg_without_exif(data: memoryview) -> bool:
    """Whether this is a JPEG that nothing can turn: no EXIF block before its first scan."""
    at = 2
    if bytes(data[:3]) != b"\xff\xd8\xff":
        return False
    while at + 10 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xE1 and bytes(data[at + 4 : at + 8]) == b"Exif":
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return True


def _jpeg(data: memoryview) -> tuple[int, int] | None:
    at, size = 2, None
    while data[at] == 0xFF:
        marker = data[at + 1]
        (length,) = struct.unpack_from(">H", data, at + 2)
        if length < 2 or at + 2 + length > len(data):
            return None
        if marker in _FRAMES:
            if size is not None or data[at + 4] != 8 or length != 8 + 3 * data[at + 9]:
                return None
            size = struct.unpack_from(">HH", data, at + 5)
        elif marker == 0xDA:
            return size
        elif marker < 0xC0 or 0xD0 <= marker < 0xDA:
            return None
        at += 2 + length
    return None


def _png(data: memoryview) -> tuple[int, int] | None:
    width, height, depth, kind, packing, filters, interlaced = struct.unpack_from(
        ">IIBBBBB", data, 16
    )
    if bytes(data[8:16]) != b"\0\0\0\x0dIHDR" or depth not in _BITS_OF_PNG.get(kind, ()):
        return None
    if packing or filters or interlaced > 1 or find_png_damage(data, checksums=False):
        return None
    return height, width


def _bmp(data: memoryview) -> tuple[int, int] | None:
    header = read_bmp_header(data)
    if header is None or header.planes != 1 or header.bits not in _BITS_OF_BMP:
        return None
    if header.compression or header.width < 1 or header.pixels_at < 14 + header.header_bytes:
        return None
    if header.pixels_at + header.row_bytes * header.height > len(data):
        return None
    return header.height, header.width


def _webp(data: memoryview) -> tuple[int, int] | None:
    # The extended container (VP8X: EXIF, animation) is left out: nvImageCodec 0.9 stops at its
    # metadata.
    (size,) = struct.unpack_from("<I", data, 16)
    if 20 + size > len(data):
        return None
    if bytes(data[12:16]) == b"VP8 " and bytes(data[23:26]) == b"\x9d\x01\x2a":
        width, height = struct.unpack_from("<HH", data, 26)
        return height & 0x3FFF, width & 0x3FFF
    if bytes(data[12:16]) == b"VP8L" and data[20] == 0x2F:
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed >> 14 & 0x3FFF) + 1, (packed & 0x3FFF) + 1
    return None
