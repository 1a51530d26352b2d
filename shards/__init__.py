"""Data sets become shards, a manifest and splits; nothing here knows torch."""

from shards.score_scale import ScoreScale

__all__ = ["ScoreScale"]
