"""Anyone's own images: a folder and a table that scores them, in any format and dialect.

`open_table(labels, *, images=None, name="table", score=None, extra_files="error") -> DataSet`

Columns: `path` and `score` (or `mos`, `dmos` ...: `roles.py`), optional `std`, `group`, `split`,
`distortion`, `level`, `subset`. Paths are relative to the images folder. Without `group` every
image is its own. `metadata.csv` or `metadata.jsonl` of a Hugging Face image folder is found in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shards.datasets.files import FolderIndex, need_file, parse_score, refuse_unlabelled
from shards.datasets.paths import PathFinder
from shards.datasets.roles import (
    DISTORTION,
    GROUP,
    LEVEL,
    PATH,
    ROLES,
    SCORE,
    SPLIT,
    STD,
    SUBSET,
    ColumnNames,
    Role,
    find_column,
)
from shards.datasets.rows import LabelTable, Numbered, Row, open_rows
from shards.datasets.values import (
    NumberMarks,
    cell_text,
    column_key,
    is_missing,
    name_text,
    parse_number,
)
from shards.errors import ShardError
from shards.sample import DataSet, Facts, Sample
from shards.score_scale import ScoreScale
from shards.side_files import PathFilter
from shards.text import printable

ExtraFiles = Literal["error", "ignore"]
MissingFiles = Literal["error", "later"]

_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
_MOST_LEVEL = 2**31 - 1
"""The sample table keeps levels in 32 bits."""
_PARTS = {
    "": "",
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "validate": "val",
    "dev": "val",
    "development": "val",
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
    columns: ColumnNames | None = None,
    missing: MissingFiles = "later",
    files: PathFilter | None = None,
) -> DataSet:
    """Read a table of labels.

    Args:
        labels: A table (`rows.py` reads which), or the images folder with its `metadata.csv`.
        images: Folder the paths are relative to; default: the table's own.
        name: Short name of the set.
        score: Scale of the scores; default: a MOS from the smallest to the largest score found.
        extra_files: What to do about images that the table does not name.
        title: Full name.
        columns: Names of columns, where they are not the usual ones.
        missing: `error` refuses a table that names images which are not there; `later` leaves
            them to the build.
        files: Which images are looked at; rows that name others are left out.

    Raises:
        ShardError: If the table is missing, empty, or a row is not usable; names file and row.
    """
    labels = need_file(_table_file(labels), what="give the table with the columns path and score")
    folder = images or labels.parent
    index = FolderIndex(folder, files=files)
    if labels.parent == folder:
        index.left_out.forget(labels.name)
    finder = PathFinder(index)
    reading = _Reading.of(labels, columns or ColumnNames(), finder)
    low, high = _first_pass(reading, extra_files, missing)
    return DataSet(
        name=name,
        score=score or _observed(low, high, str(reading.columns[SCORE.name])),
        samples=lambda: _samples(reading),
        facts=Facts(title=title or f"Table {labels.name}", source=labels.name),
        notes=tuple(_notes(reading)),
        is_checked=True,
        left_out=index.left_out,
    )


def parse_part(text: object, *, where: str) -> str:
    """`train`, `val`, `test` or empty, from the words people use (`dev` is val).

    Raises:
        ShardError: If it is another word.
    """
    word = cell_text(text, where=where).lower()
    if word not in _PARTS:
        raise ShardError(
            f"{where}: part {printable(word, 60)!r} is none of train, val, test; correct the row, "
            "or name the column of parts with `--split-column` (none: there is none)",
            exit_code=3,
        )
    return _PARTS[word]


def _table_file(labels: Path) -> Path:
    """The table itself; of a folder its metadata, as Hugging Face lays them out."""
    if not labels.is_dir():
        return labels
    found = [labels / name for name in _METADATA if (labels / name).is_file()]
    if len(found) == 1:
        return found[0]
    what = " and ".join(file.name for file in found)
    raise ShardError(
        f"{printable(labels)}: is a folder "
        + (f"with {what}; name one of them" if found else "without metadata.csv; name the table"),
        exit_code=2 if found else 4,
    )


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A table, what its columns mean, and the folder its paths lie in."""

    table: LabelTable
    columns: dict[str, str | None]
    marks: NumberMarks
    finder: PathFinder

    @classmethod
    def of(cls, labels: Path, given: ColumnNames, finder: PathFinder) -> "_Reading":
        table = open_rows(labels, wanted=given.wanted())
        if next(table.rows(), None) is None:
            raise ShardError(
                f"{printable(labels)}: has no rows; a table needs a header and a row per image",
                exit_code=3,
            )
        columns = {
            role.name: find_column(table.names, role, given.given(role), where=str(labels))
            for role in ROLES
        }
        numbers = [columns[role.name] for role in (SCORE, STD, LEVEL)]
        marks = table.number_marks([column for column in numbers if column is not None])
        return cls(table=table, columns=columns, marks=marks, finder=finder)

    def cell(self, row: Row, role: Role) -> Any:
        """A row's cell in the column of a role; None if there is no such column."""
        column = self.columns[role.name]
        return None if column is None else row.get(column)

    def number(self, row: Row, role: Role) -> Any:
        """The same for numbers, written as programs write them."""
        return self.marks.plain(self.cell(row, role))


