"""What the readers share: finding files whatever their case, and refusing labels that are none."""

import array
import math
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from shards.datasets.dialect import dialect_rows, recognise
from shards.datasets.roles import KNOWN_KEYS, PATH
from shards.datasets.values import parse_number
from shards.errors import ShardError
from shards.image_kinds import HEAD_BYTES, kind_of
from shards.sample_table import group_key
from shards.side_files import (
    OTHER_ENDINGS,
    PACKED_ENDINGS,
    PICTURE_ENDINGS,
    LeftOut,
    PathFilter,
    is_side_file,
    is_side_folder,
)
from shards.source_files import need_regular, open_regular, read_text
from shards.text import printable

IMAGE_ENDINGS = PACKED_ENDINGS

CORRECT: Final = "correct the row, or remove it"
"""What helps where a cell of a row is wrong."""

_MOST_TEXT = 256 << 20
_DEVIATION_MARKS = ("±", "+/-", "+-", "(")
_LARGEST_SCORE = 1e100
"""Squares of larger ones, summed over a set, leave the range of float64."""


class FolderIndex:
    """Files below a folder, found by relative name in any case and Unicode form.

    Unpackers and label files disagree about upper and lower case, and a Mac spells `é` as two
    characters; names are compared in lower case and NFC, and two files that then have the same
    name are refused rather than mixed up. Names lie in one
    block of bytes behind sorted hashes: ten million of them take half a gigabyte, not three.
    """

    def __init__(
        self,
        folder: Path,
        *,
        endings: Iterable[str] = IMAGE_ENDINGS,
        files: PathFilter | None = None,
    ) -> None:
        if not folder.is_dir():
            raise ShardError(
                f"{folder}: there is no such folder; give the folder with the unpacked images",
                exit_code=4,
            )
        self.folder = folder
        self.left_out = LeftOut()
        """What else lies there."""
        wanted, taken = frozenset(endings), files or PathFilter()
        block, starts, hashes = bytearray(), array.array("q", [0]), array.array("q")
        for name in _walk(folder, left_out=self.left_out):
            if not taken.takes(name):
                self.left_out.add_by_pattern()
            elif not _is_wanted(folder, name, wanted):
                self.left_out.add(name)
            else:
                block += _encoded(folder, name)
                starts.append(len(block))
                hashes.append(group_key(folded(name)))
        self._block = bytes(block)
        self._starts = np.frombuffer(starts, np.int64)
        self._order = np.argsort(np.frombuffer(hashes, np.int64), kind="stable")
        self._hashes = np.frombuffer(hashes, np.int64)[self._order]
        self._refuse_collisions()

    def __len__(self) -> int:
        return len(self._hashes)

    def position(self, name: str) -> int | None:
        """Number of the file on disk that matches `name` in any case and form, or None."""
        wanted = folded(name.replace("\\", "/").removeprefix("./"))
        key = group_key(wanted)
        place = int(np.searchsorted(self._hashes, key))
        while place < len(self) and self._hashes[place] == key:
            number = int(self._order[place])
            if folded(self.name(number)) == wanted:
                return number
            place += 1
        return None

    def name(self, position: int) -> str:
        """Relative name of a file by its number."""
        return self._block[self._starts[position] : self._starts[position + 1]].decode()

    def find(self, name: str) -> str | None:
        """The relative name on disk that matches `name` in any case and form, or None."""
        position = self.position(name)
        return None if position is None else self.name(position)

    def path(self, name: str) -> Path:
        """Where `name` lies; where it should lie if it is not there."""
        return self.folder / (self.find(name) or name)

    def names(self) -> Iterator[str]:
        """Relative names on disk: files of a folder by name, then its folders by name."""
        return (self.name(number) for number in range(len(self)))

    def _refuse_collisions(self) -> None:
        same = np.flatnonzero(self._hashes[1:] == self._hashes[:-1])
        for place in same.tolist():
            one, other = (self.name(int(self._order[k])) for k in (place, place + 1))
            if folded(one) == folded(other):
                how = (
                    "upper and lower case"
                    if one.lower() == other.lower() or one.isascii()
                    else "the Unicode form of their letters (NFC, NFD) or in case"
                )
                raise ShardError(
                    f"{self.folder}: {one!a} and {other!a} differ only in {how}, so "
                    "labels cannot be told apart; keep one of them",
                    exit_code=3,
                )


def folded(name: str) -> str:
    """A name as it is compared: in lower case, and with each letter in one Unicode form."""
    lower = name.lower()
    return lower if lower.isascii() else unicodedata.normalize("NFC", lower)


def _encoded(folder: Path, name: str) -> bytes:
    try:
        return name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ShardError(
            f"{folder}: the file name {name!r} is not UTF-8, so no label file can name it; rename "
            "it",
            exit_code=3,
        ) from error


def by_base_name(index: FolderIndex) -> dict[str, str]:
    """Lower-case base name to relative name, for sets that are repacked into other folders.

    Raises:
        ShardError: If two folders hold files of the same name.
    """
    found: dict[str, str] = {}
    for name in index.names():
        base = name.rpartition("/")[2].lower()
        if base in found:
            raise ShardError(
                f"{index.folder}: {found[base]!r} and {name!r} have the same name in two folders; "
                "keep one copy of the images",
                exit_code=3,
            )
        found[base] = name
    return found


