"""Splits that others published, brought in by the names of images and never by their position.

`import_splits(shard_set, source, *, names=None, column=None, shift_rows=0) -> list[Split]`

* Tables: a column of paths and columns named `split` (`part`, `set`), in any format and dialect.
* pyiqa: split columns of a `meta_info_*.csv`, or its older pickle (which needs the csv as `names`).
  Its 802 splits call the held-out part `val`; it becomes `test`, and the note says so.
* ARNIQA: a folder with `train.npy`, `val.npy`, `test.npy`, one row per repeat. Rows are padded with
  -1, which indexing takes for the last image; the padding is stripped and counted. `names` lists
  the images in the order the numbers mean.
* LIQE and others: a folder with `*train*.txt`, `*val*.txt`, `*test*.txt`, one image per line.
"""

import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from shards.datasets.files import IMAGE_ENDINGS
from shards.datasets.pyiqa import MetaRow, read_meta
from shards.datasets.roles import PATH, SPLIT, ColumnNames, find_column
from shards.datasets.rows import TABLE_ENDINGS, open_rows
from shards.datasets.table import parse_part
from shards.datasets.values import cell_text, column_key, name_text, parse_number
from shards.errors import ShardError
from shards.read import ShardSet
from shards.source_files import read_regular, read_text
from shards.splits.pickles import MAX_PICKLE_BYTES, load_plain_pickle
from shards.splits.split import PARTS, Split, check_split, split_from_ids
from shards.text import printable

_NUMBERED = {0.0: "train", 1.0: "val", 2.0: "test"}
_MOST_ROWS = 20_000_000
_MOST_TABLE = 1 << 28


class Names:
    """Finds a set's images by the names others use: the longest matching end of the path wins."""

    def __init__(self, shard_set: ShardSet) -> None:
        self._set = shard_set
        self._by_end: dict[str, int] = {}
        self._doubtful: set[str] = set()
        paths = shard_set.samples.path
        for id in shard_set.ids().tolist():
            parts = str(paths[id]).lower().split("/")
            for start in range(len(parts)):
                end = "/".join(parts[start:])
                if end in self._by_end:
                    self._doubtful.add(end)
                self._by_end[end] = id

    def find(self, name: str) -> int | None:
        """The id of an image, or None.

        Raises:
            ShardError: If the name fits several images.
        """
        parts = name.strip().lower().replace("\\", "/").split("/")
        for start in range(len(parts)):
            end = "/".join(parts[start:])
            if end in self._doubtful:
                raise ShardError(
                    f"{printable(name)!r} fits several images of {self._set.name}; the list "
                    "must give the folder too",
                    exit_code=3,
                )
            if end in self._by_end:
                return self._by_end[end]
        return None


def import_splits(
    shard_set: ShardSet,
    source: Path,
    *,
    names: Path | None = None,
    column: str | None = None,
    shift_rows: int = 0,
    allow_missing: bool = False,
    path_column: str | None = None,
) -> list[Split]:
    """Read published splits.

    Args:
        shard_set: The set they are for.
        source: The csv, pickle or folder.
        names: List of images that numbers in a pickle or `.npy` refer to: a meta csv or a text
            file with one image per line.
        column: Which split column; default: all of them.
        shift_rows: Take the part of row r from row r - `shift_rows`: 7 repeats what pyiqa's loader
            does on the LIVE Challenge, where it drops rows but not their parts.
        allow_missing: Accept names that the set does not hold, for a part of a set.
        path_column: Column of the images' names in a table; default: found by its usual names.

    Raises:
        ShardError: If the format is not known, a name is not in the set, or a split leaks.
    """
    if source.is_dir() and (source / "train.npy").is_file():
        drawn = _from_arniqa(source, _name_list(names, source))
    elif source.is_dir():
        drawn = [_from_lists(source)]
    elif source.suffix.lower() in TABLE_ENDINGS and source.exists():
        rows = _table_rows(source, path_column)
        drawn = _from_columns(rows, source, column, shift_rows)
    elif source.suffix in {".pkl", ".pickle"}:
        drawn = _from_pickle(source, _name_list(names, source))
    elif not source.exists():
        raise ShardError(f"{source}: there is no such file or folder", exit_code=4)
    else:
        raise ShardError(
            f"{source}: not a known kind of split; give a table (meta_info_*.csv), a pickle, a "
            "folder with train.npy, or a folder with train, val and test lists",
            exit_code=2,
        )
    finder = Names(shard_set)
    return [
        _resolve(shard_set, finder, item, number, source, allow_missing)
        for number, item in enumerate(drawn)
    ]


