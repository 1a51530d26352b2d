"""What `lmcl score` is pointed at becomes a list of items, in an order that never changes.

Files, folders (recursively, sorted), glob patterns, CSVs with a `path` column, WebDataset tars,
this project's shard sets, and `-` for paths on stdin. Nothing is opened here but tables and tar
headers: an image that cannot be read is found out, and named, when its turn comes.
"""

import csv
import dataclasses
import glob
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from lmcl.errors import LmclError
from shards.manifest import MANIFEST
from shards.read import open_set

_IN_TARS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".ppm")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image to be scored."""

    path: str
    """How it is called in the scores file; unique."""
    file: str
    """The file its bytes lie in."""
    offset: int = -1
    """Where they begin in a tar; -1 if the file is the image."""
    size: int = -1
    """How many they are in a tar."""
    problem: str = ""
    """Why it cannot be read, if that is known already."""

    @property
    def is_file(self) -> bool:
        """Whether the file is the image, so that it can be moved."""
        return self.offset < 0 and not self.problem

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            LmclError: If there is nothing to read.
        """
        if self.problem:
            raise LmclError(self.problem, exit_code=4)
        try:
            with open(self.file, "rb") as file:
                if self.offset < 0:
                    return file.read()
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise LmclError(error.strerror or str(error), exit_code=4) from error
        if len(data) != self.size:
            raise LmclError(f"{self.file} ends after {len(data)} of {self.size} bytes", exit_code=3)
        return data


def list_items(arguments: Sequence[str], *, stdin: Iterator[str] | None = None) -> list[Item]:
    """All images, each once, in the order of the arguments and sorted inside each.

    Args:
        arguments: Paths, patterns, tables, tars, shard sets, or `-`.
        stdin: Lines for `-`.

    Raises:
        LmclError: If a table or a shard set cannot be used as one.
    """
    found: dict[str, Item] = {}
    for argument in arguments:
        for item in _expand(argument, stdin):
            found.setdefault(item.path, item)
    return list(found.values())


def _expand(argument: str, stdin: Iterator[str] | None) -> Iterator[Item]:
    if argument == "-":
        for line in stdin or ():
            if line.strip():
                yield from _expand(line.rstrip("\r\n"), None)
        return
    path = Path(argument)
    if (path / MANIFEST).is_file():
        yield from _from_set(path)
    elif path.is_dir():
        yield from _from_folder(path)
    elif path.suffix == ".csv" and path.is_file():
        yield from _from_table(path)
    elif path.suffix == ".tar" and path.is_file():
        yield from _from_tar(path)
    elif path.exists():
        yield Item(path=path.as_posix(), file=argument)
    else:
        yield from _from_pattern(argument)


def _from_folder(folder: Path) -> Iterator[Item]:
    """Every file that is not hidden; what is no image becomes a row that says so."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield _absent(folder.as_posix(), f"the folder cannot be opened: {error.strerror}")
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        # A link to a folder may lead back up: links are followed to files only.
        if entry.is_dir(follow_symlinks=False):
            yield from _from_folder(path)
        elif entry.is_file():
            yield Item(path=path.as_posix(), file=str(path))
        else:
            yield _absent(path.as_posix(), "neither a file nor a folder")


def _from_pattern(argument: str) -> Iterator[Item]:
    matches = sorted(glob.glob(argument, recursive=True))
    for match in matches:
        path = Path(match)
        yield from _from_folder(path) if path.is_dir() else [Item(path=path.as_posix(), file=match)]
    if not matches:
        yield _absent(argument, "no such file, and no file matches it as a pattern")


def _from_table(file: Path) -> Iterator[Item]:
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        if "path" not in (reader.fieldnames or ()):
            raise LmclError(
                f"{file}: has no column named path, only {', '.join(reader.fieldnames or ())}; "
                "name the column of image paths `path`",
                exit_code=3,
            )
        for row in reader:
            # A relative path is meant relative to its table, wherever the command is run.
            path = Path(row["path"])
            place = path if path.is_absolute() else file.parent / path
            yield Item(path=row["path"], file=str(place))


def _from_tar(file: Path) -> Iterator[Item]:
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if member.isfile() and PurePosixPath(member.name).suffix.lower() in _IN_TARS:
                    yield Item(
                        path=f"{file.as_posix()}/{member.name}",
                        file=str(file),
                        offset=member.offset_data,
                        size=member.size,
                    )
    except tarfile.TarError as error:
        yield _absent(file.as_posix(), f"the tar cannot be read: {error}")


def _from_set(root: Path) -> Iterator[Item]:
    shard_set = open_set(root)
    table = shard_set.samples
    for index in range(len(table)):
        name = f"{root.as_posix()}/{table.path[index]}"
        if not table.ok[index]:
            yield _absent(name, "rejected when the set was built (rejected.jsonl)")
            continue
        yield Item(
            path=name,
            file=str(shard_set.shard_path(int(table.shard[index]))),
            offset=int(table.offset[index]),
            size=int(table.size[index]),
        )


def _absent(path: str, problem: str) -> Item:
    return Item(path=path, file="", problem=problem)
