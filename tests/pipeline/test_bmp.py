"""Rows cut from a BMP's bytes are those of the decoded image; what is in doubt is left alone."""

import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from pipeline.bmp import read_bmp_rows
from pipeline.decode import decode_rgb

Encode = Callable[..., bytes]
HEIGHT, WIDTH = 37, 53
_RGB_MASKS = (0xFF0000, 0xFF00, 0xFF)


def _bmp(
    bits: int,
    *,
    header: int = 40,
    top_down: bool = False,
    masks: tuple[int, ...] = (),
    colours: int = 0,
    gap: int = 0,
) -> bytes:
    """A BMP of arbitrary pixels; `masks` make it one of bit fields, `gap` bytes follow them."""
    rng = np.random.default_rng([bits, header, colours])
    row_bytes = (WIDTH * bits + 31) // 32 * 4
    pixels = rng.integers(0, 256, (HEIGHT, row_bytes), dtype=np.uint8)
    if bits == 8 and colours:
        pixels %= colours
    palette = b""
    if bits <= 8:
        palette = rng.integers(0, 256, 4 * (colours or 1 << bits), dtype=np.uint8).tobytes()
    height = -HEIGHT if top_down else HEIGHT
    fields = struct.pack(
        "<iiHHIIiiII", WIDTH, height, 1, bits, 3 if masks else 0, 0, 0, 0, colours, 0
    )
    rest = struct.pack(f"<{len(masks)}I", *masks)
    info = struct.pack("<I", header) + fields + rest.ljust(header - 40, b"\0")
    start = 14 + len(info) + len(palette) + gap
    body = info + palette + bytes(gap) + pixels.tobytes()
    return b"BM" + struct.pack("<IHHI", 14 + len(body), 0, 0, start) + body


PLAIN = {
    "24": _bmp(24),
    "24-top-down": _bmp(24, top_down=True),
    "32": _bmp(32),
    "32-top-down": _bmp(32, top_down=True),
    **{f"24-header-{header}": _bmp(24, header=header) for header in (52, 56, 108, 124)},
    "32-masks": _bmp(32, masks=_RGB_MASKS),
    "32-masks-header-52": _bmp(32, header=52, masks=_RGB_MASKS),
    "32-masks-no-alpha": _bmp(32, header=56, masks=(*_RGB_MASKS, 0)),
    "32-masks-alpha": _bmp(32, header=124, masks=(*_RGB_MASKS, 0xFF000000)),
    "8": _bmp(8),
    "8-top-down": _bmp(8, top_down=True),
    "8-few-colours": _bmp(8, colours=40),
    "4": _bmp(4),
    "1": _bmp(1),
    "gap-before-the-pixels": _bmp(24, gap=12),
}


def _rows(data: bytes, top: int = 5, bottom: int = 31) -> np.ndarray | None:
    array = np.frombuffer(data, dtype=np.uint8)
    return read_bmp_rows(array, size=(HEIGHT, WIDTH), top=top, bottom=bottom)


@pytest.mark.parametrize("kind", PLAIN)
def test_rows_are_those_of_the_decoded_image(kind: str) -> None:
    whole = decode_rgb(PLAIN[kind])
    for top, bottom in ((0, HEIGHT), (0, 1), (5, 31), (HEIGHT - 1, HEIGHT)):
        assert np.array_equal(_rows(PLAIN[kind], top, bottom), whole[top:bottom])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_every_kind_that_pillow_writes_is_cut_from_its_bytes(mode: str, encode: Encode) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise).convert(mode), "BMP")
    assert np.array_equal(_rows(data), decode_rgb(data)[5:31])


def _patched(data: bytes, at: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, at, value)
    return bytes(changed)


_GREY_4 = bytearray(_bmp(4))
_GREY_4[54:118] = np.repeat(np.arange(16, dtype=np.uint8), 4).tobytes()

IN_DOUBT = {
    "empty": b"",
    "only-a-signature": b"BM",
    "half-a-header": _bmp(24)[:30],
    "cut-off": _bmp(24)[:-1],
    "another-format": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "run-lengths": _patched(_bmp(8), 30, "<I", 1),
    "16-bits": _patched(_bmp(24), 28, "<H", 16),
    "another-width": _patched(_bmp(24), 18, "<i", WIDTH - 1),
    "a-huge-width": _patched(_bmp(24), 18, "<i", 2**31 - 1),
    "a-negative-width": _patched(_bmp(24), 18, "<i", -WIDTH),
    "a-huge-height": _patched(_bmp(24), 22, "<i", -(2**31)),
    "two-planes": _patched(_bmp(24), 26, "<H", 2),
    "pixels-in-the-header": _patched(_bmp(24), 10, "<I", 20),
    "pixels-beyond-the-end": _patched(_bmp(24), 10, "<I", 2**32 - 1),
    "an-old-header": _patched(_bmp(24), 14, "<I", 12),
    "other-masks": _bmp(32, masks=(0xFF, 0xFF00, 0xFF0000)),
    "masks-under-the-pixels": _patched(_bmp(32, masks=_RGB_MASKS), 10, "<I", 54),
    "no-palette": _patched(_bmp(8), 10, "<I", 54),
    "an-index-without-a-colour": _patched(_bmp(8, colours=40)[:-4] + b"\xff" * 4, 0, "<H", 0x4D42),
    "more-colours-than-bits-allow": _patched(_bmp(8), 46, "<I", 2**31),
    "4-bits-that-pillow-takes-for-bytes": bytes(_GREY_4),
}


@pytest.mark.parametrize("kind", IN_DOUBT)
def test_a_file_in_doubt_is_left_to_the_decoder(kind: str) -> None:
    assert _rows(IN_DOUBT[kind], 0, HEIGHT) is None
