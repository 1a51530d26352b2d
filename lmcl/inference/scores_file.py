"""Rows of a scores file, the journal they gather in, and the three formats they end up in.

While a job runs, every process appends finished rows to a journal of its own beside the output.
The output appears, whole, when all rows are there; a killed job leaves journals for `--resume`.
"""

import csv
import dataclasses
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from lmcl.errors import LmclError
from lmcl.utils.files import write_atomic

FORMATS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("path", "score", "scale", "higher_is_better", "error", "quality")
_BOX = ("y", "x", "h", "w")
_CHUNK = 10_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One image of a scores file."""

    path: str
    score: float | None
    """In the scale of the training set; None if the image could not be scored."""
    quality: float | None
    """In [0, 1], higher = better."""
    error: str
    """Why there is no score; empty if there is one."""
    box: tuple[int, int, int, int] | None = None
    """Salient crop y, x, h, w."""
    crops: tuple[float, ...] = ()
    """Score of every crop."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the file says about every row, and which optional columns it has."""

    scale: str
    higher_is_better: bool
    box: bool
    crops: bool

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        box = _BOX if self.box else ()
        return (*COLUMNS, *box, *(("crop_scores",) if self.crops else ()))

    def values(self, row: Row) -> dict[str, Any]:
        """A row as named values; what is unknown is None."""
        found: dict[str, Any] = {
            "path": row.path,
            "score": row.score,
            "scale": self.scale,
            "higher_is_better": self.higher_is_better,
            "error": row.error,
            "quality": row.quality,
        }
        if self.box:
            found |= dict(zip(_BOX, row.box or (None,) * 4, strict=True))
        if self.crops:
            found["crop_scores"] = list(row.crops)
        return found


class RowJournal:
    """Finished rows of one process, appended line by line."""

    def __init__(self, output: Path, *, rank: int) -> None:
        self.path = output.with_name(f".{output.name}.rows-{rank:04d}-{os.getpid()}")
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write a row; it survives the process from here on."""
        self._file.write(json.dumps(dataclasses.asdict(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; it stays until the output is written."""
        self._file.close()


def journals_of(output: Path) -> list[Path]:
    """The journals that lie beside an output; its name may hold characters of a pattern."""
    return sorted(output.parent.glob(f".{glob.escape(output.name)}.rows-*"))


class JournalRows:
    """Rows of all journals of an output, found by path without holding them in memory."""

    def __init__(self, output: Path) -> None:
        self._files = journals_of(output)
        self._place: dict[str, tuple[int, int]] = {}
        self.failed: set[str] = set()
        for index, file in enumerate(self._files):
            for offset, row in _lines(file):
                self._add(row, index, offset)

    def __contains__(self, path: str) -> bool:
        return path in self._place

    def rows(self, paths: Sequence[str]) -> Iterator[Row]:
        """Rows in the order of `paths`; every path must be there."""
        opened = [file.open("rb") for file in self._files]
        try:
            for path in paths:
                index, offset = self._place[path]
                opened[index].seek(offset)
                row = _parse(opened[index].readline())
                assert row is not None
                yield row
        finally:
            for file in opened:
                file.close()

    def remove(self) -> None:
        """Delete the journals: the output holds their rows."""
        for file in self._files:
            file.unlink(missing_ok=True)

    def _add(self, row: Row, index: int, offset: int) -> None:
        # A later success replaces a failure, whichever journal it stands in.
        if row.path in self._place and row.path not in self.failed:
            return
        self._place[row.path] = (index, offset)
        self.failed.discard(row.path)
        if row.error:
            self.failed.add(row.path)


def write_rows(rows: Iterator[Row], output: Path, layout: Layout) -> int:
    """Write the output in the format its name asks for, whole or not at all; counts the rows."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    writer = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    try:
        count = writer[output.suffix](rows, temporary, layout)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(output)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return count


def note_path(output: Path) -> Path:
    """Where a scores file's origin is written down."""
    return output.with_name(f"{output.name}.origin.json")


def write_note(output: Path, note: dict[str, str]) -> None:
    """Write which model, crops and decoder a scores file comes from."""
    write_atomic(note_path(output), (json.dumps(note, indent=2) + "\n").encode())


