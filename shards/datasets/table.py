"""Anyone's own images: a folder and a table that scores them, in any format and dialect.

`open_table(labels, *, images=None, name="table", score=None, extra_files="error") -> DataSet`

Columns: `path` and `score` (or `mos`, `dmos` ...: `roles.py`), optional `std`, `group`, `split`,
`distortion`, `level`, `subset`. Paths are relative to the images folder. Without `group` every
image is its own. `metadata.csv` or `metadata.jsonl` of a Hugging Face image folder is found in it.
"""

import array
import math
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from shards.datasets.files import (
    CORRECT,
    FolderIndex,
    need_file,
    parse_score,
    refuse_unlabelled,
)
from shards.datasets.paths import PathFinder, is_absolute, leads_out, spellings
from shards.datasets.remote_paths import RemotePaths, is_remote, name_of_url
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
from shards.errors import MOST_PROBLEMS, ShardError, several_problems
from shards.sample import DataSet, Embedded, Facts, Sample
from shards.sample_table import group_key
from shards.score_scale import ScoreScale
from shards.side_files import PathFilter
from shards.source_files import text_lines
from shards.text import printable

ExtraFiles = Literal["error", "ignore"]
MissingFiles = Literal["error", "later", "ignore"]
BadRows = Literal["error", "later", "refuse"]

_WANTED = "give the table with the columns path and score"
_PICTURES = (".parquet", ".arrow")
_NAMELESS = "row-"
_FILE_OF_PART = re.compile(r"(train|training|val|valid|validation|dev|test)(?=[-_.])", re.I)
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
    bad_rows: BadRows = "error",
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
            them to the build, unless all are missing; `ignore` does not look.
        files: Which images are looked at; rows that name others are left out.
        bad_rows: What to do about rows without a usable score or path: `error` refuses them and
            says how to leave them out, `refuse` does not say it, as where that is no way out;
            `later` makes them samples with a problem, which the build puts into `rejected.jsonl`.

    Raises:
        ShardError: If the table is missing or empty, or rows are not usable; names file and rows.
    """
    tables = [need_file(file, what=_WANTED) for file in _table_files(labels)]
    opened = _open_all(tables, columns or ColumnNames(), images, files)
    low, high = _range_of([_first_pass(one, extra_files, missing, bad_rows) for one in opened])
    readings = [_with_names_of_rows(one, len(opened)) for one in opened]
    finder = readings[0].finder
    return DataSet(
        name=name,
        score=score or _observed(low, high, str(readings[0].columns[SCORE.name])),
        samples=lambda: (sample for reading in readings for sample in _samples(reading)),
        facts=Facts(title=title or f"Table {labels.name}", source=labels.name),
        notes=tuple(_notes(readings[0])),
        is_checked=True,
        left_out=None if finder is None else finder.index.left_out,
    )


def table_paths(labels: Path, columns: ColumnNames | None = None) -> list[str]:
    """Relative paths that a table may mean, to be fetched; none if it holds its images itself.

    Raises:
        ShardError: If there is no such table, or no column of paths in it.
    """
    given = columns or ColumnNames()
    table = open_rows(labels, wanted=given.wanted())
    if _holds_images(table, given):
        return []
    column = table.path_column(given.path)
    return [
        path
        for number, row in table.rows()
        for spelling in spellings(name_text(row.get(column), where=f"{labels}: row {number}"))
        # A server compares bytes; a Mac's tables hold letters in parts (NFD), few file names do.
        for path in dict.fromkeys((spelling, unicodedata.normalize("NFC", spelling)))
        if path and not is_absolute(path) and not leads_out(path) and not is_remote(path)
    ]


def list_of_paths(file: Path) -> list[str]:
    """Names of images in a list: a table with a column of paths, or a text with one a line.

    Raises:
        ShardError: If it cannot be read.
    """
    need_file(file, what="give a list with one image a line")
    if file.suffix.lower() != ".txt":
        return [next(iter(spellings(path))) for path in table_paths(file)]
    lines = (line.strip() for line in text_lines(file))
    return [next(iter(spellings(line))) for line in lines if line]


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


def _table_files(labels: Path) -> list[Path]:
    """The table itself; of a folder its metadata or its files of pictures, as a hub has them."""
    if not labels.is_dir():
        return [labels]
    found = [labels / name for name in _METADATA if (labels / name).is_file()]
    if len(found) == 1:
        return found
    pictures = sorted(file for ending in _PICTURES for file in labels.rglob(f"*{ending}"))
    if not found and pictures:
        return pictures
    what = " and ".join(file.name for file in found)
    raise ShardError(
        f"{printable(labels)}: is a folder "
        + (f"with {what}; name one of them" if found else "without metadata.csv; name the table"),
        exit_code=2 if found else 4,
    )


def _open_all(
    tables: list[Path], given: ColumnNames, images: Path | None, files: PathFilter | None
) -> "list[_Reading]":
    finder = None
    readings = []
    for file in tables:
        table = open_rows(file, wanted=given.wanted())
        if not _holds_images(table, given) and finder is None:
            finder = PathFinder(FolderIndex(images or file.parent, files=files))
            if file.parent == finder.index.folder:
                finder.index.left_out.forget(file.name)
        readings.append(_Reading.of(table, given, finder))
    return readings


def _holds_images(table: LabelTable, given: ColumnNames) -> bool:
    """Whether the table's images lie in the table itself."""
    return bool(table.pictures) and (
        given.path is None or column_key(given.path) in map(column_key, table.pictures)
    )


