r"""Paths in a table, matched to the files of a folder, however they are spelled.

A table made elsewhere names `photos/a.jpg` for the file `a.jpg` of the folder `photos`,
`C:\Users\me\photos\a.jpg`, `file:///data/photos/a%20b.jpg`, or a name in quotes. All of these are
looked up in the folder's index and nowhere else, so no path leads out of the folder.
"""

import os
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from shards.datasets.files import FolderIndex, folded
from shards.errors import ShardError
from shards.text import printable

_DRIVE = re.compile(r"(?:[A-Za-z]:/|//[^/]+/)")
_QUOTES = {'"': '"', "'": "'", "`": "`", "\u201c": "\u201d", "\u00ab": "\u00bb"}
_PARENTS = 3


def spellings(text: str) -> Iterator[str]:
    """What a cell may mean as a posix path, the most literal first."""
    yield (plain := _posix(text))
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        yield (plain := _posix(text[1:-1].strip()))
    if plain.lower().startswith("file:"):
        url = urllib.parse.unquote(plain[5:], errors="surrogateescape")
        path = re.sub(r"\A//(localhost)?(?=/)", "", url, flags=re.IGNORECASE)
        yield path[1:] if _DRIVE.match(path[1:]) and path[1:2].isalpha() else path


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
        spelled = (os.path.abspath(index.folder), os.path.realpath(index.folder))
        self._roots = tuple(dict.fromkeys(_parts(Path(root).as_posix()) for root in spelled))
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
        path = found[-1]
        for rest in self._rests(path):
            if (name := self.index.find(rest)) is not None:
                self.shortened = self.shortened or text
                self.num_shortened += 1
                return name, True
        if is_absolute(path):
            inside = self._below(path)
            if inside is None:
                raise self._outside(text, where)
            return inside, False
        return path, False

    def hint(self, text: str) -> str:
        """What to do about a path that is not in the folder, as the end of a sentence; or empty."""
        path = list(spellings(text))[-1]
        relative = _DRIVE.sub("", path).lstrip("/")
        return (
            self._hint_parent(relative) or self._hint_below(relative) or self._hint_base(relative)
        )

    def _below(self, path: str) -> str | None:
        """The relative path of an absolute one below the folder."""
        parts = _parts(path)
        for root in self._roots:
            if parts[: len(root)] == root and len(parts) > len(root):
                return "/".join(PurePosixPath(path).parts[-(len(parts) - len(root)) :])
        return None

    def _rests(self, path: str) -> Iterator[str]:
        """What is left of a path without the folder's own name, the longest first."""
        written = [part for part in path.split("/") if part]
        parts = _parts(path)
        foreign = is_absolute(path)
        if foreign and (inside := self._below(path)) is not None:
            yield inside
        for root in self._roots:
            if not foreign:
                for count in range(1, len(parts)):
                    if parts[:count] == root[-count:]:
                        yield "/".join(written[count:])
            elif root:
                for place in range(len(parts) - 1):
                    if parts[place] == root[-1]:
                        yield "/".join(written[place + 1 :])

    def _outside(self, text: str, where: str) -> ShardError:
        hint = self.hint(text)
        way_out = f"give paths relative to {printable(self.index.folder)}"
        return ShardError(
            f"{where}: {printable(text)!r} is not inside the images folder; {hint or way_out}",
            exit_code=3,
        )

    def _hint_parent(self, relative: str) -> str:
        if leads_out(relative) or not relative:
            return ""
        folder = Path(os.path.abspath(self.index.folder))
        for parent in list(folder.parents)[:_PARENTS]:
            if (parent / relative).is_file():
                return f"did you mean `--images {printable(_shown(parent))}`?"
        return ""

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


def _shown(path: Path) -> str:
    """Relative where it lies below the current folder."""
    try:
        return Path(os.path.abspath(path)).relative_to(Path.cwd()).as_posix()
    except (ValueError, OSError):
        return path.as_posix()


def _parts(path: str) -> tuple[str, ...]:
    return tuple(folded(part) for part in path.split("/") if part not in ("", "."))
