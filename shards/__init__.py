"""Data sets become shards, a manifest and splits; nothing here knows torch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shards.score_scale import ScoreScale as ScoreScale


def __getattr__(name: str) -> object:
    """`shards.ScoreScale`, imported when it is asked for: an error message needs no numpy."""
    if name == "ScoreScale":
        from shards.score_scale import ScoreScale

        return ScoreScale
    raise AttributeError(f"module 'shards' has no attribute {name!r}")
