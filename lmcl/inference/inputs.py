"""What `lmcl score` is pointed at becomes a list of items, in an order that never changes.

Files, folders (recursively, sorted), glob patterns, tables of paths in any format, WebDataset tars,
this project's shard sets, and `-` for paths on stdin. Nothing is opened here but folders, tables
and tar headers: an image that cannot be read is found out, and named, when its turn comes. What
cannot be listed is an item with a `problem`: its images are missing, and somebody must say so.
"""

import collections
import dataclasses
import errno
import functools
import glob
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lmcl.errors import LmclError
from shards.datasets.roles import PATH, ColumnNames, find_column
from shards.datasets.rows import TABLE_ENDINGS, LabelTable, open_rows
from shards.datasets.values import name_text
from shards.errors import ShardError
from shards.image_kinds import HEAD_BYTES, kind_of
from shards.manifest import MANIFEST
from shards.remote import local_copy, local_folder, shown_url, split_url, url_suffix
from shards.sample import Embedded
from shards.side_files import (
    OTHER_ENDINGS,
    PICTURE_ENDINGS,
    LeftOut,
    PathFilter,
    is_side_file,
    is_side_folder,
    is_side_path,
)
from shards.source_files import MAX_TABLE_BYTES, open_regular, read_regular, text_lines
from shards.store import Store
from shards.tar import Member, iterate_members
from shards.tar_sources import (
    COMPRESSED_TARS,
    compression_of,
    expand_names,
    plain_twin,
    unpack_command,
)
from shards.text import is_url, printable, redact_url, spreadsheet_path

_TARS = (".tar", *COMPRESSED_TARS)
_OWN = (".origin.json", ".sources.jsonl")
"""Ends of the files that `lmcl score` writes beside its output."""
MOVES_NAME = "moves.csv"
"""Record of `--move-to`, inside that folder."""
MOVES_COLUMNS = ("old", "new", "score", "size", "mtime_ns", "link")
_TABLES = tuple(sorted(TABLE_ENDINGS))
_LISTS = (".txt", ".csv", ".tsv", ".tab", ".psv")
"""Endings of texts that may hold a path a line and no names of columns."""
_LOOKED_AT = 1000
"""Lines of a text that tell a list from a table."""
_MOST_TAR_BYTES = 1 << 62
_DOTS = frozenset({".", ".."})
_MOST_NAME = 1 << 16
_WRITTEN = (".csv", ".jsonl", ".parquet", ".json")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image to be scored."""

    path: str
    """How it is called in the scores file; unique, and text that any file can hold."""
    file: str
    """The file its bytes lie in, or the place that has the `problem`."""
    offset: int = -1
    """Where they begin in a tar; -1 if the file is the image."""
    size: int = -1
    """How many they are in a tar."""
    column: str = ""
    """The column of images they lie in, of a Parquet or Arrow file; the row is `offset`."""
    problem: str = ""
    """Why it cannot be read, if that is known already."""
    is_copy: bool = False
    """Whether the file is a copy in the cache, which is nobody's to move."""
    place: str = ""
    """The file without links and other spellings in its folder's path: what the image *is*."""

    @property
    def is_file(self) -> bool:
        """Whether the file is the image, so that it can be moved."""
        return self.offset < 0 and not self.problem and not self.is_copy

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            LmclError: If there is nothing to read.
        """
        if self.problem:
            raise LmclError(self.problem, exit_code=4)
        try:
            if self.column:
                from shards.datasets.pictures import read_picture

                return read_picture(Path(self.file), Embedded(column=self.column, row=self.offset))
            if self.offset < 0:
                return read_regular(self.file)
            return read_regular(self.file, offset=self.offset, size=self.size)
        except ShardError as error:
            raise LmclError(str(error), exit_code=error.exit_code) from error


def _say_nothing(line: str) -> None:
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How tables of paths are read."""

    path_column: str | None = None
    """Column of the paths; None finds it by its usual names."""
    images: Path | None = None
    """Folder that relative paths are relative to; None for the table's own."""
    tell: Callable[[str], None] = _say_nothing
    """Called with a line about a table that is no plain CSV."""


