"""`samples.parquet`: one row per sample, read column by column, only when a column is asked for.

Row i has id i, always. A rejected image keeps its row (`ok` is False, no bytes), so that the ids of
the others do not move when it is repaired; whoever iterates takes `ids()`, not `range(len())`.
Columns of numbers of a large table are mapped from files that processes share (`columns.py`).
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.columns import SHARED_FROM_ROWS, ColumnFiles, Pieces
from shards.errors import ShardError
from shards.score_scale import MOST_SCORE

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("ok", pa.bool_()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("codec", pa.string()),
        ("mos", pa.float64()),
        ("mos_std", pa.float64()),
        ("group", pa.string()),
        ("group_key", pa.int64()),
        ("distortion", pa.string()),
        ("level", pa.int32()),
        ("subset", pa.string()),
        ("part", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.binary(32)),
    ]
)
NO_LEVEL = -1
_DICTIONARY = ["codec", "distortion", "subset", "part"]
_TEXTS = frozenset(field.name for field in SCHEMA if pa.types.is_string(field.type))
# As they lie in the shared files; `ids` is not in the table but follows from `ok`.
_DTYPES = {"ids": np.int64, "sha256": np.uint8} | {
    field.name: field.type.to_pandas_dtype()
    for field in SCHEMA
    if pa.types.is_primitive(field.type)
}
_ROWS_PER_GROUP = 131_072
_MOST = 2**31 - 1
_LIMITS = {
    "offset": (-1, 2**53),
    "size": (0, 2**30),
    "width": (0, _MOST),
    "height": (0, _MOST),
    "level": (NO_LEVEL, _MOST),
    "mos": (-MOST_SCORE, MOST_SCORE),
    "mos_std": (-MOST_SCORE, MOST_SCORE),
}
"""What a value of a column may be; NaN is neither below nor above."""


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One row of the table."""

    id: int
    ok: bool
    shard: int
    offset: int
    size: int
    width: int
    height: int
    codec: str
    mos: float
    mos_std: float
    group: str
    group_key: int
    distortion: str
    level: int
    subset: str
    part: str
    path: str
    sha256: bytes