def parse_score(text: object, *, where: str) -> float:
    """A finite number, or an error that says where it is not one.

    Raises:
        ShardError: If the text is empty, no number, NaN, infinite, or too large to be squared.
    """
    value = parse_number(text)
    if not math.isfinite(value):
        shown = str(text).strip()
        raise ShardError(
            f"{where}: score {printable(shown, 60)!r} is not a finite number; "
            f"{_way_out_of(shown) or CORRECT}",
            exit_code=3,
        )
    if abs(value) > _LARGEST_SCORE:
        raise ShardError(
            f"{where}: score {printable(text, 60)!r} is beyond {_LARGEST_SCORE:g}, so that no "
            f"deviation of the scores could be computed; {CORRECT}",
            exit_code=3,
        )
    return value


def _way_out_of(text: str) -> str:
    """What helps if a score is written with more than its number; empty if that is not seen."""
    if text.endswith("%") and _is_number(text[:-1]):
        return "take the percent signs off the whole column"
    for mark in _DEVIATION_MARKS:
        mean, found, spread = text.partition(mark)
        if found and _is_number(mean) and _is_number(spread.rstrip(")")):
            return (
                "a mean with its deviation: write the deviations into a column of their own, "
                "`std` (`--std-column` names another)"
            )
    upper, slash, lower = text.partition("/")
    if slash and _is_number(upper) and _is_number(lower):
        return f"a fraction: write its number alone in the whole column ({upper.strip()!r})"
    if text != (bare := text.strip("'\"`\u2018\u2019\u201c\u201d")) and _is_number(bare):
        return "a number in quotation marks: take them off the whole column"
    return ""


def _is_number(text: str) -> bool:
    return math.isfinite(parse_number(text))


def refuse_unlabelled(
    index: FolderIndex,
    labelled: Iterable[str],
    *,
    labels: str,
    way_out: str,
    before: Callable[[], None] | None = None,
) -> None:
    """Refuse images that no label names.

    Args:
        index: The images.
        labelled: Relative names that have a label, in any case.
        labels: Name of the label file.
        way_out: What the user can do.
        before: Called when all labels were seen: what else is wrong is said first.

    Raises:
        ShardError: Naming the first of them.
    """
    seen = np.zeros(len(index), bool)
    for name in labelled:
        position = index.position(name)
        if position is not None:
            seen[position] = True
    if before is not None:
        before()
    extra = np.flatnonzero(~seen)
    if extra.size:
        first = ", ".join(repr(index.name(int(number))) for number in extra[:3])
        raise ShardError(
            f"{index.folder}: {extra.size:,} images have no label in {labels}, first {first}; "
            f"{way_out}",
            exit_code=3,
        )


def need_file(path: Path, *, what: str) -> Path:
    """The path itself, if there is such a file.

    Raises:
        ShardError: With exit code 4 if not.
    """
    return need_regular(path, what=what)


def read_label_text(path: Path) -> str:
    """A label file as text, of at most 256 MB.

    Raises:
        ShardError: If it is no such text.
    """
    return read_text(path, limit_bytes=_MOST_TEXT)


def csv_rows(path: Path) -> Iterator[list[str]]:
    """Rows of a table of text by position, in any dialect; blank ones are left out.

    Raises:
        ShardError: If it cannot be read as one.
    """
    # Every path is read whole by its callers.
    with open_regular(path, limit_bytes=_MOST_TEXT):
        dialect = recognise(path, known=KNOWN_KEYS, wanted=PATH.keys)
    yield from (cells for _, cells in dialect_rows(path, dialect))


def find_one(root: Path, names: Iterable[str], *, what: str) -> Path:
    """A label file by any of its names, in the folder or up to three folders below it.

    Raises:
        ShardError: If there is no such folder or file (exit code 4).
    """
    if not root.is_dir():
        raise ShardError(f"{root}: there is no such folder; give {what}", exit_code=4)
    wanted = [name.lower() for name in names]
    found: dict[str, str] = {}
    for name in _walk(root, depth=3):
        base = name.rpartition("/")[2].lower()
        if base in wanted:
            found.setdefault(base, name)
    for name in wanted:
        if name in found:
            return root / found[name]
    raise ShardError(
        f"{root}: none of the label files {', '.join(names)} is here or up to three folders "
        f"below; give {what}",
        exit_code=4,
    )


def _is_wanted(folder: Path, name: str, wanted: frozenset[str]) -> bool:
    """Whether a file is one of the wanted kinds: by its ending, by its content if that is odd."""
    ending = os.path.splitext(name)[1].lower()
    if ending in wanted:
        return True
    if wanted != IMAGE_ENDINGS or ending in OTHER_ENDINGS or ending in PICTURE_ENDINGS:
        return False
    try:
        with open_regular(folder / name) as stream:
            kind = kind_of(stream.read(HEAD_BYTES))
    except (ShardError, OSError):
        return False
    return kind is not None and kind.is_packed


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        # A link to itself is nothing that a label could mean.
        return False


def _walk(
    folder: Path, *, depth: int = 64, prefix: str = "", left_out: LeftOut | None = None
) -> Iterator[str]:
    """Relative names of files, sorted, shallow ones first; no side files, no linked folders."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ShardError(f"{folder}: cannot be listed ({error.strerror})") from error
    for entry in entries:
        if not is_side_file(entry.name) and _is_file(entry):
            yield prefix + entry.name
    for entry in entries:
        if is_side_folder(entry.name):
            continue
        below = f"{prefix}{entry.name}/"
        if depth and entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), depth=depth - 1, prefix=below, left_out=left_out)
        elif left_out is not None and entry.is_symlink() and os.path.isdir(entry.path):
            left_out.add_link(f"{prefix}{entry.name}")