class _Named:
    """A published split, still as names."""

    def __init__(self, name: str, parts: dict[str, list[str]], note: str = "") -> None:
        self.name = name
        self.parts = parts
        self.note = note


def _resolve(
    shard_set: ShardSet, finder: Names, item: _Named, index: int, source: Path, allow_missing: bool
) -> Split:
    _refuse_empty(item, source)
    ids: list[np.ndarray[Any, np.dtype[np.int64]]] = []
    missing: list[str] = []
    for part in PARTS:
        found = [(name, finder.find(name)) for name in item.parts.get(part, [])]
        missing += [name for name, id in found if id is None]
        ids.append(np.unique(np.array([id for _, id in found if id is not None], np.int64)))
    if missing and not allow_missing:
        raise ShardError(
            f"{source}: {len(missing):,} images of the split {item.name!r} are not in "
            f"{shard_set.root}, first {printable(', '.join(missing[:3]), 300)}; is it the "
            "split of this set? A part of a set needs `--allow-missing`",
            exit_code=3,
        )
    notes = [item.note] if item.note else []
    if missing:
        notes.append(f"{len(missing):,} images of the list are not in this set")
    left = len(shard_set) - sum(part.size for part in ids)
    if left:
        notes.append(f"{left:,} images of this set are in no part of the list")
    for part, numbers in zip(PARTS, ids, strict=True):
        if numbers.size == 0 and len(item.parts.get(part, [])) > 0:
            raise ShardError(
                f"{source}: none of the {len(item.parts[part]):,} {part} images of the "
                f"split {printable(item.name, 80)!r} is in this set; nothing could be learned or "
                "judged",
                exit_code=3,
            )
    split = split_from_ids(
        shard_set, f"imported-{_slug(item.name)}", index, ids, note="; ".join(notes)
    )
    return check_split(shard_set, split, where=str(source))


def _refuse_empty(item: _Named, source: Path) -> None:
    for part in ("train", "test"):
        if len(item.parts.get(part, [])) == 0:
            counts = ", ".join(f"{name} {len(item.parts.get(name, [])):,}" for name in PARTS)
            raise ShardError(
                f"{source}: the split {printable(item.name, 80)!r} leaves {part} empty "
                f"({counts}); is its coding another one, or the file cut short?",
                exit_code=3,
            )


def _table_rows(source: Path, path_column: str | None) -> list[MetaRow]:
    """Rows of any table of images; of pyiqa's meta files by their positions."""
    if path_column is None and source.stem.lower().startswith("meta_info"):
        return read_meta(source)
    given = ColumnNames(path=path_column)
    table = open_rows(source, wanted=given.wanted())
    column = find_column(table.names, PATH, given.path, where=str(source))
    assert column is not None
    rows = [
        MetaRow(
            path=name_text(row.get(column), where=f"{source}: row {number}"),
            reference="",
            score="",
            columns={
                name: cell_text(row.get(name), where=f"{source}: row {number}")
                for name in table.names
                if _is_split_name(name)
            },
        )
        for number, row in table.rows()
    ]
    if not rows:
        raise ShardError(f"{printable(source)}: has no rows", exit_code=3)
    return rows


def _is_split_name(name: str) -> bool:
    return "split" in name.lower() or column_key(name) in SPLIT.keys


