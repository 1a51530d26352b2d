"""Names inside a set's folder: shards, their indices, keys of samples, records of a build."""

from shards.tar import Member

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


def index_line(image: Member, text: Member) -> str:
    """One sample in DALI's index format v1.2: ending, offset, size and name of each member."""
    return " ".join(
        f"{member.name.rpartition('.')[2]} {member.offset} {member.size} {member.name}"
        for member in (image, text)
    )
