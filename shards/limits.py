"""What a build takes at most unless told otherwise; read by commands before any of its work."""

from typing import Final

MAX_PIXELS: Final = 256_000_000
"""Larger images are refused before decoding: a small PNG can claim to be terabytes."""

PIXELS_AT_ONCE: Final = 128_000_000
"""Half a gigabyte of decoded pictures; the largest photographs (108 megapixels) go one by one."""
