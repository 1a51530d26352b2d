"""Anyone's own images: a folder and a CSV, TSV, JSONL or Parquet file that scores them.

`open_table(labels, *, images=None, name="table", score=None, extra_files="error") -> DataSet`

Columns: `path` and `score` (or `mos`, `dmos`), optional `std`, `group`, `split`, `distortion`,
`level`, `subset`. Paths are relative to the images folder. Without `group` every image is its own.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from shards.datasets.files import FolderIndex, need_file, parse_score, refuse_unlabelled
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample, Score

ExtraFiles = Literal["error", "ignore"]
Row = Mapping[str, Any]

_PATH = ("path", "file", "filename", "image", "image_name", "image name", "img_name", "name")
_SCORE = ("score", "mos", "dmos")
_STD = ("std", "mos_std", "sd")
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
    score: Score | None = None,
    extra_files: ExtraFiles = "error",
    title: str = "",
) -> DataSet:
    """Read a table of labels.

    Args:
        labels: `.csv`, `.tsv`, `.jsonl` or `.parquet`.
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
    columns = _Columns(labels)
    low, high = _first_pass(labels, columns, index, extra_files)
    return DataSet(
        name=name,
        score=score or _observed(low, high, columns.score),
        samples=lambda: _samples(labels, columns, index),
        facts=Facts(title=title or f"Table {labels.name}", source=labels.name),
    )


def parse_part(text: object, *, where: str) -> str:
    """`train`, `val`, `test` or empty, from the words people use.

    Raises:
        ShardError: If it is another word.
    """
    word = "" if text is None else str(text).strip().lower()
    if word not in _PARTS:
        raise ShardError(
            f"{where}: part {str(text)!r} is none of train, val, test; correct the row",
            exit_code=3,
        )
    return _PARTS[word]


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a table as mappings with lower-case column names, whatever the format.

    Raises:
        ShardError: If the file cannot be read as what its ending says.
    """
    ending = path.suffix.lower()
    try:
        if ending in {".csv", ".tsv", ".txt"}:
            yield from _csv_rows(path, "\t" if ending == ".tsv" else ",")
        elif ending in {".jsonl", ".ndjson"}:
            yield from _json_rows(path)
        elif ending == ".parquet":
            for batch in pq.ParquetFile(path).iter_batches():
                yield from (_lower(row) for row in batch.to_pylist())
        else:
            raise ShardError(f"{path}: a table ends in .csv, .tsv, .jsonl or .parquet", exit_code=2)
    except (OSError, UnicodeError, csv.Error, pa.ArrowException, ValueError) as error:
        raise ShardError(f"{path}: cannot be read as {ending} ({error})", exit_code=3) from error


class _Columns:
    """Which column plays which part, found from the first row."""

    def __init__(self, labels: Path) -> None:
        first = next(iter(read_rows(labels)), None)
        if first is None:
            raise ShardError(
                f"{labels}: has no rows; a table needs a header and a row per image", exit_code=3
            )
        names = set(first)
        self.path = self._need(labels, names, _PATH)
        self.score = self._need(labels, names, _SCORE)
        self.std = next((name for name in _STD if name in names), None)
        self.part = next((name for name in _PART if name in names), None)

    @staticmethod
    def _need(labels: Path, names: set[str], wanted: tuple[str, ...]) -> str:
        for name in wanted:
            if name in names:
                return name
        raise ShardError(
            f"{labels}: no column {wanted[0]!r} (or {', '.join(wanted[1:])}) among "
            f"{', '.join(sorted(names)) or 'no columns'}; name the columns in the first line",
            exit_code=3,
        )


def _first_pass(
    labels: Path, columns: _Columns, index: FolderIndex, extra_files: ExtraFiles
) -> tuple[float, float]:
    """Every row is checked before anything is packed."""
    low, high = math.inf, -math.inf

    def names() -> Iterator[str]:
        nonlocal low, high
        for sample in _samples(labels, columns, index):
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


def _samples(labels: Path, columns: _Columns, index: FolderIndex) -> Iterator[Sample]:
    for number, row in enumerate(read_rows(labels), start=2):
        where = f"{labels}: row {number}"
        path = str(row.get(columns.path) or "").strip().replace("\\", "/")
        if not path:
            raise ShardError(f"{where}: names no image; correct the row", exit_code=3)
        if path.startswith("/") or ".." in path.split("/"):
            raise ShardError(
                f"{where}: {path!r} is not inside the images folder; give paths relative to "
                f"{index.folder}",
                exit_code=3,
            )
        yield Sample(
            path=index.find(path) or path,
            file=index.path(path),
            mos=parse_score(row.get(columns.score), where=where),
            mos_std=_spread(row, columns.std, where),
            group=str(row.get("group") or path),
            distortion=str(row.get("distortion") or ""),
            level=_level(row.get("level"), where),
            subset=str(row.get("subset") or ""),
            part=parse_part(row.get(columns.part) if columns.part else "", where=where),
        )


def _observed(low: float, high: float, column: str) -> Score:
    if low == high:
        low, high = low - 0.5, high + 0.5
    is_difference = column == "dmos"
    return Score(
        kind="dmos" if is_difference else "mos",
        low=low,
        high=high,
        higher_is_better=not is_difference,
    )


def _spread(row: Row, column: str | None, where: str) -> float | None:
    value = row.get(column) if column else None
    if value is None or str(value).strip() == "":
        return None
    spread = parse_score(value, where=where)
    if spread < 0:
        raise ShardError(
            f"{where}: {column} {str(value)!r} is negative, and a deviation is not; correct it, or "
            "leave the field empty",
            exit_code=3,
        )
    return spread


def _level(value: object, where: str) -> int | None:
    if value is None or str(value).strip() == "":
        return None
    try:
        level = float(str(value))
    except ValueError:
        level = math.nan
    if not (0 <= level <= _MOST_LEVEL and level.is_integer()):
        raise ShardError(
            f"{where}: level {str(value)!r} is no whole number from 0 to {_MOST_LEVEL:,}; correct "
            "it, or leave the field empty",
            exit_code=3,
        )
    return int(level)


def _csv_rows(path: Path, delimiter: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        for number, cells in enumerate(reader, start=2):
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise ShardError(
                    f"{path}: row {number} has {len(cells)} cells, the header {len(header)}; put "
                    "names with commas in double quotes",
                    exit_code=3,
                )
            yield dict(zip(header, cells, strict=True))


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ShardError(
                    f"{path}: line {number} is not JSON ({error})", exit_code=3
                ) from error
            if not isinstance(row, dict):
                raise ShardError(f"{path}: line {number} is not a JSON object", exit_code=3)
            yield _lower(row)


def _lower(row: Mapping[str, Any]) -> Row:
    return {str(name).strip().lower(): value for name, value in row.items()}
