"""Data sets become shards, a manifest and splits; nothing here knows torch."""
