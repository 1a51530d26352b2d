"""Pixels decide whether a PNG is accepted; what describes them does not."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from pipeline.decode import decode_noted
from shards.build.image import inspect
from shards.png import strip_metadata

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)


def png(**how) -> bytes:
    out = io.BytesIO()
    Image.fromarray(PIXELS).save(out, "PNG", **how)
    return out.getvalue()


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    value = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", value)


def packed(size: int) -> bytes:
    return zlib.compress(np.random.default_rng(1).bytes(size))


CASES = {
    "profile of 2 MB": [chunk(b"iCCP", b"x\0\0" + packed(2 << 20))],
    "profile that is none": [chunk(b"iCCP", b"x\0\0nonsense")],
    "text of 2 MB": [chunk(b"iTXt", b"k\0\0\0\0\0" + b"a" * (2 << 20))],
    "packed text of 2 MB": [chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (2 << 20)))],
    "70 texts": [
        chunk(b"zTXt", b"%d\0\0" % k + zlib.compress(b"a" * 1_000_000)) for k in range(70)
    ],
    "garbage EXIF": [chunk(b"eXIf", b"this is no EXIF at all")],
    "EXIF that ends early": [chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f")],
    "wrong checksum": [chunk(b"gAMA", struct.pack(">I", 45455), checksum=7)],
    "wrong checksum of a text": [chunk(b"tEXt", b"a\0b", checksum=7)],
    "short transparency": [chunk(b"tRNS", b"\0")],
    "bomb as EXIF": [chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(1 << 26)))],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", ["before", "after"])
def test_a_picture_is_accepted_whatever_describes_it(case: str, place: str) -> None:
    whole = png()
    at = 33 if place == "before" else len(whole) - 12
    data = whole[:at] + b"".join(CASES[case]) + whole[at:]
    info = inspect(data, where="x.png")
    assert (info.width, info.height, info.codec, info.notes) == (12, 9, "png", ())
    pixels, notes = decode_noted(data)
    assert np.array_equal(pixels, PIXELS)
    assert notes == ()


def test_how_a_picture_is_turned_stays_known() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(exif=exif)
    with_more = data[:33] + CASES["text of 2 MB"][0] + data[33:]
    for turned in (data, with_more):
        assert np.array_equal(decode_noted(turned)[0], np.rot90(PIXELS, -1))
        assert inspect(turned, where="x").height == 12


def test_what_has_no_metadata_and_what_is_no_png_comes_back_as_it_is() -> None:
    plain = png()
    assert strip_metadata(plain) is plain
    assert strip_metadata(b"GIF89a") == b"GIF89a"
    assert strip_metadata(plain[:40]) == plain[:40]
