"""A folder of images without scores, to be scored."""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample


def open_unlabelled(folder: Path, *, name: str = "unlabelled") -> DataSet:
    """Every image below a folder, in order of names.

    Raises:
        ShardError: If there is no such folder, or no image in it.
    """
    index = FolderIndex(folder)
    if len(index) == 0:
        raise ShardError(
            f"{folder}: no image ending in .jpg, .jpeg, .png, .bmp or .webp", exit_code=4
        )

    def samples() -> Iterator[Sample]:
        for path in index.names():
            yield Sample(path=path, file=folder / path, mos=None, mos_std=None, group=path)

    return DataSet(
        name=name, score=None, samples=samples, facts=Facts(title=f"Images in {folder.name}")
    )
