"""The written rule for image bytes: what is accepted, and how large an image is when displayed.

Every image is fully decoded once, at build time. The rule both decoders follow afterwards
(docs/formats.md, decision 0201): EXIF orientation applied, palettes expanded, grey repeated,
alpha dropped, 16 bits scaled to 8, CMYK converted. What the two decoders would not turn into the
same picture is refused here, by name, instead of being trained on in two versions.
"""

import io
from dataclasses import dataclass

from PIL import Image

from shards.build.decode_budget import Decoding, unbounded
from shards.decoder_notes import decoder_notes
from shards.errors import ShardError
from shards.image_formats import (
    PACKED_FORMATS,
    UNREADABLE,
    count_frames,
    describe_damage,
    open_image,
    orientation_of,
)
from shards.image_kinds import kind_of
from shards.limits import MAX_PIXELS
from shards.png import find_png_damage
from shards.text import printable

BMP_TO_PNG_PICTURES = 4
"""Memory of `bmp_to_png` in decoded pictures: both of them, and a copy of each to compare."""

# "MPO" is what Pillow calls a multi-picture JPEG once its JPEG plugin has opened it.
_CODECS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp"}
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "I;16", "I;16B", "I;16L"})
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


@dataclass(frozen=True, kw_only=True)
class ImageInfo:
    """What the loader needs to know about an image without decoding it."""

    codec: str
    """jpg, png, bmp or webp: what the bytes are, whatever the file is called."""
    width: int
    """Pixels, as displayed (EXIF orientation applied)."""
    height: int
    """Pixels, as displayed (EXIF orientation applied)."""
    notes: tuple[str, ...] = ()
    """What its decoder remarked on, though it is accepted (`shards.decoder_notes`)."""


def inspect(
    data: bytes, *, where: str, max_pixels: int = MAX_PIXELS, decoding: Decoding = unbounded
) -> ImageInfo:
    """Decode an image completely and say what it is.

    Args:
        data: The encoded image.
        where: Name for error messages.
        max_pixels: Refuse larger images without decoding them.
        decoding: Asked for the image's pixels before they are decoded (`budget.py`).

    Raises:
        ShardError: If the bytes are no complete image, or one the written rule does not cover.
    """
    if _is_no_image(data):
        raise ShardError(_not_an_image(data, where), exit_code=3)
    try:
        with (
            decoder_notes() as notes,
            open_image(data, formats=PACKED_FORMATS, max_pixels=max_pixels) as image,
        ):
            refuse_by_header(image, where, max_pixels)
            # Pillow would decode over it; the OSError becomes the sentence below.
            if image.format == "PNG" and (damage := find_png_damage(data)):
                raise OSError(damage)
            codec = _CODECS[str(image.format)]
            width, height = image.size
            with decoding(width * height):
                image.load()
                orientation = orientation_of(image)
                # Its pixels are freed while they still count, and count again where the notes
                # decode a damaged JPEG once more.
                image.close()
                noted = notes.all()
    except ShardError as error:
        raise _placed(error, where) from error
    except UNREADABLE as error:
        raise ShardError(
            f"{printable(where)}: cannot be decoded to the end ({describe_damage(error)}); replace "
            "the file, or leave it out with `--on-error skip`",
            exit_code=3,
        ) from error
    if orientation in _SWAPS_SIDES:
        width, height = height, width
    return ImageInfo(codec=codec, width=width, height=height, notes=noted)


def bmp_to_png(data: bytes, *, where: str) -> bytes:
    """The same pixels as a PNG, checked pixel for pixel.

    Raises:
        ShardError: If the PNG would not decode to exactly the pixels of the BMP.
    """
    with open_image(data, formats=["BMP"]) as image:
        image.load()
        out = io.BytesIO()
        image.save(out, format="PNG", compress_level=6)
        with open_image(out.getvalue(), formats=["PNG"]) as again:
            same = again.convert("RGB").tobytes() == image.convert("RGB").tobytes()
    if not same:
        raise ShardError(
            f"{where}: the PNG would not hold the same pixels as the BMP; build without "
            "`--bmp-to-png`",
            exit_code=3,
        )
    return out.getvalue()


def refuse_by_header(image: Image.Image, where: str, max_pixels: int) -> None:
    """Refuse what the written rule does not cover, before a pixel is decoded.

    Raises:
        ShardError: Naming what is not covered.
    """
    place = printable(where)
    width, height = image.size
    if width * height > max_pixels:
        raise ShardError(
            f"{place}: claims {width} x {height} pixels, more than the {max_pixels:,} allowed; "
            "scale it down if it is real",
            exit_code=3,
        )
    if image.format != "MPO" and (frames := count_frames(image)) > 1:
        raise ShardError(
            f"{place}: an animation of {frames} frames has no one quality; store one frame",
            exit_code=3,
        )
    if image.mode not in _MODES:
        raise ShardError(
            f"{place}: pixel format {image.mode} is not one the written rule covers "
            f"({', '.join(sorted(_MODES))}); convert it to 8-bit RGB",
            exit_code=3,
        )


def _placed(error: ShardError, where: str) -> ShardError:
    """The error with the image's name in front, if it has none yet."""
    if str(error).startswith(printable(where)):
        return error
    reason = str(error)
    if reason.startswith("not a readable image"):
        reason = reason.replace("not a readable image", "cannot be decoded", 1)
        reason += "; replace the file, or leave it out with `--on-error skip`"
    return ShardError(f"{printable(where)}: {reason}", exit_code=error.exit_code)


def _is_no_image(data: bytes) -> bool:
    is_webp = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return not is_webp and not data.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM"))


def _not_an_image(data: bytes, where: str) -> str:
    what, kind = "is empty" if not data else f"starts with {data[:8].hex(' ')}", kind_of(data)
    way_out = "convert it"
    if kind is not None:
        what, way_out = f"it is {kind.name}", kind.way_out
    return (
        f"{printable(where)}: not a JPEG, PNG, BMP or WebP image ({len(data):,} bytes, {what}); "
        f"{way_out}, or leave it out with `--on-error skip`"
    )
