"""Predictions of one model on one set of images, by sample id, and the file they are kept in.

The file is what training, evaluation, reports and gMAD share: a reader needs nothing else.
Scores stand in it in the set's own units; `prediction_unit` is the same prediction in [0, 1].
"""

import collections
import csv
import dataclasses
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lmcl.errors import LmclError
from lmcl.utils.files import write_atomic
from shards.text import printable

COLUMNS = (
    "id",
    "path",
    "group",
    "distortion",
    "level",
    "subset",
    "part",
    "mos",
    "mos_std",
    "prediction",
    "prediction_unit",
    "y",
    "x",
    "h",
    "w",
    "height",
    "width",
)
DEVIATION_COLUMN = "deviation"
"""Written last where the model predicts it."""
INTERVAL_COLUMNS = ("lower", "upper")
"""Written after the others where the run's calibration gives intervals."""
_REQUIRED = ("id", "path", "mos", "prediction")
_NUMBERS = ("mos", "mos_std", "prediction", "prediction_unit")
_PLACE = ("y", "x", "h", "w", "height", "width")
NO_LEVEL = -1
_LARGEST = 1e30
"""No score is larger."""


def _unknown() -> NDArray[np.int64]:
    return np.zeros(0, dtype=np.int64)


def _unknown_real() -> NDArray[np.float64]:
    return np.zeros(0, dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Columns of equal length, one row per image, ascending and unique in `id`."""

    id: NDArray[np.int64]
    """Sample id in the shard set."""
    path: NDArray[Any]
    """Path below the set's root, posix."""
    mos: NDArray[np.float64]
    """Raw score in the set's own scale; NaN if unlabelled."""
    prediction: NDArray[np.float64]
    """In the same scale and direction as `mos`."""
    prediction_unit: NDArray[np.float64]
    """In [0, 1], higher = better; may leave the interval."""
    mos_std: NDArray[np.float64]
    """Standard deviation of the image's ratings; NaN if unknown."""
    group: NDArray[Any]
    """What images depend on each other through: the reference, or the image itself."""
    distortion: NDArray[Any]
    """Kind of distortion, empty if authentic or unknown."""
    level: NDArray[np.int64]
    """Strength of the distortion; -1 if it has none."""
    subset: NDArray[Any]
    """Part of the set with its own character, e.g. where its images come from; may be empty."""
    part: NDArray[Any]
    """train, val or test; may be empty."""
    y: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Top of the salient box in the upright image, pixels; -1 if there is none."""
    x: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Its left edge."""
    h: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Its height."""
    w: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Its width."""
    height: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Height of the upright image the box lies in, pixels; -1 if unknown."""
    width: NDArray[np.int64] = dataclasses.field(default_factory=_unknown)
    """Its width."""
    lower: NDArray[np.float64] = dataclasses.field(default_factory=_unknown_real)
    """Lower end of the prediction interval, in the scale of `mos`; NaN if there is none."""
    upper: NDArray[np.float64] = dataclasses.field(default_factory=_unknown_real)
    """Its upper end."""
    deviation: NDArray[np.float64] = dataclasses.field(default_factory=_unknown_real)
    """Predicted deviation of the ratings, in the scale of `mos`; NaN if the model gives none."""

    def __post_init__(self) -> None:
        """Fill what is unknown; refuse columns of different length and repeated ids.

        Raises:
            LmclError: Exit code 3.
        """
        n = len(self.id)
        for name in _PLACE:
            if len(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.full(n, NO_LEVEL, dtype=np.int64))
        for name in (*INTERVAL_COLUMNS, DEVIATION_COLUMN):
            if len(getattr(self, name)) == 0:
                object.__setattr__(self, name, np.full(n, math.nan))
        for field in dataclasses.fields(self):
            length = len(getattr(self, field.name))
            if length != n:
                raise LmclError(
                    f"predictions: column {field.name} has {length} rows, id has {n}; "
                    "give one value per image",
                    exit_code=3,
                )
        if n and np.any(np.diff(self.id) <= 0):
            raise LmclError(
                "predictions: ids must rise and be unique; pass them through "
                "`lmcl.evaluation.predictions.complete` first, which drops the padding of "
                "distributed loaders",
                exit_code=3,
            )

    def __len__(self) -> int:
        return len(self.id)

    def take(self, rows: NDArray[Any]) -> "Predictions":
        """The rows of a boolean mask, or of ascending row numbers."""
        return Predictions(
            **{f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        )

    def write_csv(self, path: Path) -> None:
        """Write all columns; numbers keep every digit, what is unknown is an empty field."""
        out = io.StringIO(newline="")
        writer = csv.writer(out, lineterminator="\n")
        optional = (*INTERVAL_COLUMNS, DEVIATION_COLUMN)
        ends = [name for name in optional if np.any(np.isfinite(getattr(self, name)))]
        writer.writerow((*COLUMNS, *ends))
        numbers = [getattr(self, name).tolist() for name in _NUMBERS]
        intervals = [getattr(self, name).tolist() for name in ends]
        places = [self.level.tolist(), *(getattr(self, name).tolist() for name in _PLACE)]
        for i, key in enumerate(self.id.tolist()):
            kind = (self.group[i], self.distortion[i], _field(places[0][i]))
            values = (_real(column[i]) for column in numbers)
            place = (_field(column[i]) for column in places[1:])
            interval = (_real(column[i]) for column in intervals)
            writer.writerow(
                [key, self.path[i], *kind, self.subset[i], self.part[i], *values, *place, *interval]
            )
        write_atomic(path, out.getvalue().encode())


def make_predictions(
    *,
    id: ArrayLike,
    path: Sequence[str] | NDArray[Any],
    mos: ArrayLike,
    prediction: ArrayLike,
    prediction_unit: ArrayLike | None = None,
    mos_std: ArrayLike | None = None,
    group: Sequence[str] | NDArray[Any] | None = None,
    distortion: Sequence[str] | NDArray[Any] | None = None,
    level: ArrayLike | None = None,
    subset: Sequence[str] | NDArray[Any] | None = None,
    part: str | Sequence[str] | NDArray[Any] = "",
    size: ArrayLike | None = None,
    box: ArrayLike | None = None,
    lower: ArrayLike | None = None,
    upper: ArrayLike | None = None,
    deviation: ArrayLike | None = None,
) -> Predictions:
    """Predictions from columns in any numeric type; what is not given is marked as unknown.

    Rows are sorted by id. `group` defaults to the path: every image stands for itself.

    Raises:
        LmclError: If columns differ in length or an id occurs twice; exit code 3.
    """
    ids = np.asarray(id, dtype=np.int64)
    n = len(ids)
    parts = np.full(n, part, dtype=object) if isinstance(part, str) else _text(part, n)
    columns: dict[str, NDArray[Any]] = {
        "id": ids,
        "path": _text(path, n),
        "mos": np.asarray(mos, dtype=np.float64),
        "prediction": np.asarray(prediction, dtype=np.float64),
        "prediction_unit": _number(prediction_unit, n),
        "mos_std": _number(mos_std, n),
        "group": _text(path if group is None else group, n),
        "distortion": _text(distortion, n),
        "level": _whole(level, (n,)),
        "subset": _text(subset, n),
        "part": parts,
        **dict(zip(_PLACE[:4], _whole(box, (n, 4)).T, strict=True)),
        **dict(zip(_PLACE[4:], _whole(size, (n, 2)).T, strict=True)),
        "lower": _number(lower, n),
        "upper": _number(upper, n),
        "deviation": _number(deviation, n),
    }
    order = np.argsort(ids, kind="stable")
    equal = {name: c[order] if len(c) == n else c for name, c in columns.items()}
    return Predictions(**equal)


def complete(
    ids: ArrayLike, values: ArrayLike, expected: ArrayLike, *, tolerance: float = 1e-5
) -> NDArray[np.float64]:
    """Values in the order of `expected`, after a distributed loader has padded and shuffled them.

    Args:
        ids: Sample ids as gathered from all ranks; padded ones occur more than once.
        values: One value per gathered id.
        expected: The ids of the part, each once.
        tolerance: How far two values of one image may lie apart, relative to 1 or the value.

    Raises:
        LmclError: If an image is missing, was not asked for, or has two different values: a figure
            over such rows would be wrong without anyone noticing. Exit code 3.
    """
    got, value = np.asarray(ids, dtype=np.int64), np.asarray(values, dtype=np.float64)
    wanted = np.asarray(expected, dtype=np.int64)
    unique, first, inverse = np.unique(got, return_index=True, return_inverse=True)
    missing, strange = np.setdiff1d(wanted, unique), np.setdiff1d(unique, wanted)
    if len(missing) or len(strange):
        raise LmclError(
            f"predictions: {len(unique)} images were evaluated, {len(wanted)} expected; "
            f"missing ids {_few(missing)}, ids of other parts {_few(strange)}; "
            "evaluate the part again, every image once",
            exit_code=3,
        )
    apart = np.abs(value - value[first][inverse]) > tolerance * np.maximum(1.0, np.abs(value))
    if np.any(apart):
        raise LmclError(
            f"predictions: ids {_few(np.unique(got[apart]))} have two different values each; "
            "a score must not depend on the batch or the rank: switch the model to eval mode",
            exit_code=3,
        )
    return np.asarray(value[first][np.searchsorted(unique, wanted)], dtype=np.float64)


def read_csv(path: Path) -> Predictions:
    """Read a predictions file; columns beyond the required ones may be missing.

    Raises:
        LmclError: Missing file (4), missing column or a field that is no number (3).
    """
    if not path.is_file():
        raise LmclError(
            f"{path}: no predictions file; `lmcl eval RUN` writes one per part", exit_code=4
        )
    with path.open(encoding="utf-8-sig", newline="") as lines:
        return _from_lines(lines, path)


def read_predictions(path: Path, source: BinaryIO | None = None) -> Predictions:
    """Read a predictions file; whatever is wrong with it is said with its name and a way out.

    Args:
        path: The file.
        source: Its bytes, for a caller that has opened it by rules of its own; it is closed.

    Raises:
        LmclError: If it is missing (4) or cannot be read (3).
    """
    run = printable(path.parent.parent)
    way_out = f"correct it, or delete it and write it again with `lmcl eval {run}`"
    try:
        if source is None:
            return read_csv(path)
        with io.TextIOWrapper(source, encoding="utf-8-sig", newline="") as lines:
            return _from_lines(lines, path)
    except (UnicodeDecodeError, csv.Error) as error:
        raise LmclError(
            f"{printable(path)}: is no CSV file in UTF-8 ({printable(error)}); {way_out}",
            exit_code=3,
        ) from error
    except (ValueError, OverflowError) as error:
        raise LmclError(
            f"{printable(path)}: an id, a level or a box is no whole number "
            f"({printable(error)}); {way_out}",
            exit_code=3,
        ) from error


def _from_lines(lines: Iterable[str], path: Path) -> Predictions:
    reader = csv.DictReader(lines)
    absent = [name for name in _REQUIRED if name not in (reader.fieldnames or ())]
    if absent:
        raise LmclError(
            f"{printable(path)}: column {', '.join(absent)} is missing; a predictions file has "
            f"{', '.join(COLUMNS)}",
            exit_code=3,
        )
    rows = list(reader)
    _refuse_repeated(rows, path)
    return _from_rows(rows, path)


def _refuse_repeated(rows: list[dict[str, str]], path: Path) -> None:
    seen = collections.Counter(row["id"] for row in rows)
    repeated = [key for key, count in seen.items() if count > 1 and key]
    if repeated:
        raise LmclError(
            f"{printable(path)}: id {printable(repeated[0], 40)} stands in {seen[repeated[0]]} "
            f"rows ({len(repeated)} ids in more than one), each image needs one; correct it, or "
            "delete it and write it again with "
            f"`lmcl eval {printable(path.parent.parent)}`",
            exit_code=3,
        )


def _from_rows(rows: list[dict[str, str]], path: Path) -> Predictions:
    def reals(name: str) -> list[float]:
        return [_parse(row.get(name), math.nan, path, i, name) for i, row in enumerate(rows)]

    def wholes(name: str) -> list[int]:
        return [int(_parse(row.get(name), -1.0, path, i, name)) for i, row in enumerate(rows)]

    def texts(name: str) -> list[str]:
        return [row.get(name) or "" for row in rows]

    groups, paths = texts("group"), texts("path")
    return make_predictions(
        id=wholes("id"),
        path=paths,
        mos=reals("mos"),
        prediction=reals("prediction"),
        prediction_unit=reals("prediction_unit"),
        mos_std=reals("mos_std"),
        group=[group or path for group, path in zip(groups, paths, strict=True)],
        distortion=texts("distortion"),
        level=wholes("level"),
        subset=texts("subset"),
        part=texts("part"),
        size=np.array([wholes("height"), wholes("width")], dtype=np.int64).T,
        box=np.array([wholes(c) for c in ("y", "x", "h", "w")], dtype=np.int64).T,
        lower=reals("lower"),
        upper=reals("upper"),
        deviation=reals("deviation"),
    )


def _parse(text: str | None, unknown: float, path: Path, row: int, column: str) -> float:
    if not text:
        return unknown
    try:
        value = float(text)
    except ValueError:
        value = math.nan
        is_number = False
    else:
        # Python reads 1_0 as ten; and what is beyond any score overflows when it is squared.
        is_number = "_" not in text and not _LARGEST < abs(value) < math.inf
    if not is_number:
        raise LmclError(
            f"{printable(path)}: line {row + 2}, column {column}: {printable(text, 40)!r} is no "
            f"number up to {_LARGEST:g}; an unknown value is an empty field",
            exit_code=3,
        )
    return value


def _text(values: Sequence[str] | NDArray[Any] | None, n: int) -> NDArray[Any]:
    if values is None:
        return np.full(n, "", dtype=object)
    return np.array([str(v) for v in values], dtype=object)


def _number(values: ArrayLike | None, n: int) -> NDArray[np.float64]:
    return np.full(n, math.nan) if values is None else np.asarray(values, dtype=np.float64)


def _whole(values: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.int64]:
    if values is None:
        return np.full(shape, NO_LEVEL, dtype=np.int64)
    return np.asarray(values, dtype=np.int64).reshape(-1, *shape[1:])


def _real(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _field(value: int) -> str:
    return "" if value == NO_LEVEL else str(value)


def _few(ids: NDArray[np.int64]) -> str:
    shown = ", ".join(str(i) for i in ids[:5])
    return f"{shown} and {len(ids) - 5} more" if len(ids) > 5 else shown or "none"
