"""Images that lie in a column of a Parquet or Arrow file, read in order, with bounded memory.

`read_picture(path, column, row) -> bytes`. A child process decodes the file (`foreign.py`) from the
row that is asked for first and hands over one picture after another; who asks for rows in order, or
nearly, pays for each once. Pages of a Parquet file are compressed, so a picture has no place in it
that could be read by itself.
"""

import collections
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.datasets.foreign import read_in_child
from shards.datasets.parquet import MOST_BYTES, open_columns
from shards.errors import ShardError
from shards.sample import Embedded
from shards.text import printable

_AT_ONCE = 16
_AHEAD_ROWS = 2048
"""A row further ahead than this is begun at, instead of reading all before it."""
_HELD_BYTES = 64 << 20
_OPEN = 4


def read_picture(path: Path, place: Embedded) -> bytes:
    """The encoded image in one row; safe to call from threads.

    Raises:
        ShardError: If there is no such row, no picture in it, or the file is damaged.
    """
    with _lock:
        key = (str(path), place.column)
        stream = _streams.pop(key, None)
        if stream is None:
            stream = _Stream(path, place.column)
        _streams[key] = stream
        if len(_streams) > _OPEN:
            _streams.popitem(last=False)[1].close()
        data = stream.read(place.row)
    if data is None:
        raise ShardError(
            f"{printable(path)}: row {place.row + 1} holds no bytes of an image in the column "
            f"{place.column!r}; its file was not stored with the table",
            exit_code=3,
        )
    return data


class _Stream:
    """Pictures of one column, in order; a few that were passed over are held."""

    def __init__(self, path: Path, column: str) -> None:
        self._path, self._column = path, column
        self._next = 0
        self._answers: Any = None
        self._held: collections.OrderedDict[int, bytes | None] = collections.OrderedDict()
        self._held_bytes = 0

    def read(self, row: int) -> bytes | None:
        if row in self._held:
            data = self._held.pop(row)
            self._held_bytes -= len(data or b"")
            return data
        if self._answers is None or not 0 <= row - self._next < _AHEAD_ROWS:
            self._begin(row)
        while self._next < row:
            self._hold(self._next, self._following(row))
        return self._following(row)

    def close(self) -> None:
        if self._answers is not None:
            self._answers.close()
        self._answers = None

    def _begin(self, row: int) -> None:
        self.close()
        self._answers = read_in_child(
            "shards.datasets.pictures:batches",
            self._path,
            {"column": self._column, "first": row},
            limit_bytes=MOST_BYTES,
        )
        self._next = row

    def _following(self, row: int) -> bytes | None:
        data: bytes | str | None = next(self._answers, "")
        if isinstance(data, str):
            self.close()
            raise ShardError(
                f"{printable(self._path)}: ends before row {row + 1}; the file changed while it "
                "was read: run the command again",
                exit_code=3,
            )
        self._next += 1
        return data

    def _hold(self, row: int, data: bytes | None) -> None:
        self._held[row] = data
        self._held_bytes += _length(data)
        while self._held_bytes > _HELD_BYTES or len(self._held) > _AHEAD_ROWS:
            self._held_bytes -= _length(self._held.popitem(last=False)[1])


def _length(data: bytes | None) -> int:
    """Of an image that may be absent; an empty one is no absent one."""
    return 0 if data is None else len(data)


_lock = threading.Lock()
_streams: "collections.OrderedDict[tuple[str, str], _Stream]" = collections.OrderedDict()


def batches(path: Path, options: dict[str, Any]) -> Iterator[bytes | None]:
    """Encoded images from a row on, in this process: run by `read_in_child`."""
    import pyarrow as pa

    schema, _, _, read = open_columns(path)
    name = next(name for name in schema.names if name.strip().lower() == options["column"])
    is_struct = pa.types.is_struct(schema.field(name).type)
    for batch in read([f"{name}.bytes" if is_struct else name], _AT_ONCE, options["first"]):
        column = batch.column(name)
        values = column.field("bytes") if is_struct else column
        for valid, value in zip(column.is_valid(), values, strict=True):
            yield value.as_py() if valid.as_py() is True else None
