"""Rows of an uncompressed BMP, taken from the file's bytes without decoding the image.

Only files of which there is no doubt: for all others (run lengths, 16 bits, masks of its own,
palettes that Pillow reads in a way of its own) the answer is None, and a decoder has to say.
"""

import struct
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

_FILE_HEADER_BYTES = 14
_HEADER_BYTES = (40, 52, 56, 108, 124)
"""BITMAPINFOHEADER, and its second to fifth version."""
_UNCOMPRESSED, _BITFIELDS = 0, 3
_MASKS = ((0xFF0000, 0xFF00, 0xFF, 0), (0xFF0000, 0xFF00, 0xFF, 0xFF000000))
"""Of red, green, blue and alpha, where the bytes are blue, green, red, anything."""


@dataclass(frozen=True, kw_only=True)
class BmpHeader:
    """What a BMP says of itself; nothing of it is checked against the length of the file."""

    header_bytes: int
    pixels_at: int
    """First byte of the pixels."""
    height: int
    """Rows, at least 0."""
    width: int
    """Pixels of a row; negative in a file that lies."""
    top_down: bool
    """Whether the first row in the file is the image's first; else it is the last."""
    planes: int
    bits: int
    """Per pixel."""
    compression: int
    colours: int
    """Entries of the palette; 0 for as many as the bits allow."""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, padded to a multiple of 4."""
        return (self.width * self.bits + 31) // 32 * 4


def read_bmp_header(data: memoryview) -> BmpHeader | None:
    """The header of a BMP of version 1 (BITMAPINFOHEADER) to 5; None of any other file.

    Raises:
        struct.error: If the file ends within it.
    """
    pixels_at, size, width, height, planes, bits, compression, colours = struct.unpack_from(
        "<IIiiHHI12xI", data, 10
    )
    if bytes(data[:2]) != b"BM" or size not in _HEADER_BYTES:
        return None
    return BmpHeader(
        header_bytes=size,
        pixels_at=pixels_at,
        height=abs(height),
        width=width,
        top_down=height < 0,
        planes=planes,
        bits=bits,
        compression=compression,
        colours=colours,
    )


def read_bmp_rows(
    data: UInt8[np.ndarray, " _size"], *, size: tuple[int, int], top: int, bottom: int
) -> UInt8[np.ndarray, "rows width 3"] | None:
    """RGB of the rows [top, bottom), as `pipeline.decode.decode_rgb` has them, in new memory.

    Args:
        data: The file.
        size: Height and width that the image must have.
        top: First row, 0 for the image's upper one.
        bottom: Row after the last, above `top` and at most the height.

    Returns:
        None if the file is no BMP, is of another size, or is better left to a decoder.
    """
    try:
        header = read_bmp_header(data.data)
    except struct.error:
        return None
    if header is None or (header.height, header.width) != size or header.planes != 1:
        return None
    # Whatever the header says, no byte outside of the file is touched.
    if header.pixels_at + header.row_bytes * header.height > len(data):
        return None
    if not _is_plain(data.data, header):
        return None
    if header.bits in (24, 32):
        return _swap_channels(
            _stored_rows(data, header, top, bottom), header.width, header.bits // 8
        )
    return _look_up(data, header, top, bottom)


def _is_plain(data: memoryview, header: BmpHeader) -> bool:
    if header.compression == _UNCOMPRESSED:
        start = _FILE_HEADER_BYTES + header.header_bytes
        return header.bits in (1, 4, 8, 24, 32) and header.pixels_at >= start
    if header.compression != _BITFIELDS or header.bits != 32:
        return False
    # Version 1 has the masks after its header, without one of alpha.
    has_alpha = header.header_bytes >= 56
    masks = struct.unpack_from("<IIII" if has_alpha else "<III", data, 54)
    end = _FILE_HEADER_BYTES + max(header.header_bytes, 52)
    return (masks if has_alpha else (*masks, 0)) in _MASKS and header.pixels_at >= end


def _stored_rows(
    data: UInt8[np.ndarray, " _size"], header: BmpHeader, top: int, bottom: int
) -> UInt8[np.ndarray, "rows row_bytes"]:
    """A view of the file, the image's upper row first."""
    end = header.pixels_at + header.height * header.row_bytes
    stored = data[header.pixels_at : end].reshape(header.height, header.row_bytes)
    return (stored if header.top_down else stored[::-1])[top:bottom]


def _swap_channels(
    packed: UInt8[np.ndarray, "rows row_bytes"], width: int, pixel_bytes: int
) -> UInt8[np.ndarray, "rows width 3"]:
    # A view: rows are longer than their pixels, so that a plain reshape would copy.
    stored = np.lib.stride_tricks.as_strided(
        packed,
        shape=(len(packed), width, pixel_bytes),
        strides=(packed.strides[0], pixel_bytes, 1),
        writeable=False,
    )
    # Byte by byte through a reversed view costs 8 times as much as these strided copies.
    if pixel_bytes == 3:
        rgb = stored.copy(order="C")
    else:
        rgb = np.empty((*stored.shape[:2], 3), dtype=np.uint8)
        rgb[..., 1] = stored[..., 1]
    rgb[..., 0] = stored[..., 2]
    rgb[..., 2] = stored[..., 0]
    return rgb


def _look_up(
    data: UInt8[np.ndarray, " _size"], header: BmpHeader, top: int, bottom: int
) -> UInt8[np.ndarray, "rows width 3"] | None:
    """The colours of a palette's indices; None if an index has none, or Pillow has its own way."""
    start = _FILE_HEADER_BYTES + header.header_bytes
    colours = header.colours or 1 << header.bits
    if colours > 1 << header.bits or header.pixels_at < start + 4 * colours:
        return None
    palette = data[start : start + 4 * colours].reshape(-1, 4)[:, 2::-1]
    if _is_grey_ramp(palette) and (header.bits, colours == 2) not in ((1, True), (8, False)):
        return None
    indices = _indices(data, header, top, bottom)
    if colours < 256 and indices.size and int(indices.max()) >= colours:
        return None
    return np.asarray(np.ascontiguousarray(palette)[indices])


def _is_grey_ramp(palette: UInt8[np.ndarray, "n 3"]) -> bool:
    """Whether Pillow leaves the palette out and takes the indices, or bits, for grey levels."""
    ramp = np.array([0, 255]) if len(palette) == 2 else np.arange(len(palette))
    return bool((palette == ramp[:, None]).all())


def _indices(
    data: UInt8[np.ndarray, " _size"], header: BmpHeader, top: int, bottom: int
) -> UInt8[np.ndarray, "rows width"]:
    packed = _stored_rows(data, header, top, bottom)
    if header.bits == 8:
        return packed[:, : header.width]
    if header.bits == 1:
        return np.unpackbits(packed, axis=1)[:, : header.width]
    halves = np.stack([packed >> 4, packed & 15], axis=2)
    return halves.reshape(len(packed), -1)[:, : header.width]