def _range_of(ends: list[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in ends), max(high for _, high in ends)


def _with_names_of_rows(reading: "_Reading", tables: int) -> "_Reading":
    """Pictures whose names are missing, or stand twice, are called by their rows."""
    if reading.picture is None:
        return reading
    keys = array.array("q")
    is_named = True
    for sample in _samples(reading):
        keys.append(group_key(sample.path))
        is_named = is_named and not sample.path.startswith(_NAMELESS)
    unique = np.unique(np.frombuffer(keys, np.int64)).size == len(keys)
    front = f"{reading.table.path.stem}/" if tables > 1 else ""
    return replace(reading, front=front, is_numbered=not (unique and is_named))


@dataclass(frozen=True)
class _Place:
    """Where an image of a table is."""

    path: str
    """Its name in the set."""
    file: Path
    embedded: Embedded | None = None
    problem: str = ""
    """Why there is none."""


@dataclass(frozen=True, kw_only=True)
class _Reading:
    """A table, what its columns mean, and where its images are."""

    table: LabelTable
    columns: dict[str, str | None]
    marks: NumberMarks
    finder: PathFinder | None
    """The folder its paths lie in; None if it holds the images."""
    picture: str | None
    """The column that holds the images."""
    remote: RemotePaths
    """Files that its paths name by URLs."""
    part: str = ""
    """Of all rows, where the file's name says it and no column does."""
    front: str = ""
    is_numbered: bool = False

    @classmethod
    def of(cls, table: LabelTable, given: ColumnNames, finder: PathFinder | None) -> "_Reading":
        where = str(table.path)
        if next(table.rows(), None) is None:
            raise ShardError(
                f"{printable(where)}: has no rows; a table needs a header and a row per image",
                exit_code=3,
            )
        picture = _picture_column(table, given)
        names = [name for name in table.names if name not in table.pictures or picture is None]
        if picture is None:
            table.path_column(given.path)
        columns: dict[str, str | None] = {
            role.name: find_column(names, role, given.given(role), where=where)
            for role in ROLES
            if role is not PATH or picture is None
        }
        numbers = [columns[role.name] for role in (SCORE, STD, LEVEL)]
        marks = table.number_marks([column for column in numbers if column is not None])
        part = _FILE_OF_PART.match(table.path.name) if columns[SPLIT.name] is None else None
        return cls(
            table=table,
            columns={PATH.name: None, **columns},
            marks=marks,
            finder=finder,
            picture=picture,
            remote=RemotePaths(lambda: _paths_in(table, columns.get(PATH.name))),
            part=parse_part(part[1], where=where) if part and picture else "",
        )

    def locate(self, number: int, row: Row, where: str) -> "_Place":
        """An image's name in the set, and where its bytes are."""
        if self.picture is not None:
            place = Embedded(column=self.picture, row=number - 1)
            return _Place(self._name_of_picture(number, row), self.table.path, embedded=place)
        assert self.finder is not None
        named = name_text(self.cell(row, PATH), where=f"{where}: {self.columns[PATH.name]}")
        if not named:
            raise ShardError(f"{where}: names no image; {CORRECT}", exit_code=3)
        if is_remote(named):
            copy, path = self.remote.find(named), name_of_url(named)
            if isinstance(copy, str):
                return _Place(path, Path(path), problem=f"{where}: {copy}")
            return _Place(path, copy)
        path, _ = self.finder.find(named, where=where)
        return _Place(path, self.finder.index.folder / path)

    def _name_of_picture(self, number: int, row: Row) -> str:
        assert self.picture is not None
        cell = row.get(self.picture)
        given = str((cell.get("path") if isinstance(cell, dict) else None) or "")
        path = next(iter(spellings(given)))
        if is_absolute(path) or leads_out(path):
            path = path.replace("\0", "").rpartition("/")[2]
        if self.is_numbered or not path:
            path = f"{_NAMELESS}{number:08d}{'-' if path else ''}{path.rpartition('/')[2]}"
        return self.front + path

    def is_remote(self, row: Row) -> bool:
        """Whether a row names its image by a URL."""
        return self.picture is None and is_remote(str(self.cell(row, PATH)))

    def cell(self, row: Row, role: Role) -> Any:
        """A row's cell in the column of a role; None if there is no such column."""
        column = self.columns[role.name]
        return None if column is None else row.get(column)

    def number(self, row: Row, role: Role) -> Any:
        """The same for numbers, written as programs write them."""
        return self.marks.plain(self.cell(row, role))


def _paths_in(table: LabelTable, column: str | None) -> Iterator[str]:
    """The cells of paths, as text."""
    assert column is not None  # a table without one holds its images
    for number, row in table.rows():
        yield name_text(row.get(column), where=f"{table.path}: row {number}")


def _first_pass(
    reading: _Reading, extra_files: ExtraFiles, missing: MissingFiles, bad_rows: BadRows
) -> tuple[float, float]:
    """Every row is checked before anything is packed."""
    low, high = math.inf, -math.inf
    absent, unusable = _Absent(reading), _Unusable(reading)

    def names() -> Iterator[str]:
        nonlocal low, high
        for number, row in reading.table.rows():
            sample = _sample(reading, (number, row))
            if sample.mos is not None:
                low, high = min(low, sample.mos), max(high, sample.mos)
                if reading.finder is not None and not reading.is_remote(row):
                    absent.add(number, row, sample)
            else:
                unusable.add(sample.problem)
            yield sample.path

    def refuse() -> None:
        if unusable.count and (bad_rows != "later" or math.isinf(low)):
            also = absent if missing == "error" else _Absent(reading)
            raise unusable.error(also, is_skippable=bad_rows == "error")
        is_all = 0 < absent.count == absent.rows and missing != "ignore"
        if absent.count and (missing == "error" or is_all):
            raise absent.error()

    # A table of URLs alone says nothing about the folder it happens to lie in.
    is_remote_alone = all(reading.is_remote(row) for _, row in reading.table.rows())
    if extra_files == "ignore" or reading.finder is None or is_remote_alone:
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


class _Unusable:
    """Rows with a cell that cannot be used, and why."""

    def __init__(self, reading: _Reading) -> None:
        self._table = reading.table.path
        self._first: list[str] = []
        self.count = 0

    def add(self, problem: str) -> None:
        """Take up a row by its sample's problem."""
        self.count += 1
        if len(self._first) < MOST_PROBLEMS:
            self._first.append(problem.removeprefix(f"{printable(self._table.name)}: "))

    def error(self, absent: "_Absent", *, is_skippable: bool) -> ShardError:
        """The first of them, of the images that are not there too, and the way out."""
        where = printable(self._table)
        if self.count + absent.count == 1:
            skip = "; `--on-error skip` leaves it out" if is_skippable else ""
            return ShardError(f"{where}: {self._first[0]}{skip}", exit_code=3)
        named = [problem.removesuffix(f"; {CORRECT}") for problem in self._first]
        named += [f"row {number}: there is no {text!r}" for number, text in absent.first]
        correct = "correct or remove the rows"
        return several_problems(
            named[:MOST_PROBLEMS],
            self.count + absent.count,
            what=f"{where}: of its rows",
            way_out=f"{correct}, or leave them out with `--on-error skip`, which lists them in "
            "rejected.jsonl"
            if is_skippable
            else correct,
        )


class _Absent:
    """Images that are labelled and not there."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading
        self.first: list[tuple[int, str]] = []
        """Rows and paths of the first few."""
        self.rows = self.count = 0

    def add(self, number: int, row: Row, sample: Sample) -> None:
        """Look whether the image of a row is there."""
        self.rows += 1
        assert self._reading.finder is not None
        index = self._reading.finder.index
        if index.position(sample.path) is None and not sample.file.is_file():
            self.count += 1
            if len(self.first) < MOST_PROBLEMS:
                text = printable(name_text(self._reading.cell(row, PATH), where=""), 60)
                self.first.append((number, text))

    def error(self) -> ShardError:
        """What is missing, and the way out."""
        text = self.first[0][1]
        finder, table = self._reading.finder, self._reading.table
        assert finder is not None
        way_out = finder.hint(text) or (
            "complete the folder, name another with `--images`, or leave them out with "
            "`--on-error skip`"
        )
        told = f" (read as {', '.join(table.told)})" if table.told else ""
        named = ", ".join(f"row {number}: {name!r}" for number, name in self.first)
        return ShardError(
            f"{printable(table.path)}{told}: {self.count:,} of {self.rows:,} labelled images are "
            f"not there in {printable(finder.index.folder)}, first "
            f"{named}; {way_out}",
            exit_code=3,
        )


def _picture_column(table: LabelTable, given: ColumnNames) -> str | None:
    """The column of images; None if the table names files.

    Raises:
        ShardError: If there are several, and none is named.
    """
    if not _holds_images(table, given):
        return None
    if given.path is not None:
        return find_column(table.pictures, PATH, given.path, where=str(table.path))
    if len(table.pictures) > 1:
        raise ShardError(
            f"{printable(table.path)}: the columns {' and '.join(map(repr, table.pictures))} all "
            f"hold images; say which with `--path-column {table.pictures[0]}`",
            exit_code=3,
        )
    return table.pictures[0]


def _samples(reading: _Reading) -> Iterator[Sample]:
    return (_sample(reading, numbered) for numbered in reading.table.rows())


def _sample(reading: _Reading, numbered: Numbered) -> Sample:
    """The sample of a row; with a problem and no score if a cell of it is not usable."""
    number, row = numbered
    where = f"{printable(reading.table.path)}: row {number}"
    place = None
    try:
        place = reading.locate(number, row, where)
        return _read_sample(reading, numbered, place, where)
    except ShardError as error:
        # The file's name alone: the hash of a set does not depend on where its table lies.
        reason = str(error).removeprefix(f"{printable(reading.table.path)}: ")
        path = f"{_NAMELESS}{number:08d}" if place is None else place.path
        return Sample(
            path=path,
            file=reading.table.path if place is None else place.file,
            mos=None,
            mos_std=None,
            group=path,
            size=0 if place is None or place.embedded is not None else None,
            row=number,
            problem=f"{printable(reading.table.path.name)}: {reason}",
        )


def _read_sample(reading: _Reading, numbered: Numbered, place: _Place, where: str) -> Sample:
    number, row = numbered
    group, distortion, subset = (
        cell_text(reading.cell(row, role), where=f"{where}: {role.name}")
        for role in (GROUP, DISTORTION, SUBSET)
    )
    return Sample(
        path=place.path,
        file=place.file,
        mos=parse_score(reading.number(row, SCORE), where=where),
        mos_std=_spread(reading.number(row, STD), reading.columns[STD.name], where),
        group=group if group != "" else place.path,
        distortion=distortion,
        level=_level(reading.number(row, LEVEL), where),
        subset=subset,
        part=parse_part(reading.cell(row, SPLIT), where=where) or reading.part,
        size=reading.table.mean_bytes if place.embedded is not None else None,
        embedded=place.embedded,
        row=number,
        problem=place.problem,
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
    if reading.picture is not None:
        told.append(f"images from its column {printable(reading.picture, 60)!r}")
    if reading.part:
        told.append(f"part {reading.part!r} from the file's name")
    if finder is not None and finder.num_shortened:
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
