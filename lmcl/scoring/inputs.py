"""What `lmcl score` is pointed at becomes a list of items, in an order that never changes.

Files, folders (recursively, sorted), glob patterns, CSVs with a `path` column, WebDataset tars,
this project's shard sets, and `-` for paths on stdin. Nothing is opened here but folders, tables
and tar headers: an image that cannot be read is found out, and named, when its turn comes. A folder
that cannot be read is an item with a `problem`: its images are missing, and somebody must say so.
"""

import csv
import dataclasses
import errno
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
    # os.path answers False where pathlib raises: for what must not even be looked at.
    if os.path.isfile(path / MANIFEST):
        yield from _from_set(path)
    elif os.path.isdir(path):
        yield from _from_folder(path)
    elif path.suffix == ".csv" and os.path.isfile(path):
        yield from _from_table(path)
    elif path.suffix == ".tar" and os.path.isfile(path):
        yield from _from_tar(path)
    elif os.path.lexists(path) or _is_denied(path):
        yield _single(path)
    else:
        yield from _from_pattern(argument)


def _from_folder(folder: Path) -> Iterator[Item]:
    """Every file that is not hidden; what is no image becomes a row that says so."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield _unreadable_folder(folder, error)
        return
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = folder / entry.name
        # A link to a folder may lead back up: links are followed to files only.
        if entry.is_dir(follow_symlinks=False):
            yield from _from_folder(path)
        elif entry.is_file(follow_symlinks=False):
            yield Item(path=path.as_posix(), file=str(path))
        else:
            yield _single(path)


def _single(path: Path) -> Item:
    """What stands under a name and is no folder of its own: a file, or the reason it is none."""
    try:
        if os.path.isfile(path):
            return Item(path=path.as_posix(), file=str(path))
        os.stat(path)
    except OSError as error:
        return _absent(path.as_posix(), _no_file(path, error))
    if path.is_symlink():
        return _absent(
            path.as_posix(),
            f"a link to the folder {os.readlink(path)}, which is not followed; name that folder",
        )
    return _absent(path.as_posix(), "neither a file nor a folder")


def _is_denied(path: Path) -> bool:
    try:
        os.lstat(path)
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def _no_file(path: Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "a link that leads back to itself; remove it"
    if error.errno == errno.ENOENT and path.is_symlink():
        return f"a broken link: {os.readlink(path)} does not exist; restore or remove it"
    return f"cannot be looked at: {error.strerror}; check the rights of its folder"


def _unreadable_folder(folder: Path, error: OSError) -> Item:
    return _absent(
        folder.as_posix(),
        f"the folder cannot be opened ({error.strerror}), no image in it was scored; "
        "check its rights and run again with --resume",
    )


def _from_pattern(argument: str) -> Iterator[Item]:
    matches = sorted(glob.glob(argument, recursive=True))
    for match in matches:
        path = Path(match)
        yield from _from_folder(path) if os.path.isdir(path) else [_single(path)]
    # glob passes over folders it may not open; what they hold would be missing without a word.
    closed = list(_closed_folders(argument))
    yield from closed
    if not matches and not closed:
        yield _absent(argument, "no such file, and no file matches it as a pattern")


def _closed_folders(pattern: str) -> Iterator[Item]:
    """The folders a pattern has to look into and cannot."""
    parts = Path(pattern).parts
    for i, part in enumerate(parts):
        if not glob.has_magic(part):
            continue
        above = [str(Path(*parts[:i]))] if i else [os.curdir]
        # `a/**` looks into a and into every folder below it.
        heads = [*above, str(Path(*parts[: i + 1]))] if part == "**" else above
        for folder in sorted({f for head in heads for f in glob.glob(head, recursive=True)}):
            if not os.path.isdir(folder):
                continue
            try:
                os.scandir(folder).close()
            except OSError as error:
                yield _unreadable_folder(Path(folder), error)


def _from_table(file: Path) -> Iterator[Item]:
    try:
        lines = file.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        yield _absent(file.as_posix(), f"the table cannot be opened: {error.strerror}")
        return
    with lines:
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
    except (tarfile.TarError, OSError) as error:
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
