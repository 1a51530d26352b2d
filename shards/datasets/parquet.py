"""Tables in Parquet and Arrow, their labels: columns of pictures are named, not read.

Hugging Face keeps images in a column `image: struct<bytes: binary, path: string>`; `pictures.py`
reads those. All of it happens in a child process (`foreign.py`).
"""

import datetime
import decimal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.datasets.foreign import read_in_child
from shards.datasets.values import one_name_each
from shards.errors import ShardError
from shards.text import printable

if TYPE_CHECKING:
    import pyarrow as pa

MOST_BYTES = 1 << 42
"""A file of pictures may be of any size: it is read in pieces."""

_BATCH = 4096
_ARROW = b"ARROW1"
_PEEK = 4
_IMAGES = (b"\xff\xd8\xff", b"\x89PNG", b"BM", b"RIFF", b"GIF8", b"II*\0", b"MM\0*")


@dataclass(frozen=True, kw_only=True)
class ParquetHead:
    """What a file says about itself."""

    names: tuple[str, ...]
    """Columns, in lower case."""
    pictures: tuple[str, ...]
    """Those of them that hold encoded images."""
    mean_bytes: int
    """Of a row, pictures included, as far as the file says so."""
    rows: int
    """How many there are."""
    lists: tuple[str, ...] = ()
    """Columns that hold lists of encoded images."""


def read_head(path: Path) -> ParquetHead:
    """Names of the columns and which of them hold pictures.

    Raises:
        ShardError: If the file is damaged, or two columns have one name.
    """
    names, pictures, mean_bytes, rows, lists = next(_answers(path))
    return ParquetHead(
        names=tuple(names),
        pictures=tuple(pictures),
        mean_bytes=mean_bytes,
        rows=rows,
        lists=tuple(lists),
    )


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as mappings with lower-case names; a cell of a nested column is a dict of its type.

    Of a picture only the `path` that was stored with it is there: `{"path": "a.jpg"}`.

    Raises:
        ShardError: If the file is damaged, or two columns have one name.
    """
    answers = _answers(path)
    names, *_ = next(answers)
    for columns in answers:
        yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _answers(path: Path) -> Iterator[Any]:
    return read_in_child("shards.datasets.parquet:batches", path, limit_bytes=MOST_BYTES)


def batches(path: Path, options: object) -> Iterator[list[Any]]:
    """The head, then batches of columns, in this process: run by `read_in_child`."""
    import pyarrow as pa

    schema, rows, size_bytes, read = open_columns(path)
    names = one_name_each(schema.names, where=str(path))
    pictures = {field.name for field in schema if _is_picture(field, read)}
    held = [name for name, field in zip(names, schema, strict=True) if field.name in pictures]
    lists = [name for name, field in zip(names, schema, strict=True) if _is_list(field.type)]
    yield [names, held, size_bytes // max(1, rows), rows, lists]
    # A nested column is not read at all; of a picture, its name alone.
    flat = [f.name for f in schema if f.name not in pictures and not pa.types.is_nested(f.type)]
    leaves = [f"{f.name}.path" for f in schema if f.name in pictures and _has_path(f.type)]
    if not flat and not leaves:
        raise ShardError(f"{printable(path)}: has no column besides nested ones", exit_code=3)
    for batch in read([*flat, *leaves], _BATCH, 0):
        yield [_cells(batch, field, is_flat=field.name in flat) for field in schema]


def _is_picture(
    field: "pa.Field", read: "Callable[[list[str], int, int], Iterator[pa.RecordBatch]]"
) -> bool:
    """Whether a column is one of encoded images: by its type, or by its first values."""
    import pyarrow as pa

    if pa.types.is_struct(field.type):
        place = field.type.get_field_index("bytes")
        return place >= 0 and _is_binary(field.type.field(place).type)
    if not _is_binary(field.type):
        return False
    values: Any = next((batch.column(field.name) for batch in read([field.name], _PEEK, 0)), ())
    return any(value.as_py()[:12].startswith(_IMAGES) for value in values if value.is_valid)


def _is_list(kind: "pa.DataType") -> bool:
    """Whether cells are lists of encoded images."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    if not pa.types.is_struct(inner):
        return _is_binary(inner)
    place = inner.get_field_index("bytes")
    return place >= 0 and _is_binary(inner.field(place).type)


def open_columns(
    path: Path,
) -> "tuple[pa.Schema, int, int, Callable[[list[str], int, int], Iterator[pa.RecordBatch]]]":
    """Schema, rows, bytes, and a function of (leaves, rows at a time, first row) to read them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with path.open("rb") as stream:
        begin = stream.read(4)
    if begin == b"PAR1":
        file = pq.ParquetFile(path, memory_map=False, buffer_size=1 << 20)
        data = file.metadata
        size = sum(data.row_group(k).total_byte_size for k in range(data.num_row_groups))

        def read(leaves: list[str], count: int, first: int) -> Iterator[pa.RecordBatch]:
            yield from _parquet_rows(file, leaves, count, first)

        return file.schema_arrow, data.num_rows, size, read
    schema, rows, size, read_arrow = _open_arrow(path)
    return schema, rows, size, read_arrow


def _parquet_rows(file: Any, leaves: list[str], count: int, first: int) -> "Iterator[Any]":
    """Batches from row `first` on; groups of rows before it are not read."""
    groups: list[int] = []
    before, left = 0, first
    for number in range(file.metadata.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if before + rows > first:
            left = first - before if not groups else left
            groups.append(number)
        before += rows
    if not groups:
        return
    for batch in file.iter_batches(count, row_groups=groups, columns=leaves, use_threads=False):
        if left < batch.num_rows:
            yield batch.slice(left)
        left = max(0, left - batch.num_rows)


def _open_arrow(path: Path) -> Any:
    import pyarrow as pa

    def opened() -> Any:
        source = pa.memory_map(str(path))
        is_file = source.read(len(_ARROW)) == _ARROW
        source.seek(0)
        return pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)

    def all_batches() -> Iterator[Any]:
        reader = opened()
        if hasattr(reader, "num_record_batches"):
            yield from (reader.get_batch(k) for k in range(reader.num_record_batches))
        else:
            yield from reader

    def read(leaves: list[str], count: int, first: int) -> Iterator[Any]:
        for batch in all_batches():
            if first < batch.num_rows:
                for start in range(first, batch.num_rows, count):
                    yield batch.slice(start, count)
            first = max(0, first - batch.num_rows)

    rows = sum(batch.num_rows for batch in all_batches())
    return opened().schema, rows, path.stat().st_size, read


def _cells(batch: "pa.RecordBatch", field: "pa.Field", *, is_flat: bool) -> list[Any]:
    if is_flat:
        return [_plain(value) for value in batch.column(field.name).to_pylist()]
    if _has_path(field.type):
        names = batch.column(field.name).field("path").to_pylist()
        return [{"path": name} for name in names]
    return [{str(field.type)[:200]: None}] * batch.num_rows


def _has_path(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    place, data = kind.get_field_index("path"), kind.get_field_index("bytes")
    return place >= 0 and data >= 0 and bool(pa.types.is_string(kind.field(place).type))


def _is_binary(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"bytes": None}
    if isinstance(value, decimal.Decimal):
        return None if value.is_nan() else int(value) if value == int(value) else float(value)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return str(value)
    return value
