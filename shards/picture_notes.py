"""Notes on images that are accepted and should be looked at: one wording for builds and scores.

A note is a short phrase without a place; several are joined by `; `. What is refused is an error
and no note.
"""

from collections.abc import Iterable
from typing import Final

TINY_SIDE: Final = 32
"""An image with a shorter side (pixels) shows nothing whose quality could be judged."""

EXTREME_SHAPE: Final = 8
"""An image that is more times as long as wide is a strip: its crops hardly show it."""


def shape_note(width: int, height: int) -> str:
    """What is unusual about an image's size, in pixels; empty if nothing is."""
    short, long = sorted((width, height))
    if short < TINY_SIDE:
        return f"tiny: {width} x {height} pixels"
    if long > EXTREME_SHAPE * short:
        return f"extreme shape: {width} x {height} pixels"
    return ""


def join_notes(notes: Iterable[str]) -> str:
    """Notes as the text of one cell, each once, in their order."""
    return "; ".join(dict.fromkeys(note for note in notes if note))


def too_small(width: int, height: int, min_side: int) -> str:
    """Why an image is refused for its size; empty if its shorter side measures `min_side`."""
    if min(width, height) >= min_side:
        return ""
    return (
        f"{width} x {height} pixels, with a side below the {min_side} of `--min-side`; use a "
        "larger picture, or lower `--min-side`"
    )
