"""Which images the GPU decoder takes, seen from their headers.

DALI's `mixed` decoder hands JPEGs to nvJPEG and everything else to the CPU decoders that its `cpu`
one uses as well. What neither is known to do by this project's rule (pipeline/decode.py) is decoded
by Pillow before and passes through DALI as PPM: the pixels are those of the CPU recipes.

Sources: nvImageCodec, extensions/nvjpeg/cuda_decoder.cpp (`canDecodeImpl`: encodings, sampling,
8 bits); documentation of `fn.decoders.image` (DALI 2.4), note on formats.
"""

import struct
from typing import Literal

GPU_CODECS = frozenset({"jpg"})
"""Codecs of the sample table of which some image may be decoded on the GPU."""
Road = Literal["gpu", "dali", "pillow"]
"""`gpu`: nvJPEG. `dali`: a CPU decoder inside DALI. `pillow`: decoded before DALI sees it."""

_ENCODINGS = (0xC0, 0xC1, 0xC2)
"""Baseline, extended sequential, progressive; all with Huffman codes."""
_OTHER_FRAMES = frozenset(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SAMPLING = {
    (1, 1): "4:4:4",
    (2, 1): "4:2:2",
    (2, 2): "4:2:0",
    (1, 2): "4:4:0",
    (4, 1): "4:1:1",
    (4, 2): "4:1:0",
}
"""Horizontal and vertical factor of luma where both chroma planes have (1, 1)."""


def decode_road(data: memoryview) -> Road:
    """How an image whose header is plain (`image_headers.header_size`) is decoded for a GPU."""
    if bytes(data[:2]) == b"\xff\xd8":
        # One that is cut off, nvJPEG may fill up without a word; Pillow stops.
        whole = bytes(data[-2:]) == b"\xff\xd9"
        return "gpu" if whole and _nvjpeg_takes(data) else "pillow"
    if bytes(data[:8]) == b"\x89PNG\r\n\x1a\n" and data[24] == 16:
        # Rounded to 8 bits on the CPU; what the conversion on the GPU does is not known.
        return "pillow"
    return "dali"


def _nvjpeg_takes(data: memoryview) -> bool:
    at, frame, adobe = 2, None, None
    try:
        while data[at] == 0xFF and data[at + 1] != 0xDA:
            marker, (length,) = data[at + 1], struct.unpack_from(">H", data, at + 2)
            if marker in _OTHER_FRAMES:
                return False
            if marker in _ENCODINGS:
                frame = bytes(data[at + 4 : at + 2 + length])
            if marker == 0xEE and bytes(data[at + 4 : at + 9]) == b"Adobe":
                adobe = data[at + 15]
            at += 2 + length
    except (IndexError, struct.error):
        return False
    return frame is not None and _plain_colours(frame, adobe)


def _plain_colours(frame: bytes, adobe: int | None) -> bool:
    """Grey or YCbCr of 8 bits, sampled in a way that nvJPEG knows.

    CMYK and JPEGs that store RGB itself are left out: what the GPU makes of them is not this
    project's rule as far as is known.
    """
    if len(frame) < 6 or frame[0] != 8 or len(frame) != 6 + 3 * frame[5]:
        return False
    components = [(frame[at], frame[at + 1]) for at in range(6, len(frame), 3)]
    if len(components) == 1:
        return True
    if len(components) != 3 or adobe == 0 or bytes(name for name, _ in components) == b"RGB":
        return False
    luma, *chroma = [(factors >> 4, factors & 15) for _, factors in components]
    return luma in _SAMPLING and chroma == [(1, 1), (1, 1)]
