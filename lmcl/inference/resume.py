"""Resume a scoring: which rows stay, which images are scored again, and in which order they stand.

Rows are matched by the file they are about, not by how it is spelled on the command line. Rows of
images that are not named stay; a good row is replaced by a newer good one only.
"""

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence

from lmcl.inference.inputs import Item, resolver
from lmcl.inference.scores_file import Entry, JournalRows, Source, is_name_key, key_of, name_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowOrder:
    """The rows of an output, in order."""

    keys: list[str]
    others: int
    """How many of them are of images that were not named."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResumePlan:
    """What is scored, and what an earlier job has done already."""

    keys: list[str]
    """The row of each item, there already or yet to be written."""
    todo: list[int]
    """Places of the items that are scored."""
    absent: list[int]
    """Places of the items whose row is kept although there is no such file now."""
    changed: int
    """How many of `todo` were scored before, when their file was another."""
    superseded: frozenset[str]
    """Keys of rows that are replaced by one under another key."""
    keeps_others: bool
    """Whether rows of images that are not named stay."""

    def order(self, rows: JournalRows) -> RowOrder:
        """The order of the file; a new image stands after the one that it follows by name."""
        named = set(self.keys)
        others = [
            key
            for key, entry in rows.entries.items()
            if self.keeps_others
            and key not in named
            and key not in self.superseded
            and not entry.is_listing
        ]
        kept = named | set(others)
        base = [key for key in rows.base_keys if key in kept] if self.keeps_others else []
        order = _merge(base, list(dict.fromkeys(self.keys)))
        order += [key for key in others if key not in set(base)]
        return RowOrder(keys=order, others=len(others))


def plan_resume(before: JournalRows, items: Sequence[Item], *, keeps_others: bool) -> ResumePlan:
    """Match items with the rows of earlier jobs, and decide which are scored."""
    known = _Known(before)
    keys, todo, absent, changed = [], [], [], 0
    superseded = set()
    for place, item in enumerate(items):
        key = known.find(item)
        entry = before.entries.get(key)
        if entry is None or entry.is_failed:
            todo.append(place)
            if key != item_key(item):
                superseded.add(key)
            key = item_key(item)
        elif item.problem or not os.path.exists(item.file):
            absent.append(place)
        elif not _is_unchanged(entry, item):
            todo.append(place)
            changed += 1
            key = item_key(item)
        keys.append(key)
    return ResumePlan(
        keys=keys,
        todo=todo,
        absent=absent,
        changed=changed,
        superseded=frozenset(superseded),
        keeps_others=keeps_others,
    )


def item_key(item: Item) -> str:
    """The key of an item's row."""
    return key_of(item.place or os.path.abspath(item.file), item.offset)


def source_of(item: Item) -> Source:
    """What a row says of the file it is about."""
    size, mtime_ns = _stat(item.file)
    is_listing = bool(item.problem) and not os.path.isfile(item.file)
    return Source(
        file=item.file,
        place=item.place or os.path.abspath(item.file),
        offset=item.offset,
        size=size,
        mtime_ns=mtime_ns,
        is_listing=is_listing,
    )


def after_move(source: Source, moves: Mapping[str, str]) -> Source:
    """A source with the place that `--move-to` has given its file, if it still lies there."""
    new = moves.get(source.place)
    if new is None or source.offset >= 0 or _stat(new) != (source.size, source.mtime_ns):
        return source
    if _stat(source.place) == (source.size, source.mtime_ns):
        return source
    return dataclasses.replace(source, place=new, moved_from=source.place)


def name_rows(rows: JournalRows, keys: Sequence[str]) -> list[str]:
    """A name of its own for every row: two images of one name are called by their files."""
    count = collections.Counter(rows.entries[key].path for key in keys)
    taken = {path for path, times in count.items() if times == 1}
    names = []
    for key in keys:
        path = rows.entries[key].path
        if count[path] > 1:
            base = path if is_name_key(key) else _file_of(key)
            path, number = base, 1
            while path in taken:
                number += 1
                path = f"{base} ({number})"
            taken.add(path)
        names.append(path)
    return names


def _file_of(key: str) -> str:
    offset, _, place = key.partition(":")
    place = place.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return place if offset == "-1" else f"{place} at {offset}"


class _Known:
    """Finds the row of an item among those of earlier jobs."""

    def __init__(self, rows: JournalRows) -> None:
        self._rows = rows
        resolve = resolver()
        # Rows of earlier versions say no more than a path, as it was spelled.
        self._places = {
            resolve(entry.path): key for key, entry in rows.entries.items() if is_name_key(key)
        }

    def find(self, item: Item) -> str:
        """The key of its row, or of the row it will get."""
        key = item_key(item)
        if key in self._rows.entries:
            return key
        for other in (self._rows.moved.get(key), name_key(item.path)):
            if other is not None and self._fits(other, item):
                return other
        return self._places.get(item.place, key) if item.offset < 0 else key

    def _fits(self, key: str, item: Item) -> bool:
        """Whether a row found by the place its image had, or by its name, is about this image."""
        entry = self._rows.entries.get(key)
        if entry is None or entry.is_listing:
            return False
        return not os.path.exists(item.file) or _is_unchanged(entry, item)


def _is_unchanged(entry: Entry, item: Item) -> bool:
    # What earlier versions wrote has no size and no time.
    return entry.size < 0 or (entry.size, entry.mtime_ns) == _stat(item.file)


def _stat(file: str) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except (OSError, ValueError):
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _merge(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Both, each once: the order of `old`, and the rest of `new` after what it follows there."""
    there = set(old)
    leading: dict[str, list[str]] = {}
    following: dict[str, list[str]] = collections.defaultdict(list)
    pending: list[str] = []
    last = None
    for key in new:
        if key in there:
            if pending:
                leading[key], pending = pending, []
            last = key
        elif last is None:
            pending.append(key)
        else:
            following[last].append(key)
    merged = []
    for key in old:
        merged += [*leading.get(key, ()), key, *following.get(key, ())]
    return merged + pending
