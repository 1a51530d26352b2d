"""Rows of a scores file, the journal they gather in, and the three formats they end up in.

While a job runs, every process appends finished rows to a journal of its own beside the output.
The output appears, whole, when all rows are there; a killed job leaves journals for `--resume`.
"""

import csv
import dataclasses
import glob
import json
import math
import os
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from lmcl.errors import LmclError
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.files import atomic_path, atomic_write
from shards.source_files import (
    MAX_LINE_BYTES,
    MAX_TABLE_BYTES,
    open_regular,
    read_regular,
    text_lines,
)
from shards.text import plain_cell, printable, spreadsheet_cell

FORMATS = (".csv", ".jsonl", ".parquet")
COLUMNS = ("path", "score", "scale", "higher_is_better", "error", "quality")
_BOX = ("y", "x", "h", "w")
_MEANING = ("percentile", "lower", "upper", "unusual")
_DEVIATION = "deviation"
_LAST = ("note", "width", "height")
_CHUNK = 10_000
_UNREADABLE = (
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    RecursionError,
    csv.Error,
    OSError,
    ShardError,
)


class UnreadableScoresError(LmclError):
    """A file that is no scores file of ours.

    Attributes:
        reason: Why it cannot be read as one.
    """

    def __init__(self, output: Path, reason: str) -> None:
        super().__init__(
            f"{printable(output)}: cannot be read as a scores file ({reason}); restore it, or "
            "choose another --output",
            exit_code=5,
        )
        self.reason = reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """The file a row is about, and what tells whether it has changed since."""

    file: str
    """As it was named when it was scored."""
    place: str
    """Without links and other spellings in its folder's path."""
    offset: int = -1
    """Where the image begins in a tar; -1 if the file is the image."""
    size: int = -1
    """Bytes of the file; -1 if it could not be looked at."""
    mtime_ns: int = -1
    """When it was last written, in nanoseconds since 1970."""
    is_listing: bool = False
    """Whether the row only says that something could not be listed: there is no image."""
    moved_from: str = ""
    """Where it lay before `--move-to`."""


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
    decoder: str = ""
    """Who decoded it: gpu or cpu; empty if it is not known."""
    note: str = ""
    """Why the score should be doubted (`shards.picture_notes`); empty for most."""
    width: int | None = None
    """Pixels of the upright image; None if it was not read, or by a version that did not say."""
    height: int | None = None
    """Pixels of the upright image."""
    percentile: float | None = None
    """Share of a population, in %, that scores lower; None without a calibration."""
    lower: float | None = None
    """Lower end of the interval people's score lies in, in the scale of the training set."""
    upper: float | None = None
    """Its upper end."""
    unusual: float | None = None
    """Share of val images [0, 1] that lie nearer to the training images."""
    deviation: float | None = None
    """Predicted deviation of people's ratings, in the scale of the training set."""
    crops_used: int | None = None
    """Crops that were looked at, where that was up to the image."""
    source: Source | None = None
    """Which file it is about; None in files of earlier versions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What the file says about every row, and which optional columns it has."""

    scale: str
    higher_is_better: bool
    box: bool
    crops: bool
    decoder: bool = False
    """Whether images may have been decoded on a GPU, so that each row says whether it was."""
    meaning: bool = False
    """Whether the model is calibrated, so that each row says what its score means."""
    crops_used: bool = False
    """Whether each row says how many crops were looked at."""
    deviation: bool = False
    """Whether the model predicts how far ratings lie apart."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, in order."""
        box = _BOX if self.box else ()
        crops = ("crop_scores",) if self.crops else ()
        decoder = ("decoder",) if self.decoder else ()
        meaning = _MEANING if self.meaning else ()
        used = ("crops_used",) if self.crops_used else ()
        deviation = (_DEVIATION,) if self.deviation else ()
        return (*COLUMNS, *box, *crops, *decoder, *_LAST, *used, *meaning, *deviation)

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
        if self.decoder:
            found["decoder"] = row.decoder
        found |= {"note": row.note, "width": row.width, "height": row.height}
        if self.crops_used:
            found["crops_used"] = row.crops_used
        if self.meaning:
            found |= {name: getattr(row, name) for name in _MEANING}
        if self.deviation:
            found[_DEVIATION] = row.deviation
        return found


