"""The one way image files are opened: an allow-list of formats, and limits before decoding.

Pillow knows some forty formats. Its PostScript reader starts Ghostscript, others have had holes,
and a header of a few bytes can ask for terabytes. `open_image` tries only the formats of this
project, never starts a process, and refuses by the header what would cost more memory or time than
its pixels are worth. Pillow's global settings are left alone, so threads and callers are safe.
"""

import importlib
import io
import os
import struct
import zlib
from collections.abc import Collection
from typing import Final

from PIL import Image, ImageFile, UnidentifiedImageError

from shards.decoder_notes import note_later, route_warnings
from shards.errors import ShardError
from shards.image_kinds import AVIF, HEIC, RAW, TIFF, kind_of
from shards.jpeg import START_OF_SCAN, JpegFeed, find_scan
from shards.limits import MAX_PIXELS
from shards.png import strip_metadata
from shards.source_files import MAX_FILE_BYTES, read_regular
from shards.text import printable

PACKED_FORMATS: Final = ("JPEG", "PNG", "BMP", "WEBP")
"""Formats that a shard set holds."""

READABLE_FORMATS: Final = (*PACKED_FORMATS, "GIF", "TIFF", "AVIF", "PPM", "HEIF")
"""Formats that are scored and drawn; HEIF where `pillow-heif` is installed."""

UNREADABLE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    AssertionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow raises while it decodes hostile bytes; `OSError` holds `UnidentifiedImageError`."""

_MOST_SCANS = 500
"""A progressive JPEG of a photograph has about ten; each scan may walk over every pixel."""

_TILE_WIDTH, _TILE_LENGTH = 322, 323
_TILE_ROOM = 1 << 20
"""Pixels that a tile of a TIFF may have beyond four times its image's."""

_MOST_FRAMES = 100
_ORIENTATION = 0x0112
_NEW_SUBFILE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706
_TRANSPOSES: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(
    source: bytes | memoryview | str | os.PathLike[str],
    *,
    formats: Collection[str] = READABLE_FORMATS,
    max_pixels: int = MAX_PIXELS,
    follow_links: bool = True,
) -> ImageFile.ImageFile:
    """Open an image without decoding it; use it in a `with` statement.

    What decodes it afterwards (`load`, `convert`, `numpy.asarray`) may still find the file damaged
    and raise one of `UNREADABLE`; `describe_damage` makes a reason of it.

    Args:
        source: The encoded image, or a file, which is read by `shards.source_files`.
        formats: Pillow's names of the formats that are tried, among `READABLE_FORMATS`.
        max_pixels: Most pixels the header may promise.
        follow_links: Whether a symbolic link stands for the file it points to.

    Raises:
        ShardError: If it is no image of these formats, damaged, or promises too much. The message
            is a reason without a place if `source` is bytes.
    """
    if isinstance(source, bytes | memoryview):
        return _open(bytes(source), formats, max_pixels)
    data = read_regular(source, limit_bytes=MAX_FILE_BYTES, follow_links=follow_links)
    try:
        return _open(data, formats, max_pixels)
    except ShardError as error:
        raise ShardError(f"{printable(source)}: {error}", exit_code=error.exit_code) from error


def orientation_of(image: Image.Image) -> int:
    """How an image is turned, 1 to 8, by its EXIF; 1 if that says nothing or cannot be read."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except UNREADABLE:
        return 1
    return orientation if orientation in _TRANSPOSES else 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF says; itself if there is nothing to turn."""
    method = _TRANSPOSES.get(orientation_of(image))
    return image if method is None else image.transpose(method)


def describe_damage(error: BaseException, data: bytes = b"") -> str:
    """Why an image cannot be decoded; without a buffer's address, which differs in every run.

    Args:
        error: One of `UNREADABLE`.
        data: The encoded image, to name formats whose decoders speak of other things than files.
    """
    said = printable(str(error).partition(" <_io")[0]) or type(error).__name__
    if isinstance(error, LookupError):
        said = f"{type(error).__name__}: {said}"
    kind = None if isinstance(error, UnidentifiedImageError) else kind_of(data)
    if kind is HEIC or kind is AVIF:
        return f"it is {kind.name} that is damaged: {said}; copy it from its source again"
    if kind is TIFF:
        return (
            "it is a damaged TIFF image, or a camera's raw file, which begins like one (DNG, NEF): "
            f"{said}; copy it from its source again, and if it is a raw file, {RAW.way_out}"
        )
    return said


def count_frames(image: Image.Image) -> int:
    """Frames of an animation or pages of a document, counted up to 100.

    A file of a few megabytes can hold a hundred thousand, and finding each costs time.
    """
    if not getattr(image, "is_animated", False):
        return 1
    if image.format not in ("GIF", "TIFF"):
        return int(getattr(image, "n_frames", 1))
    count = 1
    try:
        while count < _MOST_FRAMES:
            image.seek(count)
            count += 1
    except EOFError:
        pass
    image.seek(0)
    return count


