import io

import pytest
from PIL import Image

from shards.image_kinds import kind_of


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\xff\xd8\xff\xe0\0\x10JFIF\0", "a JPEG image"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a PNG image"),
        (b"BM\x36\0\0\0", "a BMP image"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", "a WebP image"),
        (b"GIF89a\1\0\1\0", "a GIF image"),
        (b"II*\0\x08\0\0\0", "a TIFF image"),
        (b"II*\0\x10\0\0\0CR\2\0", "a camera's raw file"),
        (b"FUJIFILMCCD-RAW 0201", "a camera's raw file"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom", "a camera's raw file"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC image"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "an AVIF image"),
        (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miaf", "an AVIF image"),
        (b"\0\0\0\x18ftypisom\0\0\2\0isomiso2", "a video"),
        (b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "a video"),
        (b"\x1aE\xdf\xa3\x01\0\0\0", "a video"),
        (b"RIFF\x10\0\0\0AVI LIST", "a video"),
        (b"RIFF\x10\0\0\0WAVEfmt ", "a sound file"),
        (b"\xff\x0a\xfa\x1f", "a JPEG XL image"),
        (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14", "a JPEG XL image"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 image"),
        (b"8BPS\0\1", "a Photoshop document"),
        (b"P6\n3 2\n255\n", "a PNM image"),
        (b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'>", "an SVG drawing"),
        (b"\n <svg width='3'>", "an SVG drawing"),
        (b"<!DOCTYPE html><html><svg>", "a web page (HTML), not what its name says"),
        (b"<html><head><title>Sign in</title>", "a web page (HTML), not what its name says"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PK\3\4\x14\0", "a compressed archive"),
        (b'{"error": "not found"}', "a JSON file"),
        ("größer als".encode(), "a text file"),
    ],
)
def test_files_are_named_for_what_they_are(head: bytes, name: str) -> None:
    kind = kind_of(head)
    assert kind is not None
    assert kind.name == name
    assert kind.way_out


@pytest.mark.parametrize("head", [b"", b"\0" * 64, b"\xfe\xca\xed\xfe\0\1", b"P6x", b"RIFF"])
def test_what_is_not_known_is_nothing(head: bytes) -> None:
    assert kind_of(head) is None or kind_of(head).name == "a text file"


@pytest.mark.parametrize("format", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "AVIF", "PPM"])
def test_what_pillow_writes_is_a_picture(format: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, format)
    kind = kind_of(out.getvalue())
    assert kind is not None
    assert kind.is_picture
    assert kind.is_packed == (format in ("JPEG", "PNG", "BMP", "WEBP"))
