import io
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.errors import ShardError
from shards.image_formats import (
    PACKED_FORMATS,
    READABLE_FORMATS,
    UNREADABLE,
    count_frames,
    describe_damage,
    open_image,
)


def encoded(format: str, pixels: np.ndarray | None = None, **options) -> bytes:
    if pixels is None:
        pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    out = io.BytesIO()
    if format == "HEIF":
        pytest.importorskip("pillow_heif").from_pillow(Image.fromarray(pixels)).save(out)
        return out.getvalue()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    idat = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 8) + idat + b"\0\0\0\0"


@pytest.mark.parametrize("format", READABLE_FORMATS)
def test_every_format_of_the_list_opens(tmp_path: Path, format: str) -> None:
    data = encoded(format)
    (tmp_path / "x.dat").write_bytes(data)
    for source in (data, memoryview(data), tmp_path / "x.dat", str(tmp_path / "x.dat")):
        with open_image(source) as image:
            assert (image.format, image.size) == (format, (14, 9))
            image.load()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
OTHERS = {format: encoded(format) for format in ("PCX", "TGA", "ICO", "SGI", "JPEG2000", "DDS")}


@pytest.mark.parametrize("kind", ["EPS", "DOS EPS", "WMF", "FITS", *OTHERS])
def test_other_formats_are_refused_and_no_process_is_started(monkeypatch, kind: str) -> None:
    data = {
        "EPS": EPS,
        "DOS EPS": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(80),
        "FITS": b"SIMPLE  =                    T".ljust(2880),
    }.get(kind) or OTHERS[kind]

    def start(*args, **kwargs):
        raise AssertionError(f"started {args}")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr("os.posix_spawn", start)
    monkeypatch.setattr("_posixsubprocess.fork_exec", start)
    with pytest.raises(ShardError, match=r"not a readable image .* none of JPEG, PNG"):
        open_image(data)


def test_a_format_that_is_not_asked_for_is_refused() -> None:
    with pytest.raises(ShardError, match="none of JPEG, PNG, BMP, WEBP"):
        open_image(encoded("GIF"), formats=PACKED_FORMATS)
    with pytest.raises(ShardError, match=r"\['EPS'\] are not among"):
        open_image(EPS, formats=["EPS"])


def _gif_header(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HH", width, height) + encoded("GIF")[10:]


def _webp_header(width: int, height: int) -> bytes:
    sides = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides


def _tile_bomb(side: int) -> bytes:
    """One pixel in a tile of side x side."""
    tags = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
            (322, 4, side), (323, 4, side), (324, 4, 200), (325, 4, 40)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    return head.ljust(200, b"\0") + zlib.compress(bytes(side))


def _scan_bomb(scans: int) -> bytes:
    data = encoded("JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * scans + data[-2:]


BOMBS = {
    "png": (png_header(100_000, 100_000), "100000 x 100000 pixels, more than the 256,000,000"),
    "ppm": (b"P6\n40000 40000\n255\n", "40000 x 40000 pixels, more than"),
    "gif": (_gif_header(65535, 65535), "65535 x 65535 pixels, more than"),
    "webp": (_webp_header(16383, 16383), "16383 x 16383 pixels, more than"),
    "tiff tile": (_tile_bomb(30_000), "1 x 1 pixels in tiles of 30000 x 30000"),
    "jpeg scans": (_scan_bomb(501), r"a JPEG of 5\d\d scans, more than the 500"),
    "empty": (b"", "empty"),
    "damaged": (encoded("PNG")[:20], "not a readable image"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_what_costs_more_than_its_pixels_is_refused_before_it_is_decoded(kind: str) -> None:
    data, message = BOMBS[kind]
    with pytest.raises(ShardError, match=message):
        open_image(data)


def test_a_photograph_of_200_megapixels_opens_without_a_warning() -> None:
    """Pillow's own limit warns from 89 on and refuses above 179."""
    before = Image.MAX_IMAGE_PIXELS
    with open_image(png_header(16320, 12240)) as image:
        assert image.size == (16320, 12240)
    assert before == Image.MAX_IMAGE_PIXELS
    with pytest.raises(ShardError, match="more than the 1,000 allowed"):
        open_image(png_header(40, 30), max_pixels=1000)


def test_a_file_is_named_and_what_is_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x\n.png").write_bytes(b"no picture")
    with pytest.raises(ShardError, match=r"x\\n\.png: not a readable image"):
        open_image(tmp_path / "x\n.png")
    (tmp_path / "link.png").symlink_to("x\n.png")
    with pytest.raises(ShardError, match="not followed"):
        open_image(tmp_path / "link.png", follow_links=False)
    with pytest.raises(ShardError, match="a character device"):
        open_image("/dev/zero")


def test_damage_found_later_is_one_of_the_errors_that_are_named() -> None:
    with open_image(encoded("PNG")[:300]) as image, pytest.raises(UNREADABLE) as caught:
        image.load()
    assert "truncated" in describe_damage(caught.value)
    assert describe_damage(KeyError("x")) == "KeyError: 'x'"
    assert describe_damage(OSError("cannot <_io.BytesIO object at 0x7f>")) == "cannot"


def test_the_pictures_are_those_that_pillow_opens() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded("JPEG", exif=exif)
    with open_image(data) as ours, Image.open(io.BytesIO(data)) as pillows:
        assert ours.getexif()[0x0112] == 6
        same = (
            np.asarray(ImageOps.exif_transpose(ours)),
            np.asarray(ImageOps.exif_transpose(pillows)),
        )
        np.testing.assert_array_equal(*same)


@pytest.mark.timeout(20)
def test_frames_are_counted_no_further_than_needed() -> None:
    pictures = [Image.new("RGB", (14, 9), (k % 250, k // 250, 9)) for k in range(300)]
    data = encoded("GIF", save_all=True, append_images=pictures)
    with open_image(data) as image:
        assert count_frames(image) == 100
        assert image.tell() == 0
    for format in ("GIF", "TIFF", "PNG", "WEBP"):
        with open_image(
            encoded(format, save_all=True, append_images=pictures[100:300:100])
        ) as image:
            assert count_frames(image) == 3
        with open_image(encoded(format)) as image:
            assert count_frames(image) == 1


ROOT = Path(__file__).resolve().parents[2]


def test_nothing_else_opens_images() -> None:
    """A benchmark may, of pictures it has made itself: it measures what others do."""
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for package in ("shards", "pipeline", "kernels", "lmcl")
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.is_relative_to(ROOT / "lmcl" / "bench")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "Image.open(" in line
    ]
    assert found == []
