import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.gpu_formats import decode_road

Photograph = Callable[..., Image.Image]
Encode = Callable[..., bytes]


def _png16(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width), dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def _with_frame(jpeg: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The same file with its frame header (SOF, from its marker on) changed in place."""
    at = 2
    while jpeg[at + 1] not in (0xC0, 0xC1, 0xC2):
        at += 2 + struct.unpack_from(">H", jpeg, at + 2)[0]
    length = 2 + struct.unpack_from(">H", jpeg, at + 2)[0]
    frame = bytearray(jpeg[at : at + length])
    change(frame)
    return jpeg[:at] + bytes(frame) + jpeg[at + length :]


def _set(place: int, value: int) -> Callable[[bytearray], None]:
    return lambda frame: frame.__setitem__(place, value)


@pytest.mark.parametrize(
    ("mode", "kind", "options", "road"),
    [
        ("RGB", "JPEG", {"subsampling": 0}, "gpu"),
        ("RGB", "JPEG", {"subsampling": 1}, "gpu"),
        ("RGB", "JPEG", {"subsampling": 2}, "gpu"),
        ("RGB", "JPEG", {"progressive": True}, "gpu"),
        ("L", "JPEG", {}, "gpu"),
        ("CMYK", "JPEG", {}, "pillow"),
        ("RGB", "JPEG", {"keep_rgb": True}, "pillow"),
        ("RGB", "PNG", {}, "dali"),
        ("RGBA", "PNG", {}, "dali"),
        ("P", "PNG", {}, "dali"),
        ("RGB", "BMP", {}, "dali"),
        ("RGB", "WEBP", {}, "dali"),
    ],
)
def test_plain_jpegs_are_for_the_gpu_and_all_else_for_the_cpu(
    photograph: Photograph, encode: Encode, mode: str, kind: str,
    options: dict[str, object], road: str,
) -> None:  # fmt: skip
    data = encode(photograph(70, 90).convert(mode), kind, **options)
    assert decode_road(memoryview(data)) == road


def test_sixteen_bits_and_what_is_no_jpeg_that_nvjpeg_knows_go_through_pillow(
    photograph: Photograph, encode: Encode
) -> None:
    jpeg = encode(photograph(70, 90), "JPEG", subsampling=0)
    assert decode_road(memoryview(_png16(70, 90))) == "pillow"
    for name, damaged in {
        "cut": jpeg[:-2],
        "followed": jpeg + b"\0",
        "twelve bits": _with_frame(jpeg, _set(4, 12)),
        "lossless": _with_frame(jpeg, _set(1, 0xC3)),
        "arithmetic": _with_frame(jpeg, _set(1, 0xC9)),
        "odd sampling": _with_frame(jpeg, _set(11, 0x31)),
        "chroma finer than luma": _with_frame(jpeg, _set(14, 0x21)),
    }.items():
        assert decode_road(memoryview(damaged)) == "pillow", name


def test_no_header_however_broken_raises(photograph: Photograph, encode: Encode) -> None:
    jpeg = encode(photograph(20, 30), "JPEG", quality=20)
    rng = np.random.default_rng(0)
    for size in range(2, len(jpeg), 7):
        broken = bytearray(jpeg[:size] + b"\xff\xd9")
        broken[int(rng.integers(2, size + 1))] = int(rng.integers(256))
        assert decode_road(memoryview(bytes(broken))) in ("gpu", "pillow")