def read_note(output: Path) -> dict[str, str]:
    """The origin of a scores file or of its journals; empty if none was written."""
    path = note_path(output)
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except msgspec.DecodeError as error:
        raise LmclError(
            f"{path}: is damaged ({error}), so it is not known which model the rows come from; "
            "choose another --output, or restore it",
            exit_code=5,
        ) from error


def read_rows(output: Path) -> Iterator[Row]:
    """Rows of a finished scores file, in its order."""
    if output.suffix == ".csv":
        with output.open(encoding="utf-8", newline="") as lines:
            yield from (_from_values(_typed(row)) for row in csv.DictReader(lines))
    elif output.suffix == ".jsonl":
        with output.open(encoding="utf-8") as lines:
            yield from (_from_values(json.loads(line)) for line in lines)
    else:
        for batch in pq.ParquetFile(output).iter_batches(_CHUNK):
            yield from (_from_values(values) for values in batch.to_pylist())


def check_output(output: Path) -> None:
    """Refuse a name that no format belongs to.

    Raises:
        LmclError: Exit code 2.
    """
    if output.suffix not in FORMATS:
        raise LmclError(
            f"{output}: unknown format {output.suffix!r}; end the name in {', '.join(FORMATS)}",
            exit_code=2,
        )


def _lines(file: Path) -> Iterator[tuple[int, Row]]:
    offset = 0
    with file.open("rb") as lines:
        for line in lines:
            row = _parse(line)
            # A line without its end was being written when the process was killed.
            if row is not None and line.endswith(b"\n"):
                yield offset, row
            offset += len(line)


def _parse(line: bytes) -> Row | None:
    try:
        values = json.loads(line)
    except ValueError:
        return None
    box = values["box"]
    return Row(
        path=values["path"],
        score=values["score"],
        quality=values["quality"],
        error=values["error"],
        box=None if box is None else (box[0], box[1], box[2], box[3]),
        crops=tuple(values["crops"]),
    )


def _typed(values: dict[str, str]) -> dict[str, Any]:
    """A CSV row's fields as numbers where they are numbers; an empty field is None."""
    found: dict[str, Any] = dict(values)
    for name in ("score", "quality"):
        found[name] = float(values[name]) if values.get(name) else None
    for name in _BOX:
        found[name] = int(values[name]) if values.get(name) else None
    found["crop_scores"] = json.loads(values["crop_scores"]) if values.get("crop_scores") else []
    return found


def _from_values(values: dict[str, Any]) -> Row:
    box = [int(values[name]) for name in _BOX if values.get(name) is not None]
    return Row(
        path=values["path"],
        score=values["score"],
        quality=values["quality"],
        error=values["error"] or "",
        box=(box[0], box[1], box[2], box[3]) if len(box) == 4 else None,
        crops=tuple(values.get("crop_scores") or ()),
    )


def _write_csv(rows: Iterator[Row], file: Path, layout: Layout) -> int:
    count = 0
    with file.open("w", encoding="utf-8", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(layout.columns)
        for row in rows:
            values = layout.values(row)
            values["higher_is_better"] = str(layout.higher_is_better).lower()
            if layout.crops:
                values["crop_scores"] = json.dumps(values["crop_scores"])
            cells = (
                "" if v is None else repr(v) if isinstance(v, float) else v for v in values.values()
            )
            writer.writerow(list(cells))
            count += 1
    return count


def _write_jsonl(rows: Iterator[Row], file: Path, layout: Layout) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(layout.values(row)) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[Row], file: Path, layout: Layout) -> int:
    types = {"score": pa.float64(), "quality": pa.float64(), "higher_is_better": pa.bool_()}
    types |= dict.fromkeys(_BOX, pa.int32()) | {"crop_scores": pa.list_(pa.float64())}
    schema = pa.schema([(name, types.get(name, pa.string())) for name in layout.columns])
    count = 0
    with pq.ParquetWriter(file, schema) as writer:
        chunk: list[dict[str, Any]] = []
        for row in rows:
            chunk.append(layout.values(row))
            count += 1
            if len(chunk) == _CHUNK:
                writer.write_table(pa.Table.from_pylist(chunk, schema))
                chunk = []
        writer.write_table(pa.Table.from_pylist(chunk, schema))
    return count