def _open(data: bytes, formats: Collection[str], max_pixels: int) -> ImageFile.ImageFile:
    if not data:
        raise ShardError("not a readable image (the file is empty, 0 bytes)", exit_code=3)
    _refuse_by_bytes(data, max_pixels)
    route_warnings()
    data = strip_metadata(data)
    try:
        image = _identify(data, formats)
    except UNREADABLE as error:
        raise ShardError(
            f"not a readable image ({describe_damage(error, data)})", exit_code=3
        ) from error
    try:
        _refuse_by_header(image, max_pixels)
        if isinstance(image.fp, JpegFeed):
            _watch_jpeg(image, image.fp, data)
    except BaseException:
        image.close()
        raise
    return image


def _identify(data: bytes, formats: Collection[str]) -> ImageFile.ImageFile:
    """What `Image.open` does, without its own limit, its warnings and the other plugins.

    The limit is a global of Pillow's, warns from 89 million pixels on, and refuses phones' 200.
    """
    unknown = set(formats) - set(READABLE_FORMATS)
    if unknown:
        raise ValueError(f"formats {sorted(unknown)} are not among {READABLE_FORMATS}")
    failure: BaseException | None = None
    kind = kind_of(data)
    for name in formats:
        if name == "HEIF":
            if kind is HEIC and (opened := _open_heif(data)) is not None:
                return opened
            continue
        if name not in Image.OPEN:
            Image.preinit()
        if name not in Image.OPEN:
            Image.init()
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory is None or (accept is not None and accept(data[:16]) is not True):
            continue
        try:
            return factory(JpegFeed(data) if name == "JPEG" else io.BytesIO(data), "")
        except (SyntaxError, IndexError, TypeError, struct.error) as error:
            # As in Pillow: it may be another format that begins alike.
            failure = error
    if failure is None and kind is not None:
        others = ", ".join(formats)
        raise UnidentifiedImageError(f"it is {kind.name}, none of {others}; {kind.way_out}")
    raise failure or UnidentifiedImageError(
        f"{len(data):,} bytes that start with {data[:8].hex(' ')} are none of {', '.join(formats)}"
    )


def _open_heif(data: bytes) -> ImageFile.ImageFile | None:
    """A HEIC image; None where `pillow-heif` is not installed."""
    try:
        plugin = importlib.import_module("pillow_heif.as_plugin")
    except ImportError:
        return None
    opened: ImageFile.ImageFile = plugin.HeifImageFile(io.BytesIO(data), "")
    return opened


def _refuse_by_bytes(data: bytes, max_pixels: int) -> None:
    """Limits that must hold before a plugin looks at the bytes, or that it does not look at."""
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and len(data) >= 30:
        # The decoder allocates two canvases when it is made.
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
        _refuse_size(width, height, max_pixels)


def _refuse_by_header(image: ImageFile.ImageFile, max_pixels: int) -> None:
    _refuse_size(*image.size, max_pixels)
    if image.format == "TIFF":
        _refuse_raw(image)
        _refuse_tiles(image)


def _refuse_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ShardError(f"is {width} x {height} pixels large", exit_code=3)
    if width * height > max_pixels:
        raise ShardError(
            f"claims {width} x {height} pixels, more than the {max_pixels:,} allowed; scale it "
            "down if it is real",
            exit_code=3,
        )


def _watch_jpeg(image: ImageFile.ImageFile, feed: JpegFeed, data: bytes) -> None:
    """Refuse too many scans; the usual JPEG has one, and is watched while it is decoded."""
    scan = find_scan(data)
    if scan is None or not scan.is_only:
        _refuse_scans(data)
    else:
        feed.arm(scan, has_trailer=image.format == "MPO" or "exif" in image.info)
        note_later(feed.find_note)


def _refuse_scans(data: bytes) -> None:
    # Inside a scan the byte 255 is followed by 0 or a restart marker, so these are all scans.
    scans = data.count(bytes([0xFF, START_OF_SCAN]))
    if scans > _MOST_SCANS:
        raise ShardError(
            f"a JPEG of {scans:,} scans, more than the {_MOST_SCANS} that are decoded; refused as "
            "a decompression bomb, save it again",
            exit_code=3,
        )


def _refuse_raw(image: ImageFile.ImageFile) -> None:
    """A camera's raw file begins like a TIFF, and its first picture is a thumbnail."""
    tags = getattr(image, "tag_v2", {})
    is_reduced = isinstance(tags.get(_NEW_SUBFILE), int) and tags[_NEW_SUBFILE] & 1
    if _DNG_VERSION in tags or (is_reduced and _SUB_IFDS in tags):
        raise ShardError(f"not a readable image (it is {RAW.name}; {RAW.way_out})", exit_code=3)


def _refuse_tiles(image: ImageFile.ImageFile) -> None:
    """A TIFF of one pixel may be stored in a tile of a billion, which is decoded whole."""
    tags = getattr(image, "tag_v2", {})
    wide, high = (tags.get(tag, 0) for tag in (_TILE_WIDTH, _TILE_LENGTH))
    if not all(isinstance(side, int) for side in (wide, high)):
        raise ShardError("a TIFF whose tiles have no size", exit_code=3)
    if wide * high > 4 * image.width * image.height + _TILE_ROOM:
        raise ShardError(
            f"a TIFF of {image.width} x {image.height} pixels in tiles of {wide} x {high}; refused "
            "as a decompression bomb, save it again",
            exit_code=3,
        )
