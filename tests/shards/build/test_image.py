import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from shards.build.image import bmp_to_png, inspect, refuse_by_header
from shards.cli import cli
from shards.errors import ShardError
from shards.verify import verify


def encode(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("RGB", "JPEG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGB", "PNG"),
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("I;16", "PNG"),
        ("RGB", "BMP"),
        ("L", "BMP"),
        ("RGB", "WEBP"),
    ],
)
def test_pixel_formats_of_the_rule_are_accepted(mode: str, format: str) -> None:
    data = encode(Image.new(mode, (7, 5)), format)
    info = inspect(data, where="x")
    expected = {"JPEG": "jpg"}.get(format, format.lower())
    assert (info.codec, info.width, info.height) == (expected, 7, 5)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_width_and_height_are_those_of_the_upright_image(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.new("RGB", (20, 10)), format, exif=exif)
    info = inspect(data, where="x")
    assert (info.width, info.height) == ((10, 20) if orientation >= 5 else (20, 10))


@pytest.mark.parametrize("codec", ["jpg", "png", "bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_truncated_image_is_refused_by_name(
    picture: Callable[..., bytes], codec: str, kept: float
) -> None:
    data = picture(codec=codec, height=64, width=64)
    with pytest.raises(ShardError, match="here: cannot be decoded"):
        inspect(data[: int(len(data) * kept)], where="here")


def test_a_png_whose_image_data_fail_their_checksum_is_refused_though_pillow_decodes_it(
    picture: Callable[..., bytes],
) -> None:
    data = bytearray(picture(codec="png", height=64, width=64))
    # The last chunk takes 12 bytes; before it stands the checksum of the image data.
    data[-13] ^= 1
    Image.open(io.BytesIO(data)).load()
    with pytest.raises(ShardError, match=r"here: .*checksum of the IDAT chunk at byte") as caught:
        inspect(bytes(data), where="here")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"<html>not found</html>"])
def test_what_is_no_image_is_refused_with_its_first_bytes(data: bytes) -> None:
    with pytest.raises(ShardError, match="not a JPEG, PNG, BMP or WebP image"):
        inspect(data, where="x")


@pytest.mark.parametrize("mode", ["F", "I", "HSV", "YCbCr"])
def test_pixel_formats_outside_the_rule_are_refused_by_name(mode: str) -> None:
    opened = Image.new(mode, (4, 4))
    with pytest.raises(ShardError, match=f"photo: pixel format {mode} is not one"):
        refuse_by_header(opened, "photo", 100)


def test_an_animation_is_refused() -> None:
    frames = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in (0, 255)]
    data = encode(frames[0], "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(ShardError, match="an animation of 2 frames"):
        inspect(data, where="x")


def test_a_decompression_bomb_is_refused_before_decoding() -> None:
    header = struct.pack(">IIBBBBB", 2_000_000, 2_000_000, 8, 2, 0, 0, 0)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )
    with pytest.raises(ShardError, match="claims"):
        inspect(b"\x89PNG\r\n\x1a\n" + body, where="bomb.png")


def test_the_limit_on_pixels_is_a_parameter(picture: Callable[..., bytes]) -> None:
    with pytest.raises(ShardError, match="16 x 12 pixels, more than the 100 allowed"):
        inspect(picture(), where="x", max_pixels=100)


def test_bmp_to_png_keeps_every_pixel(picture: Callable[..., bytes]) -> None:
    data = picture(3, codec="bmp")
    again = Image.open(io.BytesIO(bmp_to_png(data, where="x")))
    assert again.format == "PNG"
    np.testing.assert_array_equal(np.asarray(again), np.asarray(Image.open(io.BytesIO(data))))


def test_damage_that_decoders_repair_is_counted_by_a_build(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG")
    whole = out.getvalue()
    middle = len(whole) * 2 // 3
    (folder / "a.jpg").write_bytes(whole)
    (folder / "b.jpg").write_bytes(whole[:-2])
    (folder / "c.jpg").write_bytes(whole[:middle] + b"\xff\xd9" + whole[middle + 2 :])
    line = ["build", "unlabelled", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    done = CliRunner().invoke(cli, [*line, "--no-progress"])
    assert done.exit_code == 0, done.output
    assert "2 images have a note" in done.output
    assert "note: b.jpg: JPEG without its end marker, every row is there" in done.output
    noted = [json.loads(text) for text in (tmp_path / "out/noted.jsonl").read_text().splitlines()]
    assert [(one["id"], one["path"]) for one in noted] == [(1, "b.jpg"), (2, "c.jpg")]
    assert verify(tmp_path / "out", deep=True).findings == ()


def test_a_build_refuses_sides_below_the_least_one(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in (("a.png", (40, 40)), ("b.png", (200, 39))):
        Image.new("L", size).save(folder / name)
    line = ["build", "unlabelled", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    line += ["--no-progress", "--min-side", "40"]
    refused = CliRunner().invoke(cli, line)
    assert "b.png: 200 x 39 pixels, with a side below the 40" in str(refused.exception)
    done = CliRunner().invoke(cli, [*line, "--on-error", "skip"])
    assert "1 images were left out" in done.output
