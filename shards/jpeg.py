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
from typing import Final

LEFT_OVER: Final = "damaged JPEG: picture data is left over at its end"
TOO_SHORT: Final = "damaged JPEG: picture data ends before the last rows"
NO_END: Final = "JPEG without its end marker, every row is there"

_START_OF_SCAN = 0xDA
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))
_TAIL_BYTES = 2
# libjpeg fills a buffer of 64 bits before it decodes the next symbol.
_ZEROS = bytes(8)


class JpegFeed(io.BytesIO):
    """A JPEG file that notices how much of it a decoder wants."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._size = len(data)
        self._end = 0
        self._tail = 0
        self._portion = 0
        self._has_end = True

    def arm(self, data: bytes) -> None:
        """Begin to hand it out in portions; call it after the header was read."""
        start, components = find_scan(data)
        if not start or data[start - components * 2 - 4] != components:
            return
        end = data.find(b"\xff\xd9", start)
        self._has_end = end >= 0
        end = end if self._has_end else len(data)
        while end > start and data[end - 1] == 0xFF:
            end -= 1
        if end - start > _TAIL_BYTES:
            self._tail, self._end, self._portion = end - _TAIL_BYTES, end, 1

    def read(self, size: int | None = -1, /) -> bytes:
        """At most `size` bytes, never across the end of a portion."""
        if not self._portion:
            return super().read(size)
        at = self.tell()
        wanted = self._size if size is None or size < 0 else size
        if at < self._tail:
            self._portion = 1
            return super().read(min(wanted, self._tail - at))
        if at < self._end:
            self._portion = 2
            return super().read(self._end - at) + _ZEROS
        self._portion = 3
        return super().read(size)

    def find_note(self) -> str:
        """What is wrong with the picture's data; empty if nothing was seen. After decoding."""
        if self._portion == 1:
            return LEFT_OVER
        if self._portion == 3:
            return TOO_SHORT
        return "" if self._has_end else NO_END


def find_scan(data: bytes) -> tuple[int, int]:
    """Where the data of the first scan begins, and how many channels the image has; or 0, 0.

    Only for baseline and extended JPEGs: those of one pass.
    """
    at, channels = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF:
        kind = data[at + 1]
        if kind == 0xFF:
            at += 1
            continue
        if kind in _ALONE:
            at += 2
            continue
        size = int.from_bytes(data[at + 2 : at + 4], "big")
        if kind in (0xC0, 0xC1):
            channels = data[at + 9] if at + 9 < len(data) else 0
        if kind == _START_OF_SCAN:
            return (at + 2 + size, channels) if channels else (0, 0)
        at += 2 + size
    return 0, 0