def _from_columns(
    rows: Sequence[MetaRow], source: Path, column: str | None, shift_rows: int
) -> list[_Named]:
    known = [name for name in rows[0].columns if _is_split_name(name)]
    if column is not None:
        column = next((name for name in known if name.lower() == column.lower()), column)
    if column is not None and column not in known:
        raise ShardError(
            f"{source}: no split column {column!r}; there are {', '.join(known) or 'none'}",
            exit_code=2,
        )
    if not known:
        raise ShardError(
            f"{source}: has no column whose name contains `split`; give a table with one, e.g. "
            "official_split of a meta_info_*.csv",
            exit_code=3,
        )
    return [_column(rows, source, name, shift_rows) for name in known if column in (None, name)]


def _column(rows: Sequence[MetaRow], source: Path, name: str, shift_rows: int) -> _Named:
    if shift_rows < 0:
        raise ShardError(f"rows are shifted by 0 or more, not by {shift_rows}", exit_code=2)
    where = f"{source}: {printable(name, 80)}"
    words = [row.columns.get(name, "").strip() for row in rows]
    numbers = _numbers(words, where)
    parts: dict[str, list[str]] = {part: [] for part in PARTS}
    for number in range(shift_rows, len(rows)):
        word = words[number - shift_rows]
        part = (
            numbers[word]
            if word in numbers
            else parse_part(word, where=f"{where}, row {number + 2}")
        )
        if part != "":
            parts[part].append(rows[number].path)
    note = f"parts as pyiqa's loader shifts them by {shift_rows} rows" if shift_rows else ""
    return _held_out_is_test(_Named(name, parts, note))


def _numbers(words: Sequence[str], where: str) -> dict[str, str]:
    """What numbers in a column mean; empty if it holds words.

    Raises:
        ShardError: If the numbers are others than 0, 1 and 2, or start at another one.
    """
    found = {word: parse_number(word) for word in set(words) if not math.isnan(parse_number(word))}
    strange = sorted(word for word, value in found.items() if value not in _NUMBERED)
    if found and (strange or 0.0 not in found.values()):
        raise ShardError(
            f"{where}: parts are numbered {printable(', '.join(sorted(found)), 80)}, which is not "
            "0 = train, 1 = val, 2 = test; write the words train, val and test",
            exit_code=3,
        )
    return {word: _NUMBERED[value] for word, value in found.items()}


def _held_out_is_test(item: _Named) -> _Named:
    if len(item.parts["test"]) > 0 or len(item.parts["val"]) == 0:
        return item
    moved = {"train": item.parts["train"], "val": [], "test": item.parts["val"]}
    said = "the list calls the held-out part `val`; it is `test` here, and nothing selects"
    return _Named(item.name, moved, "; ".join(note for note in (item.note, said) if note))


def _from_pickle(source: Path, names: list[str]) -> list[_Named]:
    data = read_regular(source, limit_bytes=MAX_PICKLE_BYTES)
    content = load_plain_pickle(data, where=str(source))
    if not isinstance(content, dict):
        raise ShardError(f"{source}: holds no dictionary of splits", exit_code=3)
    found, rows = [], 0
    for key, parts in content.items():
        where = f"{source}: split {printable(key, 60)}"
        if not isinstance(parts, dict):
            raise ShardError(f"{where}: holds no parts", exit_code=3)
        lists = {part: parts.get(part, []) for part in PARTS}
        if not all(isinstance(numbers, list | tuple) for numbers in lists.values()):
            raise ShardError(f"{where}: a part is no list of row numbers", exit_code=3)
        # Many splits may share one list, and a file be small.
        rows += sum(map(len, lists.values()))
        if rows > _MOST_ROWS:
            raise ShardError(f"{where}: more than {_MOST_ROWS:,} row numbers", exit_code=3)
        named = {part: _pick(names, lists[part], where) for part in PARTS}
        found.append(_held_out_is_test(_Named(f"{source.stem}-{printable(key, 60)}", named)))
    return found


