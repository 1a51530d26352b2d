"""Scores for images of any kind: one file, a folder, a table of paths, a set of shards."""
