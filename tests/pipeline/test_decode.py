"""The decode rule, and that DALI's decoder follows it bit for bit."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.backends.row_decoder import RowDecoder
from pipeline.decode import decode_rgb, reflect_pad, resize_rgb
from pipeline.errors import PipelineError

_RNG = np.random.default_rng(0)
_WIDE = _RNG.integers(0, 65536, (41, 53, 4)).astype(np.uint16)


def _png16(pixels: np.ndarray, *, interlaced: bool = False) -> bytes:
    """A PNG of 16 bits per channel; Pillow cannot write colour ones."""
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[pixels.shape[2]]
    grids = ["0088", "0488", "4084", "0244", "2042", "0122", "1021"] if interlaced else ["0011"]
    passes = [pixels[y::down, x::right] for y, x, down, right in (map(int, one) for one in grids)]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for part in passes for row in part)

    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    size = (pixels.shape[1], pixels.shape[0])
    head = struct.pack(">IIBBBBB", *size, 16, kind, 0, 0, interlaced)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return _jpeg(image, exif=exif)


CASES: dict[str, Callable[[Image.Image, Callable[..., bytes]], bytes]] = {
    "jpeg-420": lambda image, encode: _jpeg(image, quality=90),
    "jpeg-422": lambda image, encode: _jpeg(image, quality=90, subsampling=1),
    "jpeg-444": lambda image, encode: _jpeg(image, quality=95, subsampling=0),
    "jpeg-411": lambda image, encode: _jpeg(image, quality=90, subsampling="4:1:1"),
    "jpeg-restarts": lambda image, encode: _jpeg(image, quality=90, restart_marker_blocks=3),
    "jpeg-progressive": lambda image, encode: _jpeg(image, progressive=True),
    "jpeg-grey": lambda image, encode: _jpeg(image.convert("L")),
    "jpeg-cmyk": lambda image, encode: _jpeg(image.convert("CMYK")),
    **{
        f"jpeg-exif-{turn}": lambda image, encode, turn=turn: _turned(image, turn)
        for turn in range(1, 9)
    },
    "png": lambda image, encode: encode(image, "PNG"),
    "png-grey": lambda image, encode: encode(image.convert("L"), "PNG"),
    "png-grey-alpha": lambda image, encode: encode(image.convert("LA"), "PNG"),
    "png-palette": lambda image, encode: encode(image.quantize(40), "PNG"),
    "png-palette-clear": lambda image, encode: encode(image.quantize(40), "PNG", transparency=3),
    "png-1bit": lambda image, encode: encode(image.convert("1"), "PNG"),
    "png-16bit-grey": lambda image, encode: _png16(_WIDE[..., :1]),
    "png-16bit-grey-alpha": lambda image, encode: _png16(_WIDE[..., :2]),
    "png-16bit-rgb": lambda image, encode: _png16(_WIDE[..., :3]),
    "png-16bit-rgba": lambda image, encode: _png16(_WIDE),
    "png-16bit-interlaced": lambda image, encode: _png16(_WIDE[..., :3], interlaced=True),
    "bmp": lambda image, encode: encode(image, "BMP"),
    "bmp-grey": lambda image, encode: encode(image.convert("L"), "BMP"),
    "bmp-palette": lambda image, encode: encode(image.quantize(40), "BMP"),
    "webp": lambda image, encode: encode(image, "WEBP", quality=80),
    "webp-lossless": lambda image, encode: encode(image, "WEBP", lossless=True),
}


def _decode_with_dali(data: bytes) -> np.ndarray:
    dali = pytest.importorskip("nvidia.dali")
    pipe = dali.Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded = dali.fn.external_source(
            source=lambda: [np.frombuffer(data, np.uint8)], dtype=dali.types.UINT8, ndim=1
        )
        pipe.set_outputs(dali.fn.decoders.image(encoded))
    return np.array(pipe.run()[0].at(0))


@pytest.mark.parametrize("case", CASES)
def test_dali_decodes_by_the_same_rule(
    case: str, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    data = CASES[case](photograph(97, 131), encode)
    ours, theirs = decode_rgb(data), _decode_with_dali(data)
    assert ours.shape == theirs.shape
    assert np.abs(ours.astype(int) - theirs).max() == 0


def _bands(height: int) -> list[tuple[int, int]]:
    """Every first row, and numbers of rows around the sizes that codecs work in."""
    wanted = (1, 7, 8, 16, 17, 40, height)
    return [(top, min(rows, height - top)) for top in range(height) for rows in wanted]


@pytest.mark.parametrize("case", CASES)
def test_rows_of_an_image_are_those_of_the_whole(
    case: str, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    dali = pytest.importorskip("nvidia.dali")
    data = CASES[case](photograph(97, 131), encode)
    whole = decode_rgb(data)
    bands = _bands(whole.shape[0])
    starts = np.array([(top, 0) for top, _ in bands], np.int32)
    extents = np.array([(rows, whole.shape[1]) for _, rows in bands], np.int32)
    pipe = dali.Pipeline(len(bands), num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipe:
        encoded, start, extent = dali.fn.external_source(
            source=lambda: ([np.frombuffer(data, np.uint8)] * len(bands), starts, extents),
            num_outputs=3,
            dtype=[dali.types.UINT8, dali.types.INT32, dali.types.INT32],
            ndim=[1, 1, 1],
        )
        part = dali.fn.decoders.image_slice(
            encoded,
            start,
            extent,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
        )
        pipe.set_outputs(part, dali.fn.peek_image_shape(encoded))
    parts, shapes = pipe.run()
    assert (np.asarray(shapes.as_tensor()) == whole.shape).all()
    wrong = [
        (top, rows)
        for index, (top, rows) in enumerate(bands)
        if not np.array_equal(parts.at(index), whole[top : top + rows])
    ]
    assert not wrong


@pytest.mark.parametrize("case", CASES)
def test_the_row_decoder_gives_the_rows_of_the_whole(
    case: str, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    pytest.importorskip("nvidia.nvimgcodec")
    data = np.frombuffer(CASES[case](photograph(97, 131), encode), dtype=np.uint8)
    whole, decoder = decode_rgb(data.tobytes()), RowDecoder()
    height, width = whole.shape[:2]
    for top, count in _bands(height):
        rows = decoder.decode_rows(data, size=(height, width), top=top, bottom=top + count)
        assert np.array_equal(rows, whole[top : top + count]), (top, count)
    # On its side, taller and wider: no row of an image of another size is ever given out.
    for wrong in ((width, height), (height + 1, width), (height, width - 1)):
        assert decoder.decode_rows(data, size=wrong, top=0, bottom=9) is None


def test_all_filters_of_a_16_bit_png_are_undone(
    photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    # Four channels of 8 bits are filtered like two of 16: the same file but for its header.
    image = photograph(97, 131)
    image.putalpha(photograph(97, 131, seed=1).convert("L"))
    data = bytearray(encode(image, "PNG"))
    assert len(set(zlib.decompress(_only_idat(bytes(data)))[:: 131 * 4 + 1])) >= 3
    data[24:26] = bytes([16, 4])
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert np.array_equal(decode_rgb(bytes(data)), _decode_with_dali(bytes(data)))
    pair = np.asarray(image).reshape(97, 131, 2, 2)[:, :, 0].astype(int)
    assert np.array_equal(decode_rgb(bytes(data))[..., 0], (pair @ [256, 1] + 128) // 257)


def _only_idat(data: bytes) -> bytes:
    parts, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            parts.append(data[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(parts)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_are_rounded_not_clipped(channels: int) -> None:
    pixels = decode_rgb(_png16(_WIDE[..., :channels]))
    exact = _WIDE[..., :channels] / 257
    exact = exact[..., :3] if channels >= 3 else exact[..., :1].repeat(3, axis=2)
    assert np.abs(pixels - exact).max() <= 0.5


def test_alpha_is_dropped_and_not_blended(
    photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    image = photograph(40, 50)
    clear = image.copy()
    clear.putalpha(0)
    assert np.array_equal(decode_rgb(encode(clear, "PNG")), np.asarray(image))


def test_exif_orientation_is_applied(photograph: Callable[..., Image.Image]) -> None:
    data = _turned(photograph(97, 131), 6)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert decode_rgb(data).shape == (131, 97, 3)
    assert np.array_equal(decode_rgb(data), np.asarray(upright))


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"<html>404</html>",
        lambda data: data[: len(data) // 2],
        lambda data: data[:200],
    ],
    ids=["empty", "html", "half", "header"],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_a_damaged_image_is_an_error(
    kind: str,
    damage: Callable[[bytes], bytes],
    photograph: Callable[..., Image.Image],
    encode: Callable[..., bytes],
) -> None:
    with pytest.raises(PipelineError, match="not a readable image"):
        decode_rgb(damage(encode(photograph(64, 64), kind)))


def test_a_png_with_a_bad_checksum_is_an_error_and_no_crash() -> None:
    data = bytearray(_png16(_WIDE[..., :3]))
    data[200] ^= 255
    with pytest.raises(PipelineError, match="not a readable image"):
        decode_rgb(bytes(data))


def _reworked(png: bytes, change: Callable[[bytes, bytes], bytes]) -> bytes:
    """A PNG whose chunks went through `change(kind, whole chunk)`."""
    out, at = png[:8], 8
    while at < len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        out += change(png[at + 4 : at + 8], png[at:end])
        at = end
    return out


def _spoil(chunk: bytes) -> bytes:
    return chunk[:-1] + bytes([chunk[-1] ^ 1])


_UNKNOWN = b"\0\0\0\0ABCD" + struct.pack(">I", zlib.crc32(b"ABCD"))
PNG_DAMAGE = {
    "checksum": lambda kind, chunk: _spoil(chunk) if kind == b"IDAT" else chunk,
    "no-end": lambda kind, chunk: b"" if kind == b"IEND" else chunk,
    "half-an-end": lambda kind, chunk: chunk[:-2] if kind == b"IEND" else chunk,
    "unknown": lambda kind, chunk: _UNKNOWN + chunk if kind == b"IDAT" else chunk,
}
PNG_ODDITIES = {
    "checksum-of-the-end": lambda kind, chunk: _spoil(chunk) if kind == b"IEND" else chunk,
    "bytes-after-the-end": lambda kind, chunk: chunk + b"more" if kind == b"IEND" else chunk,
}


@pytest.mark.parametrize("damage", PNG_DAMAGE)
def test_a_png_that_dali_cannot_decode_is_an_error_of_pillow_s_rule_too(
    damage: str, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    data = _reworked(encode(photograph(64, 64), "PNG"), PNG_DAMAGE[damage])
    with pytest.raises(PipelineError, match=r"not a readable image.*(chunk|IEND)"):
        decode_rgb(data)
    with pytest.raises(RuntimeError, match=r"ecod|nvImageCodec"):
        _decode_with_dali(data)


@pytest.mark.parametrize("oddity", PNG_ODDITIES)
def test_what_is_odd_about_a_png_and_hurts_neither_decoder_is_let_be(
    oddity: str, photograph: Callable[..., Image.Image], encode: Callable[..., bytes]
) -> None:
    data = _reworked(encode(photograph(64, 64), "PNG"), PNG_ODDITIES[oddity])
    assert np.array_equal(decode_rgb(data), _decode_with_dali(data))


def test_padding_mirrors_without_repeating_the_edge() -> None:
    row = np.arange(4, dtype=np.uint8)
    image = np.broadcast_to(row[None, :, None], (9, 4, 3)).copy()
    padded = reflect_pad(image, 9)
    assert padded[0, :, 0].tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2]
    assert np.array_equal(padded[:9, :4], image)


def test_an_image_of_one_pixel_fills_the_crop() -> None:
    assert (reflect_pad(np.full((1, 1, 3), 7, np.uint8), 5) == 7).all()


def test_resizing_averages_what_it_shrinks() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    image = np.repeat(checks.astype(np.uint8)[..., None], 3, axis=2)
    small = resize_rgb(image, 8, 8)[1:-1, 1:-1]
    assert np.abs(small.astype(int) - 127.5).max() <= 1
