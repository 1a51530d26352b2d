"""What a person should know about the pictures of a set: profiles, orientations, sizes, copies.

Colour profiles are counted because they are not applied: colours are taken as stored, so a picture
in a wide profile is judged paler than people saw it.
"""

import collections
import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from shards.errors import ShardError
from shards.image_formats import UNREADABLE, open_image, orientation_of
from shards.picture_notes import EXTREME_SHAPE, TINY_SIDE
from shards.text import printable

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_PROFILE = 1 << 20
_MOST_TAGS = 100
_NAMED = 6


class PictureCounts:
    """Counts over pictures that are shown one after the other."""

    def __init__(self) -> None:
        self.seen = 0
        self._profiles: collections.Counter[str] = collections.Counter()
        self._turned: collections.Counter[int] = collections.Counter()

    def add(self, data: bytes) -> None:
        """Look at a picture's header; what cannot be read is counted as nothing."""
        self.seen += 1
        try:
            with open_image(data) as image:
                profile = image.info.get("icc_profile")
                orientation = orientation_of(image)
        except (ShardError, *UNREADABLE):
            return
        self._turned[orientation] += orientation != 1
        packed = _png_profile(data) if data.startswith(_PNG) else profile
        if isinstance(packed, bytes) and packed:
            self._profiles[profile_name(packed)] += 1

    def sentences(self) -> Iterator[str]:
        """A line a fact; none for what no picture has."""
        others = {
            name: count for name, count in self._profiles.items() if "srgb" not in name.lower()
        }
        if others:
            named = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:_NAMED]
            listed = ", ".join(f"{printable(name, 60)} {count:,}" for name, count in named)
            yield (
                f"{sum(others.values()):,} have a colour profile other than sRGB ({listed}); "
                "profiles are not applied"
            )
        if turned := self._turned.total():
            listed = ", ".join(f"{how}: {n:,}" for how, n in sorted(self._turned.items()) if n)
            yield f"{turned:,} are turned by EXIF (orientation {listed})"


def size_sentences(widths: ArrayLike, heights: ArrayLike) -> Iterator[str]:
    """Lines about pictures that are tiny or strips, by their sides in pixels."""
    wide, high = np.asarray(widths, np.int64), np.asarray(heights, np.int64)
    short, long = np.minimum(wide, high), np.maximum(wide, high)
    tiny = int(np.count_nonzero(short < TINY_SIDE))
    strips = int(np.count_nonzero((short >= TINY_SIDE) & (long > EXTREME_SHAPE * short)))
    if tiny:
        yield f"{tiny:,} have a side below {TINY_SIDE} pixels"
    if strips:
        yield f"{strips:,} are more than {EXTREME_SHAPE} times as long as wide"


def profile_name(profile: bytes) -> str:
    """The description an ICC profile gives itself, or `without a name`."""
    count = min(int.from_bytes(profile[128:132], "big"), _MOST_TAGS)
    for at in range(132, 132 + 12 * count, 12):
        if profile[at : at + 4] == b"desc":
            start = int.from_bytes(profile[at + 4 : at + 8], "big")
            return _description(profile[start : start + 4096]) or "without a name"
    return "without a name"


def _description(tag: bytes) -> str:
    if tag[:4] == b"desc":
        size = min(int.from_bytes(tag[8:12], "big"), 200)
        return tag[12 : 12 + size].partition(b"\0")[0].decode("latin-1").strip()
    if tag[:4] == b"mluc":
        size, start = (int.from_bytes(tag[at : at + 4], "big") for at in (20, 24))
        return tag[start : start + min(size, 400)].decode("utf-16-be", "replace").strip("\0 ")
    return ""


def _png_profile(data: bytes) -> bytes:
    """The profile of a PNG, unpacked up to a bound; empty if there is none."""
    at = 8
    while at + 12 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind in (b"IDAT", b"IEND"):
            return b""
        if kind == b"iCCP":
            packed = data[at + 8 : at + 8 + size].partition(b"\0")[2][1:]
            try:
                return zlib.decompressobj().decompress(packed, _MOST_PROFILE)
            except zlib.error:
                return b""
        at += 12 + size
    return b""
