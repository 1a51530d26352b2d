"""Label tables in Parquet."""

import datetime
import decimal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.datasets.foreign import read_in_child
from shards.datasets.values import one_name_each
from shards.source_files import MAX_TABLE_BYTES

_BATCH = 4096


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """Rows as mappings with lower-case names; a cell of a nested column is a dict of its type.

    Raises:
        ShardError: If the file is damaged, or two columns have one name.
    """
    answers = read_in_child("shards.datasets.parquet:batches", path, limit_bytes=MAX_TABLE_BYTES)
    names = next(answers)
    for columns in answers:
        yield from (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def batches(path: Path, options: object) -> Iterator[list[Any]]:
    """The columns' names, then batches of columns, in this process: run by `read_in_child`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    with pq.ParquetFile(path, memory_map=False) as file:
        schema = file.schema_arrow
        yield one_name_each(schema.names, where=str(path))
        # A nested column of pictures is not read at all.
        flat = [field.name for field in schema if not pa.types.is_nested(field.type)]
        for batch in file.iter_batches(_BATCH, columns=flat, use_threads=False):
            found = {name: [_plain(v) for v in batch.column(name).to_pylist()] for name in flat}
            yield [
                found[field.name]
                if field.name in found
                else [{str(field.type): None}] * batch.num_rows
                for field in schema
            ]


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