def list_items(
    arguments: Sequence[str],
    *,
    stdin: Iterator[str] | None = None,
    left_out: Sequence[Path] = (),
    tables: TableOptions | None = None,
    files: PathFilter | None = None,
    others: LeftOut | None = None,
) -> list[Item]:
    """All images, each once, in the order of the arguments and sorted inside each.

    Args:
        arguments: Paths, patterns, tables, tars, shard sets, or `-`.
        stdin: Lines for `-`.
        left_out: Files and folders that are passed over: what the job itself writes.
        tables: How tables are read.
        files: Which of them are taken, by their paths below the argument.
        others: Counts what is passed over because it is no image.

    Raises:
        ShardError: If a shard set cannot be used as one.
    """
    others, chosen = others or LeftOut(), files or PathFilter()
    is_left_out = _LeftOut(left_out, tables or TableOptions(), others)
    resolve = resolver()
    found: dict[tuple[str, int, str], Item] = {}
    for argument in arguments:
        expanded = _from_stdin(stdin or iter(()), is_left_out)
        above = text_of_name(Path(argument).as_posix()) + "/"
        for item in expanded if argument == "-" else _expand(argument, is_left_out):
            if not chosen.takes(item.path.removeprefix(above)):
                others.add_by_pattern()
                continue
            # The same bytes under another spelling are the same image; a link is its own.
            place = resolve(item.file)
            found.setdefault(
                (place, item.offset, item.path if item.problem else ""),
                dataclasses.replace(item, place=place),
            )
    return _named_apart(list(found.values()))


def text_of_name(text: str) -> str:
    """A name as text that any file can hold: bytes that are no UTF-8 are spelled out.

    One that a spreadsheet would take for a formula gets `./` in front, so it names the same file.
    """
    spelled = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return spreadsheet_path(spelled.replace("\0", "\\x00"))


def resolver() -> Callable[[str], str]:
    """Resolves a file's folder, but not the file: a link to an image is an image of its own."""
    folder_of = functools.cache(os.path.realpath)

    def resolve(file: str) -> str:
        if "\0" in file:
            return file
        folder, name = os.path.split(os.path.abspath(file))
        return os.path.join(folder_of(folder), name)

    return resolve


def _named_apart(items: list[Item]) -> list[Item]:
    """Different images of one name get names that tell them apart, wherever they stand.

    Two tables may each name their own `a.jpg`, and a tar may hold a name twice.
    """
    count = collections.Counter(item.path for item in items)
    taken = {path for path, times in count.items() if times == 1}
    apart = []
    for item in items:
        if count[item.path] == 1:
            apart.append(item)
            continue
        inside = f"{item.path} at {item.offset}"
        name = inside if item.offset >= 0 else text_of_name(Path(item.file).as_posix())
        path, number = name, 1
        while path in taken:
            number += 1
            path = f"{name} ({number})"
        taken.add(path)
        apart.append(dataclasses.replace(item, path=path))
    return apart


class _LeftOut:
    """Whether a path is one of some places or lies below one; how tables are read; what else is."""

    def __init__(self, places: Sequence[Path], tables: TableOptions, others: LeftOut) -> None:
        self._resolve = resolver()
        self._roots = tuple(os.path.join(self._resolve(str(place)), "") for place in places)
        self.tables = tables
        self._others = others
        self._counted = set[str]()

    def __call__(self, path: Path) -> bool:
        if not self._roots:
            return False
        return os.path.join(self._resolve(str(path)), "").startswith(self._roots)

    def count_other(self, path: str) -> None:
        """Count a file of another kind, once however often it is reached."""
        if path not in self._counted:
            self._counted.add(path)
            self._others.add(path)


def _from_stdin(lines: Iterator[str], is_left_out: _LeftOut) -> Iterator[Item]:
    line = ""
    for line in lines:
        if line.strip():
            yield from _expand(line.rstrip("\r\n"), is_left_out)
    if not line:
        yield _absent("-", "no path came on stdin")


def _expand(argument: str, is_left_out: _LeftOut) -> Iterator[Item]:
    if is_url(argument) and not argument.lower().startswith("file://"):
        yield from _from_url(argument, is_left_out)
        return
    path = Path(argument)
    if "\0" in argument:
        yield _absent(argument, "a NUL character stands in the path; no file can be called so")
        return
    if _is_url(argument):
        yield _url(argument)
        return
    if is_left_out(path):
        return
    # os.path answers False where pathlib raises: for what must not even be looked at.
    if os.path.lexists(path) or _is_denied(path):
        items = _from_place(path, is_left_out)
    else:
        items = _from_names(argument, is_left_out)
    first = next(items, None)
    yield first or _absent(path, "holds no image")
    yield from items


def _from_names(argument: str, is_left_out: _LeftOut) -> Iterator[Item]:
    """What a text stands for that is no file: braces, `A::B`, `@list.txt`, a pattern."""
    try:
        names = list(expand_names(argument))
    except ShardError as error:
        yield _absent(argument, str(error))
        return
    for name in names:
        if name != argument and os.path.lexists(name):
            yield from _from_place(Path(name), is_left_out)
        else:
            yield from _from_pattern(name, is_left_out)