def _from_arniqa(folder: Path, names: list[str]) -> list[_Named]:
    tables = {part: _load_npy(folder / f"{part}.npy") for part in PARTS}
    repeats = {part: table.shape[0] for part, table in tables.items()}
    if len(set(repeats.values())) != 1:
        raise ShardError(
            f"{folder}: parts have different numbers of repeats {repeats}", exit_code=3
        )
    found = []
    for index in range(repeats["train"]):
        padding = sum(int((table[index] == -1).sum()) for table in tables.values())
        parts = {
            part: _pick(names, table[index][table[index] != -1], f"{folder}: repeat {index}")
            for part, table in tables.items()
        }
        note = f"{padding} entries of -1 were padding and are stripped" if padding else ""
        found.append(_Named(f"{folder.name}-{index:02d}", parts, note))
    return found


def _load_npy(path: Path) -> np.ndarray[Any, Any]:
    data = read_regular(path, limit_bytes=_MOST_TABLE)
    try:
        # From memory: a header that promises more than the file holds is found out while reading.
        table = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:
        # Its header is Python source, which fails in many ways (tokenize.TokenError ...).
        raise ShardError(
            f"{path}: not readable as .npy ({printable(error)})", exit_code=4
        ) from error
    if not isinstance(table, np.ndarray):
        raise ShardError(f"{path}: an archive, not a table of numbers", exit_code=3)
    if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
        raise ShardError(
            f"{path}: {table.dtype} of shape {table.shape}, not one row of numbers per repeat",
            exit_code=3,
        )
    return np.asarray(table)


def _from_lists(folder: Path) -> _Named:
    parts: dict[str, list[str]] = {}
    for part in PARTS:
        files = sorted(path for path in folder.glob("*.txt") if part in path.name.lower())
        if len(files) > 1:
            raise ShardError(
                f"{folder}: {len(files)} lists for {part}; give a folder with one of each",
                exit_code=3,
            )
        parts[part] = [
            line.replace(",", "\t").split("\t")[0].strip()
            for file in files
            for line in read_text(file, limit_bytes=_MOST_TABLE).splitlines()
            if line.strip() != ""
        ]
    if len(parts["train"]) == 0 or len(parts["test"]) == 0:
        raise ShardError(f"{folder}: has no *train*.txt and *test*.txt", exit_code=4)
    return _Named(folder.name, parts)


def _name_list(names: Path | None, source: Path) -> list[str]:
    if names is None:
        raise ShardError(
            f"{source}: holds row numbers, which mean nothing without the list they count; give "
            "it with `--names` (a meta_info_*.csv, or a text file with one image per line)",
            exit_code=2,
        )
    if names.suffix.lower() in TABLE_ENDINGS and names.suffix.lower() != ".txt":
        return [row.path for row in _table_rows(names, None)]
    text = read_text(names, limit_bytes=_MOST_TABLE)
    lines = [line.replace(",", "\t").split("\t")[0].strip() for line in text.rstrip().splitlines()]
    if lines and (lines[0].startswith("dis_img_path") or _is_header(lines)):
        del lines[0]
    if "" in lines:
        raise ShardError(
            f"{names}: line {lines.index('') + 1} or the one after it names no image, "
            "so what the numbers count is not known; remove empty lines",
            exit_code=3,
        )
    return lines


def _is_header(lines: Sequence[str]) -> bool:
    """Whether the first line is a title: it has no ending of an image, and all others have one."""
    endings = [PurePosixPath(line.lower()).suffix in IMAGE_ENDINGS for line in lines]
    return len(endings) > 1 and endings[0] is False and all(endings[1:])


def _pick(names: list[str], rows: Iterable[Any], where: str) -> list[str]:
    picked = []
    for row in rows:
        if isinstance(row, bool) or not isinstance(row, int | np.integer):
            raise ShardError(
                f"{where}: {printable(row, 60)!r} ({type(row).__name__}) is no row number; rows "
                "are whole numbers",
                exit_code=3,
            )
        if not 0 <= int(row) < len(names):
            raise ShardError(
                f"{where}: row {int(row)} is not in 0 .. {len(names) - 1}", exit_code=3
            )
        picked.append(names[int(row)])
    return picked


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "_-" else "-" for letter in name)
