"""What a file is by its first bytes, whatever it is called, and what helps if it is not readable.

Only named, never decoded: the decoders of `shards.image_formats` are the ones of this project.
"""

from dataclasses import dataclass
from typing import Final

HEAD_BYTES: Final = 4096
"""So many first bytes are enough to tell."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file."""

    name: str
    """With its article: `a HEIC image`."""
    way_out: str
    """What helps, with the command where there is one."""
    is_picture: bool = True
    """Whether it is a still image of some kind."""
    is_packed: bool = False
    """Whether a shard set holds it."""


_PILLOW = "convert it: `python -c \"from PIL import Image as I; I.open('IN').save('OUT.png')\"`"


def _picture(name: str, way_out: str) -> Kind:
    return Kind(name=name, way_out=way_out)


def _other(name: str, way_out: str) -> Kind:
    return Kind(name=name, way_out=way_out, is_picture=False)


_JPEG, _PNG, _BMP, _WEBP = (
    Kind(name=name, way_out="it is read as it is", is_packed=True)
    for name in ("a JPEG image", "a PNG image", "a BMP image", "a WebP image")
)
_GIF, TIFF, _PNM = (_picture(f"a {name} image", _PILLOW) for name in ("GIF", "TIFF", "PNM"))
AVIF = _picture("an AVIF image", _PILLOW)
HEIC = _picture(
    "a HEIC image",
    "scoring reads it after `pip install 'lmcl[heif]'`; to pack it, convert it: "
    "`heif-convert -q 100 IN OUT.png`",
)
_JXL = _picture("a JPEG XL image", "convert it: `djxl IN OUT.png`")
_JP2 = _picture("a JPEG 2000 image", "convert it: `opj_decompress -i IN -o OUT.png`")
RAW = _picture(
    "a camera's raw file", "develop it: `darktable-cli IN OUT.png`, or take the camera's JPEG"
)
_SVG = _picture("an SVG drawing", "draw it: `rsvg-convert -o OUT.png IN`")
_MAGICK = "convert it: `magick IN OUT.png`"
_PSD, _EXR, _HDR, _ICO = (
    _picture(name, _MAGICK)
    for name in ("a Photoshop document", "an OpenEXR image", "a Radiance image", "an icon file")
)
_VIDEO = _other("a video", "take one frame: `ffmpeg -i IN -frames:v 1 OUT.png`")
_SOUND = _other("a sound file", "it holds no image; leave it out with `--exclude`")
_HTML = _other(
    "a web page (HTML), not what its name says",
    "the download failed, as a login or error page was saved; download it again",
)
_POINTER = _other("a Git LFS pointer", "fetch the file itself: `git lfs pull`")
_XML, _JSON, _TEXT = (
    _other(name, "it holds no image; leave it out with `--exclude`")
    for name in ("an XML file", "a JSON file", "a text file")
)
_PDF = _other("a PDF document", "draw a page: `pdftoppm -r 150 -png IN OUT`")
_PACKED = _other("a compressed archive", "unpack it")

_STARTS: Final = (
    (b"\xff\xd8\xff", _JPEG),
    (b"\x89PNG\r\n\x1a\n", _PNG),
    (b"BM", _BMP),
    (b"GIF87a", _GIF),
    (b"GIF89a", _GIF),
    (b"II*\0", TIFF),
    (b"MM\0*", TIFF),
    (b"II+\0", TIFF),
    (b"MM\0+", TIFF),
    (b"IIRO", RAW),
    (b"IIRS", RAW),
    (b"MMOR", RAW),
    (b"IIU\0", RAW),
    (b"FUJIFILMCCD-RAW", RAW),
    (b"\0MRM", RAW),
    (b"FOVb", RAW),
    (b"\xff\x0a", _JXL),
    (b"\0\0\0\x0cJXL \r\n\x87\n", _JXL),
    (b"\0\0\0\x0cjP  ", _JP2),
    (b"\xff\x4f\xff\x51", _JP2),
    (b"8BPS", _PSD),
    (b"v/1\x01", _EXR),
    (b"#?RADIANCE", _HDR),
    (b"\0\0\1\0", _ICO),
    (b"\x1aE\xdf\xa3", _VIDEO),
    (b"\0\0\1\xba", _VIDEO),
    (b"\0\0\1\xb3", _VIDEO),
    (b"OggS", _SOUND),
    (b"ID3", _SOUND),
    (b"fLaC", _SOUND),
    (b"%PDF-", _PDF),
    (b"PK\3\4", _PACKED),
    (b"\x1f\x8b", _PACKED),
    (b"7z\xbc\xaf\x27\x1c", _PACKED),
    (b"Rar!", _PACKED),
    (b"\x28\xb5\x2f\xfd", _PACKED),
    (b"version https://git-lfs.github.com", _POINTER),
)
_BRANDS: Final = {
    **dict.fromkeys((b"avif", b"avis"), AVIF),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"), HEIC),
    b"crx ": RAW,
}
_RIFF: Final = {b"WEBP": _WEBP, b"AVI ": _VIDEO, b"WAVE": _SOUND}


def kind_of(head: bytes | memoryview) -> Kind | None:
    """The kind of a file, by its first bytes; None if it is none of those that are known."""
    begin = bytes(head[:HEAD_BYTES])
    if begin[4:8] == b"ftyp":
        return _of_brands(begin)
    if begin[:4] == b"RIFF":
        return _RIFF.get(begin[8:12])
    if begin[:1] == b"P" and begin[1:2] in b"123456" and begin[2:3].isspace():
        return _PNM
    if begin.startswith((b"II*\0", b"MM\0*")) and begin[8:10] == b"CR":
        return RAW
    for start, kind in _STARTS:
        if begin.startswith(start):
            return kind
    return _of_text(begin)


def _of_brands(begin: bytes) -> Kind:
    """Files of the ISO container: the major brand, then the compatible ones, decide."""
    size = min(int.from_bytes(begin[:4], "big"), len(begin))
    brands = [begin[8:12], *(begin[at : at + 4] for at in range(16, size, 4))]
    for brand in (b"avif", b"avis"):
        # An AVIF's major brand may be the general one.
        if brand in brands:
            return AVIF
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), _VIDEO)


def _of_text(begin: bytes) -> Kind | None:
    if b"\0" in begin[:512]:
        return None
    text = begin.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return _HTML
    if b"<svg" in text and text.startswith((b"<svg", b"<?xml", b"<!--", b"<!doctype svg")):
        return _SVG
    if text.startswith(b"<?xml") or text.startswith(b"<x:xmpmeta"):
        return _XML
    if text.startswith((b"{", b"[")):
        return _JSON
    try:
        shown = begin.decode("utf-8", "strict" if len(begin) < HEAD_BYTES else "ignore")
    except UnicodeDecodeError:
        return None
    printing = sum(letter.isprintable() or letter.isspace() for letter in shown)
    return _TEXT if shown and printing == len(shown) else None