class RowJournal:
    """Finished rows of one process, appended line by line to a file of its own."""

    def __init__(self, output: Path, *, rank: int | Literal["base"]) -> None:
        # A process number is no name: in containers it is 1 every time.
        token = secrets.token_hex(6)
        owner = rank if rank == "base" else f"{rank:04d}"
        self.path = output.with_name(f".{output.name}.rows-{owner}-{token}")
        output.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("xb")

    def append(self, row: Row) -> None:
        """Write a row; it survives the process from here on."""
        # JSON spells out what is no UTF-8, so a place can be any name.
        self._file.write(json.dumps(dataclasses.asdict(row)).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; it stays until the output is written."""
        self._file.close()


def journals_of(output: Path) -> list[Path]:
    """The journals beside an output, oldest first; what the output held itself comes before all."""
    found = output.parent.glob(f".{glob.escape(output.name)}.rows-*")
    return sorted(found, key=lambda path: (not _is_base(path), path.stat().st_mtime_ns, path.name))


def _is_base(journal: Path) -> bool:
    # The versions before `base` gave it a rank that nobody has.
    return journal.name.rpartition(".rows-")[2].startswith(("base-", "9999-"))


class Entry(NamedTuple):
    """Where the best row of an image stands in the journals, and what is asked of it often."""

    file: int
    offset: int
    path: str
    is_failed: bool
    is_listing: bool
    size: int
    mtime_ns: int
    is_retry_failed: bool = False
    """Whether a later attempt has failed, whose row does not replace this good one."""


class JournalRows:
    """Rows of all journals of an output, found by key without holding them in memory.

    A good row is replaced by a later good one, never by a failure.
    """

    def __init__(self, output: Path) -> None:
        self._files = journals_of(output)
        self.entries: dict[str, Entry] = {}
        """By key, those of the output itself first."""
        self.base_keys: list[str] = []
        """Keys of the rows the output held, in its order."""
        self.moved: dict[str, str] = {}
        """Keys of the places that images were moved away from: the keys they have now."""
        self.torn = 0
        """Lines that cannot be read: a process was killed while it wrote."""
        for index, file in enumerate(self._files):
            is_base = _is_base(file)
            for offset, row in self._lines(file):
                key = self._add(row, index, offset)
                if is_base and key is not None:
                    self.base_keys.append(key)

    @property
    def has_scores(self) -> bool:
        """Whether there is a row that is worth keeping."""
        return any(not entry.is_failed for entry in self.entries.values())

    def rows(self, keys: Sequence[str]) -> Iterator[Row]:
        """Rows in the order of `keys`; every key must be there."""
        opened = [file.open("rb") for file in self._files]
        try:
            for key in keys:
                entry = self.entries[key]
                opened[entry.file].seek(entry.offset)
                row = _parse(opened[entry.file].readline())
                assert row is not None
                yield row
        finally:
            for file in opened:
                file.close()

    def remove(self) -> None:
        """Delete the journals: the output holds their rows."""
        for file in self._files:
            file.unlink(missing_ok=True)

    def _lines(self, file: Path) -> Iterator[tuple[int, Row]]:
        offset = 0
        with open_regular(file, limit_bytes=MAX_TABLE_BYTES) as lines:
            while line := lines.readline(MAX_LINE_BYTES):
                row = _parse(line)
                if row is not None:
                    yield offset, row
                elif line.strip():
                    self.torn += 1
                offset += len(line)

    def _add(self, row: Row, index: int, offset: int) -> str | None:
        """Enter a row; its key if that is new."""
        source = row.source
        key = key_of(source.place, source.offset) if source else name_key(row.path)
        if source is not None and source.moved_from:
            self.moved[key_of(source.moved_from, -1)] = key
        before = self.entries.get(key)
        if before is not None and row.score is None and not before.is_failed:
            self.entries[key] = before._replace(is_retry_failed=True)
            return None
        self.entries[key] = Entry(
            file=index,
            offset=offset,
            path=row.path,
            is_failed=row.score is None,
            is_listing=source is not None and source.is_listing,
            size=source.size if source else -1,
            mtime_ns=source.mtime_ns if source else -1,
        )
        return key if before is None else None


def key_of(place: str, offset: int) -> str:
    """What an image is called inside a job: where its bytes lie."""
    return f"{offset}:{place}"


def name_key(path: str) -> str:
    """The key of a row of which only the name is known: earlier versions wrote no more."""
    return f"name:{path}"


def is_name_key(key: str) -> bool:
    """Whether a key is one of `name_key`."""
    return key.startswith("name:")


def write_rows(rows: Iterator[Row], output: Path, layout: Layout) -> int:
    """Write the output in the format its name asks for, and its sources; counts the rows.

    Both appear whole or not at all, the sources first: those of a row that the output does not hold
    yet do no harm.
    """
    writer = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}
    with atomic_path(output) as temporary, atomic_write(sources_path(output)) as sources:
        # The stream of sources is closed, and named, before the output is.
        return writer[output.suffix.lower()](_with_sources(rows, sources), temporary, layout)


def _with_sources(rows: Iterator[Row], out: BinaryIO) -> Iterator[Row]:
    for row in rows:
        if row.source is not None:
            line = {"path": row.path, **dataclasses.asdict(row.source)}
            out.write(json.dumps(line).encode() + b"\n")
        yield row


def sources_path(output: Path) -> Path:
    """Where the files that a scores file is about are written down, with sizes and times."""
    return output.with_name(f"{output.name}.sources.jsonl")


def read_sources(output: Path) -> dict[str, Source]:
    """The sources of a scores file by the names of its rows; empty if none were written.

    Raises:
        LmclError: If they are damaged (exit code 5).
    """
    path = sources_path(output)
    if not path.exists():
        return {}
    found = {}
    try:
        for line in text_lines(path):
            values = json.loads(line)
            found[str(values.pop("path"))] = msgspec.convert(values, Source)
    except (ValueError, KeyError, AttributeError, RecursionError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: is damaged ({printable(error)}), so it is not known which files "
            "the rows are about; remove it to go by their names, or choose another --output",
            exit_code=5,
        ) from error
    return found


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
        return msgspec.convert(json.loads(read_regular(path, limit_bytes=1 << 20)), dict[str, str])
    except (ValueError, RecursionError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: is damaged ({printable(error)}), so it is not known which model "
            "the rows come from; choose another --output, or restore it",
            exit_code=5,
        ) from error


def read_rows(output: Path) -> Iterator[Row]:
    """Rows of a finished scores file, in its order.

    Raises:
        UnreadableScoresError: If it cannot be read as a scores file (exit code 5).
    """
    read = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if output.suffix.lower() not in read:
        raise UnreadableScoresError(output, f"its name ends in none of {', '.join(FORMATS)}")
    try:
        for values in read[output.suffix.lower()](output):
            yield _from_values(values)
    except KeyError as error:
        # Of a key that is missing, str() is its name in quotes and nothing else.
        raise UnreadableScoresError(output, f"it has no column {printable(error)}") from error
    except _UNREADABLE as error:
        raise UnreadableScoresError(output, printable(error)) from error


def _read_csv(output: Path) -> Iterator[dict[str, Any]]:
    yield from (_typed(row) for row in csv.DictReader(text_lines(output)))


def _read_jsonl(output: Path) -> Iterator[dict[str, Any]]:
    yield from (json.loads(line) for line in text_lines(output))


def _read_parquet(output: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_regular(output, limit_bytes=MAX_TABLE_BYTES) as file:
        try:
            for batch in pq.ParquetFile(file).iter_batches(_CHUNK):
                yield from batch.to_pylist()
        except pa.ArrowException as error:
            raise ValueError(str(error)) from error


def check_output(output: Path) -> None:
    """Refuse a name that no format belongs to, and what is no file.

    Raises:
        LmclError: Exit code 2.
    """
    if output.suffix.lower() not in FORMATS:
        raise LmclError(
            f"{printable(output)}: unknown format {printable(output.suffix)!r}; end the name in "
            f"{', '.join(FORMATS)}",
            exit_code=2,
        )
    if os.path.exists(output) and not os.path.isfile(output):
        raise LmclError(
            f"{printable(output)}: is no regular file; choose another --output", exit_code=2
        )


def _parse(line: bytes) -> Row | None:
    """A journal's line as a row; None if it is torn or none of ours."""
    # A line without its end was being written when the process was killed.
    if not line.endswith(b"\n"):
        return None
    try:
        return msgspec.convert(json.loads(line), Row, strict=True)
    except (ValueError, RecursionError):
        return None


def _typed(values: dict[str, str]) -> dict[str, Any]:
    """A CSV row's fields as numbers where they are numbers; an empty field is None."""
    found: dict[str, Any] = dict(values)
    for name in ("path", "error"):
        found[name] = plain_cell(values[name] or "")
    found["note"] = plain_cell(values.get("note") or "")
    for name in ("score", "quality", _DEVIATION, *_MEANING):
        found[name] = float(values[name]) if values.get(name) else None
    for name in (*_BOX, "width", "height", "crops_used"):
        found[name] = int(values[name]) if values.get(name) else None
    found["crop_scores"] = json.loads(values["crop_scores"]) if values.get("crop_scores") else []
    return found


def _from_values(values: dict[str, Any]) -> Row:
    box = [int(values[name]) for name in _BOX if values.get(name) is not None]
    score, quality = _number(values["score"]), _number(values["quality"])
    error = values["error"] or ""
    path = values["path"]
    if not isinstance(path, str) or not isinstance(error, str):
        raise ValueError("a row's path or error is no text")
    return Row(
        path=path,
        score=score,
        quality=quality,
        error=error,
        box=(box[0], box[1], box[2], box[3]) if len(box) == 4 else None,
        crops=tuple(float(value) for value in values.get("crop_scores") or ()),
        decoder=str(values.get("decoder") or ""),
        note=str(values.get("note") or ""),
        width=_whole(values.get("width")),
        height=_whole(values.get("height")),
        percentile=_number(values.get("percentile")),
        lower=_number(values.get("lower")),
        upper=_number(values.get("upper")),
        unusual=_number(values.get("unusual")),
        deviation=_number(values.get(_DEVIATION)),
        crops_used=_whole(values.get("crops_used")),
    )


def _whole(value: object) -> int | None:
    """A whole number; None where a file of an earlier version has no such column."""
    number = _number(value)
    return None if number is None else int(number)


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if value is None:
        return None
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{printable(value, 40)} is no score")
    return float(value)


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
            writer.writerow([_cell(value) for value in values.values()])
            count += 1
    return count


def _cell(value: object) -> str:
    """A CSV field that no spreadsheet runs; `_typed` undoes it."""
    if value is None:
        return ""
    return spreadsheet_cell(value) if isinstance(value, str) else repr(value)


def _write_jsonl(rows: Iterator[Row], file: Path, layout: Layout) -> int:
    count = 0
    with file.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps(layout.values(row)) + "\n")
            count += 1
    return count


def _write_parquet(rows: Iterator[Row], file: Path, layout: Layout) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"score": pa.float64(), "quality": pa.float64(), "higher_is_better": pa.bool_()}
    types |= dict.fromkeys((*_BOX, "width", "height", "crops_used"), pa.int32())
    types |= dict.fromkeys((*_MEANING, _DEVIATION), pa.float64())
    types |= {"crop_scores": pa.list_(pa.float64())}
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