def _from_place(path: Path, is_left_out: _LeftOut, *, tables: bool = True) -> Iterator[Item]:
    """What one name stands for, a folder or a file; a table is opened only if one was asked for."""
    if os.path.isdir(path):
        yield from _from_folder(path, is_left_out)
    elif path.name.lower().endswith(_TARS) and os.path.isfile(path):
        yield from _from_tar(path, is_left_out)
    elif path.suffix.lower() not in _TABLES or not os.path.isfile(path):
        yield _single(path)
    elif tables and is_plain_list(path):
        yield from _from_plain_list(path, is_left_out.tables)
    elif tables:
        yield from _from_table(path, is_left_out.tables)
    else:
        yield _absent(path, "a table; name it itself to score the images it lists")


def _from_folder(folder: Path, is_left_out: _LeftOut) -> Iterator[Item]:
    """Every file that may be an image; what is none after all becomes a row that says so."""
    if os.path.isfile(folder / MANIFEST):
        yield from _from_set(folder)
        return
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield _unreadable_folder(folder, error)
        return
    for entry in entries:
        path = folder / entry.name
        if _is_system_entry(entry) or is_left_out(path) or _is_scores_file(path):
            continue
        if _is_other(entry.name) and not entry.is_dir():
            is_left_out.count_other(str(path))
            continue
        if (twin := plain_twin(path)) is not None and twin.exists():
            # The same tar, which was unpacked beside itself.
            continue
        # A link to a folder may lead back up: links are followed to files only.
        if entry.is_symlink() and os.path.isdir(path):
            yield _single(path)
        elif entry.is_file(follow_symlinks=False) and not entry.name.lower().endswith(_TARS):
            # Asking the system about every file again would be slow on a network drive.
            yield Item(path=text_of_name(path.as_posix()), file=str(path))
        else:
            yield from _from_place(path, is_left_out, tables=False)


def _is_system_entry(entry: os.DirEntry[str]) -> bool:
    """Whether a file or a folder is the system's own: hidden, thumbnails, resource forks."""
    return is_side_file(entry.name) or (is_side_folder(entry.name) and entry.is_dir())


def _is_other(name: str) -> bool:
    """Whether a file among images is none, by its ending: a text, a table, a video."""
    ending = os.path.splitext(name)[1].lower()
    return ending in OTHER_ENDINGS and not name.lower().endswith(_TARS)


def _is_scores_file(path: Path) -> bool:
    """Whether it is what an earlier job has written; named itself, such a file is a table."""
    if path.suffix not in _WRITTEN:
        return False
    if path.name.endswith(_OWN) or os.path.isfile(f"{path}{_OWN[0]}"):
        return True
    return path.name == MOVES_NAME and is_moves_file(path)


def is_moves_file(path: Path) -> bool:
    """Whether a file is the record of an earlier `--move-to`, by its first line."""
    head = (",".join(MOVES_COLUMNS) + "\n").encode()
    try:
        with open_regular(path, limit_bytes=MAX_TABLE_BYTES) as file:
            return file.read(len(head)) == head
    except (ShardError, OSError):
        return False


def _single(path: Path) -> Item:
    """What stands under a name and is no folder of its own: a file, or the reason it is none."""
    try:
        if os.path.isfile(path):
            return Item(path=text_of_name(path.as_posix()), file=str(path))
        os.stat(path)
    except OSError as error:
        return _absent(path, _no_file(path, error))
    if path.is_symlink() and os.path.isdir(path):
        return _absent(
            path,
            f"a link to the folder {os.readlink(path)}, which is not followed; name that folder",
        )
    return _absent(path, "neither a file nor a folder")


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
        folder,
        f"the folder cannot be opened ({error.strerror}), no image in it was scored; "
        "check its rights and run again with --resume",
    )


def _from_pattern(argument: str, is_left_out: _LeftOut) -> Iterator[Item]:
    matches = [Path(match) for match in sorted(glob.glob(argument, recursive=True))]
    # `photos/*.txt` means these files; `photos/*` means images.
    is_open = not os.path.splitext(argument)[1] or glob.has_magic(os.path.splitext(argument)[1])
    asked = frozenset(Path(argument).parts) | _DOTS
    for path in matches:
        if is_left_out(path) or _is_scores_file(path):
            continue
        if is_open and any(
            is_side_file(p) or is_side_folder(p) for p in path.parts if p not in asked
        ):
            continue
        if is_open and _is_other(path.name) and not path.is_dir():
            is_left_out.count_other(str(path))
            continue
        # `photos/*` means images, whatever table lies among them; `lists/*.csv` means tables.
        yield from _from_place(path, is_left_out, tables=argument.lower().endswith(_TABLES))
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


