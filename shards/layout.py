"""Names inside a set's folder: shards, their indices, keys of samples, records of a build."""

STATE = ".build"
"""Folder of an unfinished build's records; gone when the manifest is written."""


def shard_stem(set_name: str, index: int) -> str:
    """File name of a shard without its ending."""
    return f"{set_name}-{index:06d}"


def key_of(set_name: str, id: int) -> str:
    """Name of a sample's members inside the tar, without endings: never the original name."""
    return f"{set_name}-{id:08d}"


def index_name(shard_name: str) -> str:
    """File name of a shard's DALI index."""
    return shard_name.removesuffix(".tar") + ".idx"
