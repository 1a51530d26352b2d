"""PNGs of 16 bits: every filter, layout and damage, and what they may cost."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pipeline.decode import decode_rgb
from pipeline.errors import PipelineError
from pipeline.png16 import decode_png16, round_16_bits

GRIDS = {False: ["0011"], True: ["0088", "0488", "4084", "0244", "2042", "0122", "1021"]}


def chunk(tag: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))


def png(
    width: int, height: int, channels: int, stream: bytes, *, interlaced: bool = False
) -> bytes:
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, interlaced))
    # Encoders cut the stream anywhere.
    parts = b"".join(chunk(b"IDAT", stream[at : at + 999]) for at in range(0, len(stream), 999))
    return b"\x89PNG\r\n\x1a\n" + head + parts + chunk(b"IEND", b"")


def paeth(left: int, up: int, corner: int) -> int:
    near = [abs(left + up - corner - one) for one in (left, up, corner)]
    return (left, up, corner)[near.index(min(near))]


def filtered(rows: np.ndarray, kinds: list[int], step: int) -> bytes:
    """Rows of bytes as PNG stores them, the k-th by filter `kinds[k]`."""
    out, before = b"", np.zeros(rows.shape[1], int)
    for row, kind in zip(rows.astype(int), kinds, strict=False):
        left = np.concatenate([np.zeros(step, int), row[:-step]]) if row.size else row
        corner = np.concatenate([np.zeros(step, int), before[:-step]]) if row.size else row
        guess = [
            np.zeros_like(row),
            left,
            before,
            (left + before) // 2,
            np.array([paeth(*each) for each in zip(left, before, corner, strict=True)], int),
        ][kind]
        out += bytes([kind]) + ((row - guess) % 256).astype(np.uint8).tobytes()
        before = row
    return out


@given(
    pixels=arrays.arrays(
        np.uint16, st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4))
    ),
    kinds=st.lists(st.integers(0, 4), min_size=12, max_size=12),
    interlaced=st.booleans(),
)
def test_every_filter_and_layout_is_read_and_rounded(pixels, kinds, interlaced: bool) -> None:
    height, width, channels = pixels.shape
    stored = b""
    for y, x, down, right in (map(int, grid) for grid in GRIDS[interlaced]):
        part = np.ascontiguousarray(pixels[y::down, x::right]).astype(">u2")
        if part.size:
            stored += filtered(part.view(np.uint8).reshape(part.shape[0], -1), kinds, 2 * channels)
    data = png(width, height, channels, zlib.compress(stored), interlaced=interlaced)
    colours = pixels[..., :3] if channels > 2 else pixels[..., :1].repeat(3, axis=2)
    expected = (colours.astype(int) + 128) // 257
    np.testing.assert_array_equal(decode_png16(data), expected)
    np.testing.assert_array_equal(decode_rgb(data), expected)


def test_all_65536_numbers_are_rounded_as_division_rounds_them() -> None:
    wide = np.arange(65536)
    upper, lower = (wide >> 8).astype(np.uint8), (wide & 255).astype(np.uint8)
    np.testing.assert_array_equal(round_16_bits(upper, lower), np.round(wide / 257))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "damage", ["no data", "short data", "no end of stream", "filter", "stream"]
)
def test_damage_is_an_error(channels: int, damage: str) -> None:
    rows = (b"\0" + bytes(20 * 2 * channels)) * 20
    stream = {
        "no data": b"",
        "short data": zlib.compress(rows[: len(rows) // 2]),
        "no end of stream": zlib.compress(np.random.default_rng(0).bytes(len(rows)))[:400],
        "filter": zlib.compress(b"\x09" + rows[1:]),
        "stream": b"\x78\x9c" + b"\xff" * 50,
    }[damage]
    with pytest.raises(PipelineError, match="not a readable image"):
        decode_rgb(png(20, 20, channels, stream))


MEASURE = """
import resource, sys
from pathlib import Path
from pipeline.png16 import decode_png16
data = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shape = decode_png16(data).shape
print(*shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def measured(path: Path) -> list[int]:
    """Shape of an image, and the megabytes that decoding it took."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        check=True,
        text=True,
    )
    return [int(number) for number in done.stdout.split()]


def zeros(size: int) -> bytes:
    """A zlib stream of zeros; after a full flush a block may be repeated as it is."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = packer.compress(bytes(size % (1 << 24))) + packer.flush()
    checksum = (size % 65521 << 16 | 1).to_bytes(4, "big")
    return b"\x78\xda" + block * (size >> 24) + end + checksum


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_no_more_is_decompressed_than_the_header_promises(tmp_path: Path, channels: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(1, 1, channels, zeros(1 << 30)))
    height, width, _, megabytes = measured(tmp_path / "bomb.png")
    assert (height, width) == (1, 1)
    assert megabytes < 100


@pytest.mark.parametrize(("channels", "most"), [(1, 9), (4, 9)])
def test_sixteen_bits_are_narrowed_in_strips(tmp_path: Path, channels: int, most: int) -> None:
    """16 megapixels; a copy in wide numbers took 32 bytes a pixel and channel."""
    (tmp_path / "large.png").write_bytes(
        png(4000, 4000, channels, zeros(4000 * (1 + 4000 * 2 * channels)))
    )
    height, width, _, megabytes = measured(tmp_path / "large.png")
    assert (height, width) == (4000, 4000)
    assert megabytes < most * 16 + 40


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_250_megapixels_of_16_bit_rgba_take_two_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "large.png").write_bytes(png(15800, 15800, 4, zeros(15800 * (1 + 15800 * 8))))
    height, width, _, megabytes = measured(tmp_path / "large.png")
    assert (height, width) == (15800, 15800)
    assert megabytes < 2048