def is_plain_list(file: Path) -> bool:
    """Whether a text holds a path of an image a line, and nothing else: no names of columns.

    A table has them in its first line, or numbers at the end of its lines.
    """
    if file.suffix.lower() not in _LISTS:
        return False
    try:
        paths = [path for _, path in itertools.islice(_lines_of(file), _LOOKED_AT)]
    except ShardError:
        return False
    return bool(paths) and all(map(_ends_as_picture, paths))


def _ends_as_picture(line: str) -> bool:
    return PurePosixPath(line).suffix.lower() in PICTURE_ENDINGS


def _from_plain_list(file: Path, options: TableOptions) -> Iterator[Item]:
    """A list's images: relative to the list or `--images`, else to where the command stands."""
    from shards.datasets.paths import DiskFinder
    from shards.datasets.remote_paths import RemotePaths

    finder = DiskFinder(options.images or file.parent)
    paths = functools.partial(_lines_of, file)
    remote = RemotePaths(lambda: (path for _, path in paths()))
    try:
        for number, path in paths():
            if finder.find(path) is None and os.path.isfile(path):
                yield Item(path=text_of_name(Path(path).as_posix()), file=path)
            else:
                yield _from_line(file, number, path, finder, remote)
    except ShardError as error:
        yield _absent(file, f"the list cannot be read: {error}")


def _lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines that are not blank."""
    # Names as the system has them: they need not be UTF-8.
    for number, line in enumerate(text_lines(file, errors="surrogateescape"), start=1):
        if line.strip():
            yield number, line.strip()


def _from_table(file: Path, options: TableOptions) -> Iterator[Item]:
    """A table's images; a relative path is meant relative to the table, or to `--images`."""
    # Here: it brings pyarrow, and most jobs name no table.
    from shards.datasets.paths import DiskFinder
    from shards.datasets.remote_paths import RemotePaths

    try:
        given = ColumnNames(path=options.path_column)
        table = open_rows(file, wanted=given.wanted())
        # Where a table holds images, a name beside them is only a name.
        holds = bool(table.pictures) and given.path is None
        column = (
            (table.pictures[0] if len(table.pictures) == 1 else None)
            or find_column(table.pictures, PATH, None, where=str(file))
            if holds
            else table.path_column(given.path)
        )
        assert column is not None
        if table.told:
            options.tell(f"{printable(file)}: read as {', '.join(table.told)}")
        if column in table.pictures:
            options.tell(f"{printable(file)}: images from its column {printable(column, 60)!r}")
            yield from _pictures(file, table, column)
            return
        finder = DiskFinder(options.images or file.parent, encoding=table.encoding)

        def cells() -> Iterator[str]:
            for number, row in table.rows():
                yield name_text(row.get(column), where=f"{file}: row {number}")

        remote = RemotePaths(cells)
        for number, row in table.rows():
            text = name_text(row.get(column), where=f"{file}: row {number}")
            yield _from_line(file, number, text, finder, remote)
    except ShardError as error:
        yield _absent(file, f"the table cannot be read: {error}")


def _pictures(file: Path, table: LabelTable, column: str) -> Iterator[Item]:
    for number, row in table.rows():
        cell = row.get(column)
        named = str((cell.get("path") if isinstance(cell, dict) else None) or f"row-{number:08d}")
        yield Item(
            path=text_of_name(f"{file.as_posix()}/{named}"),
            file=str(file),
            offset=number - 1,
            column=column,
        )


def _from_line(table: Path, number: int, path: str, finder: Any, remote: Any) -> Item:
    if not path:
        return _absent(f"{table.as_posix()}:{number}", f"line {number} of the table has no path")
    if "\0" in path:
        return _absent(path, "a NUL character stands in the path; no file can be called so")
    place = finder.find(path)
    if place is None:
        if is_url(path) and not path.lower().startswith("file:"):
            return _from_remote(path, remote)
        hint = finder.hint(path)
        if hint:
            return _absent(path, f"no such file; {hint}")
        return Item(path=text_of_name(path), file=str(finder.place(path)))
    # The table's own name, by which people join scores to it, unless only its bytes are the name.
    plain = place.name.isprintable()
    name = path if plain else PurePosixPath(path).with_name(place.name).as_posix()
    return Item(path=text_of_name(name), file=str(place))


