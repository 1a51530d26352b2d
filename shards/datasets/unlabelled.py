"""A folder of images without scores, to be scored."""

from collections.abc import Iterator
from pathlib import Path

from shards.datasets.files import FolderIndex
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample
from shards.side_files import PathFilter


def open_unlabelled(
    folder: Path, *, name: str = "unlabelled", files: PathFilter | None = None
) -> DataSet:
    """Every image below a folder, in order of names.

    Args:
        folder: The folder.
        name: Short name of the set.
        files: Which files are looked at.

    Raises:
        ShardError: If there is no such folder, or no image in it.
    """
    index = FolderIndex(folder, files=files)
    if len(index) == 0:
        besides = "".join(f"; {sentence}" for sentence in index.left_out.sentences())
        raise ShardError(
            f"{folder}: no JPEG, PNG, BMP or WebP image is here or in a folder below{besides}",
            exit_code=4,
        )

    def samples() -> Iterator[Sample]:
        for path in index.names():
            yield Sample(path=path, file=folder / path, mos=None, mos_std=None, group=path)

    return DataSet(
        name=name,
        score=None,
        samples=samples,
        facts=Facts(title=f"Images in {folder.name}"),
        left_out=index.left_out,
    )
