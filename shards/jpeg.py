"""Whether the data of a JPEG's picture is whole, found out while it is decoded, at no cost.

libjpeg decodes over damage: it repeats, skips, or fills with grey, and warns; Pillow drops the
warnings. `JpegFeed` hands a JPEG of one scan to the decoder in three portions: all but the last
bytes of the scan, those with a few zeros behind them, and the rest. A whole picture needs the
second and not the third. One that is done after the first has data left over, and one that needs
the third had too little: somewhere in between bytes are missing, surplus or overwritten.

Not seen this way: damage between restart markers, and in JPEGs of several scans (progressive), all
of which the decoder reads before it gives the first row.
"""

import io
from dataclasses import dataclass
from typing import Final

from PIL import JpegImagePlugin

LEFT_OVER: Final = "damaged JPEG: picture data is left over at its end"
TOO_SHORT: Final = "damaged JPEG: picture data ends before the last rows"
NO_END: Final = "JPEG without its end marker, every row is there"

START_OF_SCAN: Final = 0xDA
"""Second byte of the marker before a scan."""

_END_OF_IMAGE = b"\xff\xd9"
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
_TAIL_BYTES = 2
# libjpeg fills a buffer of 64 bits before it decodes the next symbol.
_ZEROS = bytes(8)


@dataclass(frozen=True, kw_only=True)
class Scan:
    """Where the first scan of a JPEG is; for baseline and extended JPEGs, those of one pass."""

    start: int
    """Offset of its data."""
    is_only: bool
    """Whether it holds all channels of the image."""


class JpegFeed(io.BytesIO):
    """A JPEG file that notices how much of it a decoder wants."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._data = data
        self._end = 0
        self._tail = 0
        self._portion = 0
        self._marker = 0

    def arm(self, scan: Scan, *, has_trailer: bool) -> None:
        """Begin to hand it out in portions; call it after the header was read.

        Args:
            scan: Of this file.
            has_trailer: Whether another picture or a film may follow, as in files of phones.
                Where it follows unannounced, an image is decoded once more to be sure of it.
        """
        data = self._data
        # The first marker is the end. It is found by going over every byte, a twentieth of the
        # time of decoding; the last at once, and rarely another stands before it.
        find = data.find if has_trailer else data.rfind
        self._marker = find(_END_OF_IMAGE, scan.start)
        end = self._marker if self._marker >= 0 else len(data)
        while end > scan.start and data[end - 1] == 0xFF:
            end -= 1
        if end - scan.start > _TAIL_BYTES:
            self._tail, self._end, self._portion = end - _TAIL_BYTES, end, 1
            # Headers are read by single bytes, which a method in Python would make slow.
            self.__class__ = _Portions

    def find_note(self) -> str:
        """What is wrong with the picture's data; empty if nothing was seen. After decoding."""
        if self._portion == 1:
            scan = find_scan(self._data)
            if scan and self._data.find(_END_OF_IMAGE, scan.start) != self._marker:
                return _decode_again(self._data, scan)
            return LEFT_OVER
        if self._portion == 3:
            return TOO_SHORT
        return "" if self._marker >= 0 else NO_END


def _decode_again(data: bytes, scan: Scan) -> str:
    """The note on a file that holds more than one end marker."""
    feed = JpegFeed(data)
    with JpegImagePlugin.jpeg_factory(feed, "") as image:
        feed.arm(scan, has_trailer=True)
        image.load()
    return feed.find_note()


class _Portions(JpegFeed):
    """The file from the beginning of its scan on."""

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, never across the end of a portion."""
        at = self.tell()
        wanted = len(self._data) if size is None or size < 0 else size
        if at < self._tail:
            self._portion = 1
            return super().read(min(wanted, self._tail - at))
        if at < self._end:
            self._portion = 2
            return super().read(self._end - at) + _ZEROS
        self._portion = 3
        return super().read(size)


def find_scan(data: bytes) -> Scan | None:
    """The first scan; None if there is none, or the JPEG is of another kind (progressive)."""
    at, channels, size = 2, 0, len(data)
    while at + 4 <= size and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:
            at += 1
            continue
        if kind in _ALONE:
            at += 2
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if kind in (0xC0, 0xC1):
            channels = data[at + 9] if at + 9 < size else 0
        if kind == START_OF_SCAN:
            if not channels or at + 5 > size:
                return None
            return Scan(start=at + 2 + length, is_only=data[at + 4] == channels)
        at += 2 + length
    return None