def group_key(group: str) -> int:
    """A number for a group's name: the first 8 bytes of its BLAKE2b, as a signed integer.

    Two groups that should ever share a number are kept together by a split, which is harmless.
    """
    digest = hashlib.blake2b(group.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def described_row(set_name: str, row: SampleRow) -> dict[str, Any]:
    """What the JSON member of a row's sample says."""

    def known(value: float) -> float | None:
        return None if math.isnan(value) else value

    return {
        "id": row.id,
        "set": set_name,
        "path": row.path,
        "mos": known(row.mos),
        "mos_std": known(row.mos_std),
        "group": row.group,
        "distortion": row.distortion,
        "level": None if row.level == NO_LEVEL else row.level,
        "subset": row.subset,
        "part": row.part,
        "width": row.width,
        "height": row.height,
        "codec": row.codec,
        "sha256": row.sha256.hex(),
    }


DESCRIBED = pa.schema(
    [
        ("id", pa.int64()),
        ("set", pa.string()),
        ("path", pa.string()),
        ("mos", pa.float64()),
        ("mos_std", pa.float64()),
        ("group", pa.string()),
        ("distortion", pa.string()),
        ("level", pa.int64()),
        ("subset", pa.string()),
        ("part", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("codec", pa.string()),
        ("sha256", pa.string()),
    ]
)
"""Names and types of `described_row`, null where it says None."""


def to_arrow(rows: list[SampleRow]) -> pa.Table:
    """Rows as an Arrow table of this module's schema."""
    columns = {name: [getattr(row, name) for row in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def write_parquet(path: Path | pa.NativeFile, tables: Iterable[pa.Table]) -> None:
    """Write tables one after another, in row groups of a size that keeps memory flat.

    Args:
        path: Where to, or an open stream.
        tables: Of this module's schema, in order of ids.
    """
    held: list[pa.Table] = []
    rows = 0
    with pq.ParquetWriter(
        path, SCHEMA, compression="zstd", use_dictionary=_DICTIONARY, write_statistics=False
    ) as writer:
        for table in tables:
            held.append(table)
            rows += table.num_rows
            if rows >= _ROWS_PER_GROUP:
                writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)
                held, rows = [], 0
        if held:
            writer.write_table(pa.concat_tables(held), row_group_size=_ROWS_PER_GROUP)


class SampleTable:
    """Columns of `samples.parquet` as numpy arrays, each read on first use and kept.

    Arrays are read-only. `mos` and `mos_std` are NaN where unknown, `level` is -1 where there is
    none, `sha256` is uint8 `[n, 32]`.
    """

    def __init__(
        self, path: Path, files: ColumnFiles | None = None, *, shards: int | None = None
    ) -> None:
        """Open the table; no column is read yet.

        Args:
            path: `samples.parquet` on this machine.
            files: Where columns of numbers may be shared between processes; None reads all into
                this one's memory.
            shards: How many the set has; None if that is not known.

        Raises:
            ShardError: If it is no sample table.
        """
        self.path_of_file = path
        try:
            self._file = pq.ParquetFile(path, memory_map=True)
            found = self._file.schema_arrow
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(
                f"{path}: not readable as a sample table ({error}); build the set again",
                exit_code=3,
            ) from error
        missing = [field.name for field in SCHEMA if field not in list(found)]
        if missing:
            raise ShardError(
                f"{path}: columns {', '.join(missing)} are missing or of another type; build again",
                exit_code=3,
            )
        self._columns: dict[str, NDArray[Any]] = {}
        self._limits = _LIMITS | {"shard": (-1, _MOST if shards is None else shards - 1)}
        self.files = files if len(self) >= SHARED_FROM_ROWS else None

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    @property
    def id(self) -> NDArray[np.int64]:
        """Row numbers, 0 .. len - 1."""
        return np.arange(len(self), dtype=np.int64)

    @property
    def ok(self) -> NDArray[np.bool_]:
        """False where the image was rejected at build time; such a row has no bytes."""
        return self._numpy("ok")

    @property
    def shard(self) -> NDArray[np.int32]:
        """Index into the manifest's shards."""
        return self._numpy("shard")

    @property
    def offset(self) -> NDArray[np.int64]:
        """Byte in the shard where the image starts; -1 if rejected."""
        return self._numpy("offset")

    @property
    def size(self) -> NDArray[np.int64]:
        """Bytes of the encoded image."""
        return self._numpy("size")

    @property
    def width(self) -> NDArray[np.int32]:
        """Pixels, as displayed."""
        return self._numpy("width")

    @property
    def height(self) -> NDArray[np.int32]:
        """Pixels, as displayed."""
        return self._numpy("height")

    @property
    def codec(self) -> NDArray[np.object_]:
        """jpg, png, bmp or webp."""
        return self._numpy("codec")

    @property
    def mos(self) -> NDArray[np.float64]:
        """Raw score; NaN if unlabelled."""
        return self._numpy("mos")

    @property
    def mos_std(self) -> NDArray[np.float64]:
        """Spread of the opinions in raw units; NaN if unknown."""
        return self._numpy("mos_std")

    @property
    def group(self) -> NDArray[np.object_]:
        """Name of the group that a split keeps together."""
        return self._numpy("group")

    @property
    def group_key(self) -> NDArray[np.int64]:
        """The group as a number (see `group_key` above); equal groups have equal keys."""
        return self._numpy("group_key")

    @property
    def distortion(self) -> NDArray[np.object_]:
        """Family of the distortion, or empty."""
        return self._numpy("distortion")

    @property
    def level(self) -> NDArray[np.int32]:
        """Level within the family, -1 if none."""
        return self._numpy("level")

    @property
    def subset(self) -> NDArray[np.object_]:
        """Named portion of the set, or empty."""
        return self._numpy("subset")

    @property
    def part(self) -> NDArray[np.object_]:
        """Official part: train, val, test or empty."""
        return self._numpy("part")

    @property
    def path(self) -> NDArray[np.object_]:
        """Original name inside the set."""
        return self._numpy("path")

    @property
    def sha256(self) -> NDArray[np.uint8]:
        """Hash of the stored image bytes, uint8 [n, 32]."""
        return self._numpy("sha256")

    @functools.cached_property
    def _ids(self) -> NDArray[np.int64]:
        ok = self.ok
        mapped = self._shared("ids", (int(np.count_nonzero(ok)),), lambda: _places(ok))
        return np.concatenate([*_places(ok)]) if mapped is None else mapped

    def stored_ids(self) -> NDArray[np.int64]:
        """The table's own column of ids, which must be 0 .. len - 1."""
        return self._read("id")

    def ids(self) -> NDArray[np.int64]:
        """Ids of the usable samples, ascending."""
        return self._ids

    def row(self, id: int) -> SampleRow:
        """One row as a whole.

        Raises:
            IndexError: If there is no such id.
        """
        if not 0 <= id < len(self):
            raise IndexError(f"id {id} is not in 0 .. {len(self) - 1}")
        values = {name: self._numpy(name)[id] for name in SCHEMA.names if name != "sha256"}
        digest = self.sha256[id].tobytes()
        return SampleRow(
            sha256=digest,
            **{k: v.item() if isinstance(v, np.generic) else v for k, v in values.items()},
        )

    def arrow(self, columns: list[str]) -> Iterable[pa.RecordBatch]:
        """Batches of some columns, for passes that must not hold a whole column."""
        batches: Iterable[pa.RecordBatch] = self._file.iter_batches(
            batch_size=_ROWS_PER_GROUP, columns=columns
        )
        return batches

    def _numpy(self, name: str) -> NDArray[Any]:
        if name not in self._columns:
            array = self._read(name)
            array.setflags(write=False)
            self._columns[name] = array
        return self._columns[name]

    def _read(self, name: str) -> NDArray[Any]:
        shape = (len(self), 32) if name == "sha256" else (len(self),)
        with self._damage_named(name):
            if name not in _TEXTS:
                mapped = self._shared(name, shape, lambda: self._pieces(name))
                if mapped is not None:
                    return mapped
            array = self._checked(_to_numpy(self._file.read([name]).column(0), name), name)
            # A damaged footer may lose rows without an error, and ids would be of others.
            if array.shape != shape:
                raise ValueError(f"{len(array):,} of {len(self):,} rows")
            return array

    def _pieces(self, name: str) -> Iterator[NDArray[Any]]:
        # Named here: to whoever writes the pieces, an error of reading looks like one of writing.
        with self._damage_named(name):
            for batch in self.arrow([name]):
                yield self._checked(_to_numpy(batch.column(0), name), name)
        # Parquet's buffers are not needed again, and would count as this process's memory.
        pa.default_memory_pool().release_unused()

    def _checked(self, values: NDArray[Any], name: str) -> NDArray[Any]:
        """The values, if none is one that no build writes: others compute with them."""
        if name not in self._limits or values.size == 0:
            return values
        low, high = self._limits[name]
        wrong = (values < low) | (values > high) | np.isinf(values)
        if wrong.any():
            raise ValueError(f"holds {values[wrong][0]}, it should be {low:g} .. {high:g}")
        return values

    @contextlib.contextmanager
    def _damage_named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(
                f"{self.path_of_file}: column {name} is damaged ({error}); build again",
                exit_code=3,
            ) from error

    def _shared(self, name: str, shape: tuple[int, ...], pieces: Pieces) -> NDArray[Any] | None:
        return None if self.files is None else self.files.make(name, _DTYPES[name], shape, pieces)


def _places(ok: NDArray[np.bool_]) -> Iterator[NDArray[np.int64]]:
    # At least one piece, so that an empty table has an array of the right type too.
    for start in range(0, max(len(ok), 1), _ROWS_PER_GROUP):
        yield np.flatnonzero(ok[start : start + _ROWS_PER_GROUP]).astype(np.int64) + start


def _to_numpy(column: Any, name: str) -> NDArray[Any]:
    if column.null_count:
        raise ValueError(f"{column.null_count:,} values are missing")
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks else pa.array([], column.type)
    if name == "sha256":
        flat = np.frombuffer(column.buffers()[1] or b"", np.uint8)
        start = column.offset * 32
        return flat[start : start + 32 * len(column)].reshape(-1, 32)
    if pa.types.is_string(column.type):
        # Repeated names become one object each: a tenth of the memory for groups and families.
        encoded = column.dictionary_encode()
        names = np.asarray(encoded.dictionary.to_pylist(), dtype=object)
        decoded: NDArray[np.object_] = names[encoded.indices.to_numpy(zero_copy_only=False)]
        return decoded
    return np.array(column.to_numpy(zero_copy_only=False))
