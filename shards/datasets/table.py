"""Anyone's own images: a folder and a CSV, TSV, JSONL, Parquet or xlsx file that scores them.

`open_table(labels, *, images=None, name="table", score=None, extra_files="error") -> DataSet`

Columns: `path` and `score` (or `mos`, `dmos`), optional `std`, `group`, `split`, `distortion`,
`level`, `subset`. Paths are relative to the images folder. Without `group` every image is its own.
"""

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from shards.datasets.excel import read_sheet
from shards.datasets.files import FolderIndex, need_file, parse_score, refuse_unlabelled
from shards.datasets.parquet import read_parquet
from shards.datasets.values import (
    cell_text,
    is_missing,
    name_text,
    one_name_each,
    one_of,
    parse_number,
)
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample
from shards.score_scale import ScoreScale
from shards.source_files import text_lines
from shards.text import printable

ExtraFiles = Literal["error", "ignore"]
Row = Mapping[str, Any]
Rows = Callable[[], Iterator[Row]]

_PATH = ("path", "file", "filename", "image", "image_name", "image name", "img_name", "name")
_SCORE = ("score", "mos", "dmos")
_STD = ("std", "mos_std", "sd")
_READ_BY_CHILDREN = frozenset({".parquet", ".xlsx"})
_HELD_BYTES = 1 << 24
_MOST_LEVEL = 2**31 - 1
"""The sample table keeps levels in 32 bits."""
_PART = ("split", "part", "set")
_PARTS = {
    "": "",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


def open_table(
    labels: Path,
    *,
    images: Path | None = None,
    name: str = "table",
    score: ScoreScale | None = None,
    extra_files: ExtraFiles = "error",
    title: str = "",
) -> DataSet:
    """Read a table of labels.

    Args:
        labels: `.csv`, `.tsv`, `.jsonl`, `.parquet` or `.xlsx` (first sheet).
        images: Folder the paths are relative to; default: the table's own.
        name: Short name of the set.
        score: Scale of the scores; default: a MOS from the smallest to the largest score found.
        extra_files: What to do about images that the table does not name.
        title: Full name.

    Raises:
        ShardError: If the table is missing, empty, or a row is not usable; names file and row.
    """
    need_file(labels, what="give the table with the columns path and score")
    folder = images or labels.parent
    index = FolderIndex(folder)
    rows = _replayable(labels)
    columns = _Columns(labels, rows)
    low, high = _first_pass(labels, rows, columns, index, extra_files)
    return DataSet(
        name=name,
        score=score or _observed(low, high, columns.score),
        samples=lambda: _samples(labels, rows, columns, index),
        facts=Facts(title=title or f"Table {labels.name}", source=labels.name),
    )


def parse_part(text: object, *, where: str) -> str:
    """`train`, `val`, `test` or empty, from the words people use.

    Raises:
        ShardError: If it is another word.
    """
    word = cell_text(text, where=where).lower()
    if word not in _PARTS:
        raise ShardError(
            f"{where}: part {printable(word, 60)!r} is none of train, val, test; correct the row",
            exit_code=3,
        )
    return _PARTS[word]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table as mappings with lower-case column names, whatever the format.

    Raises:
        ShardError: If the file cannot be read as what its ending says, or two columns have one
            name.
    """
    ending = path.suffix.lower()
    if ending in {".csv", ".tsv", ".txt"}:
        yield from _csv_rows(path, "\t" if ending == ".tsv" else ",")
    elif ending in {".jsonl", ".ndjson"}:
        yield from _json_rows(path)
    elif ending == ".parquet":
        yield from read_parquet(path)
    elif ending == ".xlsx":
        yield from _sheet_rows(path)
    else:
        raise ShardError(
            f"{printable(path)}: a table ends in .csv, .tsv, .jsonl, .parquet or .xlsx", exit_code=2
        )


def _replayable(labels: Path) -> Rows:
    """Rows as often as they are wanted; a small file that a child reads is read once."""
    if labels.suffix.lower() in _READ_BY_CHILDREN and labels.stat().st_size <= _HELD_BYTES:
        held = list(read_rows(labels))
        return lambda: iter(held)
    return lambda: read_rows(labels)


class _Columns:
    """Which column plays which part, found from the first row."""

    def __init__(self, labels: Path, rows: Rows) -> None:
        first = next(iter(rows()), None)
        if first is None:
            raise ShardError(
                f"{printable(labels)}: has no rows; a table needs a header and a row per image",
                exit_code=3,
            )
        where = str(labels)
        self.path = self._need(first, _PATH, where)
        self.score = self._need(first, _SCORE, where)
        self.std = one_of(first, _STD, where=where)
        self.part = one_of(first, _PART, where=where)

    @staticmethod
    def _need(columns: Row, names: tuple[str, ...], where: str) -> str:
        found = one_of(columns, names, where=where)
        if found is None:
            raise ShardError(
                f"{printable(where)}: no column {names[0]!r} (or {', '.join(names[1:])}) among "
                f"{printable(', '.join(sorted(columns)), 400) or 'no columns'}; name the "
                "columns in the first line",
                exit_code=3,
            )
        return found


def _first_pass(
    labels: Path, rows: Rows, columns: _Columns, index: FolderIndex, extra_files: ExtraFiles
) -> tuple[float, float]:
    """Every row is checked before anything is packed."""
    low, high = math.inf, -math.inf

    def names() -> Iterator[str]:
        nonlocal low, high
        for sample in _samples(labels, rows, columns, index):
            if sample.mos is not None:
                low, high = min(low, sample.mos), max(high, sample.mos)
            yield sample.path

    if extra_files == "ignore":
        for _ in names():
            pass
    else:
        refuse_unlabelled(
            index,
            names(),
            labels=labels.name,
            way_out="add rows for them, or pack only the labelled ones with `--extra-files ignore`",
        )
    return low, high


def _samples(labels: Path, rows: Rows, columns: _Columns, index: FolderIndex) -> Iterator[Sample]:
    for number, row in enumerate(rows(), start=2):
        where = f"{printable(labels)}: row {number}"
        path = name_text(row.get(columns.path), where=f"{where}: {columns.path}")
        path = path.replace("\\", "/")
        if not path:
            raise ShardError(f"{where}: names no image; correct the row", exit_code=3)
        if path.startswith("/") or ".." in path.split("/") or "\0" in path:
            raise ShardError(
                f"{where}: {printable(path)!r} is not inside the images folder; give paths "
                f"relative to {printable(index.folder)}",
                exit_code=3,
            )
        group, distortion, subset = (
            cell_text(row.get(name), where=f"{where}: {name}")
            for name in ("group", "distortion", "subset")
        )
        yield Sample(
            path=index.find(path) or path,
            file=index.path(path),
            mos=parse_score(row.get(columns.score), where=where),
            mos_std=_spread(row, columns.std, where),
            group=group if group != "" else path,
            distortion=distortion,
            level=_level(row.get("level"), where),
            subset=subset,
            part=parse_part(row.get(columns.part) if columns.part else "", where=where),
        )


def _observed(low: float, high: float, column: str) -> ScoreScale:
    if low == high:
        low, high = low - 0.5, high + 0.5
    is_difference = column == "dmos"
    return ScoreScale(
        kind="dmos" if is_difference else "mos",
        low=low,
        high=high,
        higher_is_better=not is_difference,
    )


def _spread(row: Row, column: str | None, where: str) -> float | None:
    value = row.get(column) if column else None
    if is_missing(value):
        return None
    spread = parse_score(value, where=where)
    if spread < 0:
        raise ShardError(
            f"{where}: {column} {printable(value, 60)!r} is negative, and a deviation is not; "
            "correct it, or leave the field empty",
            exit_code=3,
        )
    return spread


def _level(value: object, where: str) -> int | None:
    if is_missing(value):
        return None
    level = parse_number(value)
    if not (0 <= level <= _MOST_LEVEL and level.is_integer()):
        raise ShardError(
            f"{where}: level {printable(value, 60)!r} is no whole number from 0 to "
            f"{_MOST_LEVEL:,}; correct it, or leave the field empty",
            exit_code=3,
        )
    return int(level)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(text_lines(path), delimiter=delimiter, strict=True)
    try:
        header = one_name_each(next(reader, []), where=str(path))
        for number, cells in enumerate(reader, start=2):
            if all(cell.strip() == "" for cell in cells):
                continue
            if len(cells) != len(header):
                raise ShardError(
                    f"{printable(path)}: row {number} has {len(cells)} cells, the header "
                    f"{len(header)}; put names with commas in double quotes",
                    exit_code=3,
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ShardError(
            f"{printable(path)}: cannot be read as {path.suffix} after line {reader.line_num} "
            f"({printable(error)})",
            exit_code=3,
        ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip() == "":
            continue
        where = f"{printable(path)}: line {number}"
        try:
            row = json.loads(line, object_pairs_hook=_Pairs)
        except (ValueError, RecursionError) as error:
            raise ShardError(f"{where} is not JSON ({printable(error)})", exit_code=3) from error
        if not isinstance(row, _Pairs):
            raise ShardError(f"{where} is not a JSON object", exit_code=3)
        names = one_name_each((name for name, _ in row.pairs), where=where)
        yield dict(zip(names, (value for _, value in row.pairs), strict=True))


class _Pairs(dict[str, Any]):
    """A JSON object that remembers names which stand in it twice."""

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.pairs = pairs


def _sheet_rows(path: Path) -> Iterator[Row]:
    rows = read_sheet(path)
    _, names = next(rows, (0, []))
    header = one_name_each(names, where=str(path))
    for number, cells in rows:
        if len(cells) > len(header):
            raise ShardError(
                f"{printable(path)}: row {number} has {len(cells)} cells, the header {len(header)}",
                exit_code=3,
            )
        yield dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=True))