def _first_pass(
    reading: _Reading, extra_files: ExtraFiles, missing: MissingFiles
) -> tuple[float, float]:
    """Every row is checked before anything is packed."""
    low, high = math.inf, -math.inf
    absent = _Absent(reading)

    def names() -> Iterator[str]:
        nonlocal low, high
        for number, row in reading.table.rows():
            sample = _sample(reading, (number, row))
            if sample.mos is not None:
                low, high = min(low, sample.mos), max(high, sample.mos)
            absent.add(number, row, sample)
            yield sample.path

    def refuse() -> None:
        if absent.count and (missing == "error" or absent.count == absent.rows):
            raise absent.error()

    if extra_files == "ignore":
        for _ in names():
            pass
        refuse()
        return low, high
    refuse_unlabelled(
        reading.finder.index,
        names(),
        labels=reading.table.path.name,
        way_out="add rows for them, or pack only the labelled ones with `--extra-files ignore`",
        before=refuse,
    )
    return low, high


class _Absent:
    """Images that are labelled and not there."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading
        self._first: tuple[int, str] | None = None
        self.rows = self.count = 0

    def add(self, number: int, row: Row, sample: Sample) -> None:
        """Look whether the image of a row is there."""
        self.rows += 1
        index = self._reading.finder.index
        if index.position(sample.path) is None and not sample.file.is_file():
            self.count += 1
            if self._first is None:
                text = name_text(self._reading.cell(row, PATH), where="")
                self._first = (number, text)

    def error(self) -> ShardError:
        """What is missing, and the way out."""
        assert self._first is not None
        number, text = self._first
        finder, table = self._reading.finder, self._reading.table
        way_out = finder.hint(text) or (
            "complete the folder, name another with `--images`, or leave them out with "
            "`--on-error skip`"
        )
        told = f" (read as {', '.join(table.told)})" if table.told else ""
        return ShardError(
            f"{printable(table.path)}{told}: {self.count:,} of {self.rows:,} labelled images are "
            f"not there in {printable(finder.index.folder)}, first row {number}: "
            f"{printable(text)!r}; {way_out}",
            exit_code=3,
        )


def _samples(reading: _Reading) -> Iterator[Sample]:
    return (_sample(reading, numbered) for numbered in reading.table.rows())


def _sample(reading: _Reading, numbered: Numbered) -> Sample:
    number, row = numbered
    where = f"{printable(reading.table.path)}: row {number}"
    text = name_text(reading.cell(row, PATH), where=f"{where}: {reading.columns[PATH.name]}")
    if not text:
        raise ShardError(f"{where}: names no image; correct the row", exit_code=3)
    path, _ = reading.finder.find(text, where=where)
    group, distortion, subset = (
        cell_text(reading.cell(row, role), where=f"{where}: {role.name}")
        for role in (GROUP, DISTORTION, SUBSET)
    )
    return Sample(
        path=path,
        file=reading.finder.index.folder / path,
        mos=parse_score(reading.number(row, SCORE), where=where),
        mos_std=_spread(reading.number(row, STD), reading.columns[STD.name], where),
        group=group if group != "" else path,
        distortion=distortion,
        level=_level(reading.number(row, LEVEL), where),
        subset=subset,
        part=parse_part(reading.cell(row, SPLIT), where=where),
        row=number,
    )


def _notes(reading: _Reading) -> Iterator[str]:
    """One line each: how the table was read, and what became of its columns and paths."""
    told = list(reading.table.told)
    if reading.marks.decimal == ",":
        told.append("decimal commas")
    told += [
        f"{role.name} from the column {printable(column, 60)!r}"
        for role in ROLES
        if (column := reading.columns[role.name]) is not None
        and column_key(column) not in (role.name, *_PLAIN_SCORES)
    ]
    finder = reading.finder
    if finder.num_shortened:
        told.append(
            f"{finder.index.folder.name!r} taken off the front of paths such as "
            f"{printable(finder.shortened, 80)!r}"
        )
    if told:
        yield f"{printable(reading.table.path.name)}: read as {', '.join(told)}"


_PLAIN_SCORES = ("mos", "dmos")


def _observed(low: float, high: float, column: str) -> ScoreScale:
    if low == high:
        low, high = low - 0.5, high + 0.5
    key = column_key(column)
    is_difference = "dmos" in key or "differen" in key
    return ScoreScale(
        kind="dmos" if is_difference else "mos",
        low=low,
        high=high,
        higher_is_better=not is_difference,
    )


def _spread(value: object, column: str | None, where: str) -> float | None:
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
