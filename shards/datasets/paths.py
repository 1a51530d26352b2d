r"""Paths in a table, matched to the files of a folder, however they are spelled.

A table made elsewhere names `photos/a.jpg` for the file `a.jpg` of the folder `photos`,
`C:\Users\me\photos\a.jpg`, `file:///data/photos/a%20b.jpg`, `a%20b.jpg`, or a name in quotes.
All of these are looked up in the folder's index and nowhere else, so no path leads out of it.
"""

import functools
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path

from shards.datasets.dialect import raw_name
from shards.datasets.files import FolderIndex, folded
from shards.errors import ShardError
from shards.text import printable

_DRIVE = re.compile(r"(?:[A-Za-z]:/|//[^/]+/)")
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u00ab": "\u00bb"}
_PARENTS = 3
_FOLDERS = 64


def spellings(text: str) -> Iterator[str]:
    """What a cell may mean as a posix path, the most literal first."""
    yield (plain := _posix(text))
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        yield (plain := _posix(text[1:-1].strip()))
    if plain.lower().startswith("file:"):
        url = urllib.parse.unquote(plain[5:], errors="surrogateescape")
        path = re.sub(r"\A//(localhost)?(?=/)", "", url, flags=re.IGNORECASE)
        yield path[1:] if _DRIVE.match(path[1:]) and path[1:2].isalpha() else path
    elif (decoded := urllib.parse.unquote(plain, errors="surrogateescape")) != plain:
        yield _posix(decoded)


def is_absolute(path: str) -> bool:
    """Whether a posix path begins at a root, of this machine, a drive or a server."""
    return path.startswith("/") or _DRIVE.match(path) is not None


def leads_out(path: str) -> bool:
    """Whether a posix path holds `..` or a NUL."""
    return ".." in path.split("/") or "\0" in path


def _posix(text: str) -> str:
    path = text.strip().replace("\\", "/")
    while path.startswith("./"):
        path = path[2:].lstrip("/")
    return path


class PathFinder:
    """Finds files of one folder by the paths of a table."""

    def __init__(self, index: FolderIndex) -> None:
        self.index = index
        self._roots = _roots_of(index.folder)
        self.num_shortened = 0
        """Paths of which a front was taken off."""
        self.shortened = ""
        """The first of them."""

    def find(self, text: str, *, where: str) -> tuple[str, bool]:
        """The relative name a path means, and whether there is such a file in the index.

        Args:
            text: A cell.
            where: Its row, for messages.

        Raises:
            ShardError: If it names something outside the folder.
        """
        found = list(spellings(text))
        for path in found:
            if leads_out(path):
                raise self._outside(text, where)
            if not is_absolute(path) and (name := self.index.find(path)) is not None:
                return name, True
        for path in found:
            for rest in _rests(path, self._roots):
                if (name := self.index.find(rest)) is not None:
                    self.shortened = self.shortened or text
                    self.num_shortened += 1
                    return name, True
        path = found[-1]
        if is_absolute(path):
            inside = _below(path, self._roots)
            if inside is None:
                raise self._outside(text, where)
            return inside, False
        return path, False

    def hint(self, text: str) -> str:
        """What to do about a path that is not in the folder, as the end of a sentence; or empty."""
        path = list(spellings(text))[-1]
        relative = _DRIVE.sub("", path).lstrip("/")
        return self._hint_above(relative) or self._hint_below(relative) or self._hint_base(relative)

    def _outside(self, text: str, where: str) -> ShardError:
        hint = self.hint(text)
        way_out = f"give paths relative to {printable(self.index.folder)}"
        return ShardError(
            f"{where}: {printable(text)!r} is not inside the images folder; {hint or way_out}",
            exit_code=3,
        )

    def _hint_above(self, relative: str) -> str:
        return _hint_parent(relative, list(Path(os.path.abspath(self.index.folder)).parents))

    def _hint_below(self, relative: str) -> str:
        end = "/" + folded(relative)
        found = next((n for n in self.index.names() if folded(n).endswith(end)), None)
        if found is None:
            return ""
        below = found[: len(found) - len(end)] or found.rpartition("/")[0]
        return f"did you mean `--images {printable(_shown(self.index.folder / below))}`?"

    def _hint_base(self, relative: str) -> str:
        base = folded(relative.rpartition("/")[2])
        stem, names = os.path.splitext(base)[0], None
        for name in self.index.names():
            other = folded(name.rpartition("/")[2])
            if other == base:
                front = relative[: len(relative) - len(base)]
                return (
                    f"the folder holds {printable(name)!r}: take {printable(front)!r} off the "
                    "paths in the table, or name the folder like that"
                )
            if os.path.splitext(other)[0] == stem:
                names = names or name
        if names is None:
            return ""
        return f"the folder holds {printable(names)!r}: write its ending in the table"