def _from_remote(url: str, remote: Any) -> Item:
    """An image that a table names by its URL, from a copy in the cache."""
    found = remote.find(url)
    if isinstance(found, str):
        return _absent(url, found)
    return Item(path=text_of_name(shown_url(url)), file=str(found), is_copy=True)


def _from_url(url: str, left_out: _LeftOut) -> Iterator[Item]:
    """What lies behind a URL, from a copy in the cache; named by the URL."""
    try:
        if url_suffix(url) in TABLE_ENDINGS:
            yield from _from_remote_table(url, left_out.tables)
            return
        if not url_suffix(url) and Store(url).exists(MANIFEST):
            yield from _from_set(url)
            return
        if url_suffix(url):
            here = local_copy(url)
            items = (
                _from_tar(here, left_out) if here.name.endswith(_TARS) else iter([_single(here)])
            )
        else:
            here = local_folder(url, tell=left_out.tables.tell)
            items = _from_folder(here, left_out)
        for item in items:
            rest = item.path.removeprefix(here.as_posix())
            yield dataclasses.replace(item, path=shown_url(url).rstrip("/") + rest, is_copy=True)
    except ShardError as error:
        yield _absent(url, str(error))


def _from_remote_table(url: str, options: TableOptions) -> Iterator[Item]:
    from shards.datasets.table import table_paths

    here = local_copy(url)
    images = options.images
    names = table_paths(here, ColumnNames(path=options.path_column)) if images is None else []
    if names:
        images = local_folder(split_url(url)[0], names=names, tell=options.tell)
    for item in _from_table(here, dataclasses.replace(options, images=images)):
        path = item.path.replace(here.as_posix(), shown_url(url), 1)
        is_copy = item.is_copy or options.images is None
        yield dataclasses.replace(item, path=path, is_copy=is_copy)


def _from_tar(file: Path, is_left_out: _LeftOut) -> Iterator[Item]:
    try:
        with open_regular(file, limit_bytes=_MOST_TAR_BYTES) as opened:
            if kind := compression_of(opened.read(8)):
                how = unpack_command([file])
                reason = f"{kind}-compressed; members are read in place, so unpack it first"
                yield _absent(file, f"{reason}: `{how}`")
                return
            size_bytes = os.fstat(opened.fileno()).st_size
            for member in iterate_members(opened, size_bytes=size_bytes, where=str(file)):
                if is_side_path(member.name):
                    continue
                if not _is_picture(opened, member):
                    is_left_out.count_other(f"{file}/{member.name}")
                else:
                    yield Item(
                        path=text_of_name(f"{file.as_posix()}/{member.name}"),
                        file=str(file),
                        offset=member.offset,
                        size=member.size,
                    )
    except (ShardError, OSError) as error:
        yield _absent(file, f"the tar cannot be read: {error}")


def _is_picture(stream: BinaryIO, member: Member) -> bool:
    """Whether a member of a tar is an image: by its ending, or by its content if that is odd."""
    ending = PurePosixPath(member.name).suffix.lower()
    if ending in PICTURE_ENDINGS or ending in OTHER_ENDINGS:
        return ending in PICTURE_ENDINGS
    stream.seek(member.offset)
    kind = kind_of(stream.read(min(member.size, HEAD_BYTES)))
    return kind is not None and kind.is_picture


def _from_set(root: Path | str) -> Iterator[Item]:
    from shards.read import open_set

    shard_set = open_set(root)
    shown = root.as_posix() if isinstance(root, Path) else shown_url(root).rstrip("/")
    table = shard_set.samples
    for index in range(len(table)):
        name = text_of_name(f"{shown}/{table.path[index]}")
        if not table.ok[index] and table.shard[index] >= 0:
            continue  # withdrawn
        if not table.ok[index]:
            yield _absent(name, "rejected when the set was built (rejected.jsonl)")
            continue
        yield Item(
            path=name,
            file=str(shard_set.shard_path(int(table.shard[index]))),
            offset=int(table.offset[index]),
            size=int(table.size[index]),
        )


def _is_url(text: str) -> bool:
    return "://" in text and not os.path.lexists(text)


def _url(address: str) -> Item:
    """A row for what is not fetched; credentials in it are written nowhere."""
    shown = redact_url(address)
    problem = "a URL, and only files of this machine are scored; fetch it first"
    return Item(path=text_of_name(shown), file=shown, problem=problem)


def _absent(place: Path | str, problem: str) -> Item:
    is_remote = isinstance(place, str) and is_url(place)
    shown = shown_url(str(place)) if is_remote else Path(place).as_posix()
    file = shown if is_remote else str(place)
    return Item(path=text_of_name(shown), file=file, problem=printable(problem, 500))