class DiskFinder:
    """Finds files by the paths of a table that may name any file of this machine (`lmcl score`)."""

    def __init__(self, folder: Path, *, encoding: str = "") -> None:
        """Relative paths are relative to `folder`; `encoding` is the table's, if it is text."""
        self._folder = folder
        self._roots = _roots_of(folder)
        self._is_foreign = encoding not in ("", "utf-8-sig") and not encoding.startswith("utf")
        self._encoding = encoding
        self._listed = functools.lru_cache(maxsize=_FOLDERS)(_names_in)

    def find(self, text: str) -> Path | None:
        """The file a path means; None if there is none."""
        tried = [text, *spellings(text)]
        if self._is_foreign:
            # Names need not be UTF-8 on disk, so a table of them need not be either.
            tried.append(raw_name(text, self._encoding))
        tried += _rests(tried[-1], self._roots)
        usable = [path for path in tried if path.strip() and "\0" not in path]
        for path in usable:
            if os.path.lexists(self._folder / path):
                return self._folder / path
        return next((found for path in usable if (found := self._in_any_case(path))), None)

    def place(self, text: str) -> Path:
        """Where a file should lie that is not there."""
        return self._folder / next(spellings(text))

    def hint(self, text: str) -> str:
        """What to do about a path that is not there; or empty."""
        path = list(spellings(text))[-1]
        relative = _DRIVE.sub("", path).lstrip("/")
        here = Path(os.path.abspath(self._folder))
        return _hint_parent(relative, [Path.cwd(), *here.parents]) or (
            "the table's text is not UTF-8; save it as UTF-8" if self._is_foreign else ""
        )

    def _in_any_case(self, path: str) -> Path | None:
        place = self._folder / path
        name = self._listed(str(place.parent)).get(folded(place.name))
        return place.parent / name if name is not None else None


def _names_in(folder: str) -> dict[str, str]:
    """Names of a folder by how they are compared; those that cannot be told apart are left out."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    found: dict[str, str] = {}
    twice = set[str]()
    for name in names:
        twice |= {folded(name)} & found.keys()
        found[folded(name)] = name
    return {key: name for key, name in found.items() if key not in twice}


def _roots_of(folder: Path) -> tuple[tuple[str, ...], ...]:
    spelled = (os.path.abspath(folder), os.path.realpath(folder))
    return tuple(dict.fromkeys(_parts(Path(root).as_posix()) for root in spelled))


def _below(path: str, roots: Iterable[tuple[str, ...]]) -> str | None:
    """The relative path of an absolute one below a folder."""
    parts = _parts(path)
    for root in roots:
        if parts[: len(root)] == root and len(parts) > len(root):
            written = [part for part in path.split("/") if part not in ("", ".")]
            return "/".join(written[len(root) :])
    return None


def _rests(path: str, roots: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """What is left of a path without the folder's own name, the longest first."""
    written = [part for part in path.split("/") if part not in ("", ".")]
    parts = _parts(path)
    foreign = is_absolute(path)
    if foreign and (inside := _below(path, roots)) is not None:
        yield inside
    for root in roots:
        if foreign and root:
            places = [place for place in range(len(parts) - 1) if parts[place] == root[-1]]
            yield from ("/".join(written[place + 1 :]) for place in places)
        elif not foreign:
            counts = [count for count in range(1, len(parts)) if parts[:count] == root[-count:]]
            yield from ("/".join(written[count:]) for count in counts)


def _hint_parent(relative: str, folders: list[Path]) -> str:
    if leads_out(relative) or not relative:
        return ""
    for folder in folders[: _PARENTS + 1]:
        if (folder / relative).is_file():
            return f"did you mean `--images {printable(_shown(folder))}`?"
    return ""


def _shown(path: Path) -> str:
    """Relative where it lies below the current folder."""
    try:
        return Path(os.path.abspath(path)).relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.as_posix()


def _parts(path: str) -> tuple[str, ...]:
    return tuple(folded(part) for part in path.split("/") if part not in ("", "."))
