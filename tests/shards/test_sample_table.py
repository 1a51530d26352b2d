from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.columns import ColumnFiles
from shards.errors import ShardError
from shards.read import ShardSet
from shards.sample_table import SCHEMA, SampleTable, group_key


def test_row_i_has_id_i(packed: ShardSet) -> None:
    table = packed.samples
    np.testing.assert_array_equal(table.id, np.arange(len(table)))
    assert [table.row(k).id for k in range(len(table))] == list(range(len(table)))


def test_columns_hold_what_the_source_said(packed: ShardSet) -> None:
    table = packed.samples
    np.testing.assert_allclose(table.mos, np.arange(12) * 0.5)
    assert table.group[5] == "ref1"
    assert table.path[0] == "Photo 0.v1.png"
    assert set(table.codec) == {"png", "jpg", "bmp"}
    assert (table.width[3], table.height[3], table.level[3]) == (14, 13, 3)
    assert table.sha256.shape == (12, 32)


def test_equal_groups_have_equal_keys(packed: ShardSet) -> None:
    table = packed.samples
    assert [group_key(str(group)) for group in table.group] == table.group_key.tolist()


def test_columns_cannot_be_written_to(packed: ShardSet) -> None:
    with pytest.raises(ValueError, match="read-only"):
        packed.samples.mos[0] = 1.0


@pytest.mark.parametrize("id", [-1, 12])
def test_an_unknown_id_is_an_index_error(packed: ShardSet, id: int) -> None:
    with pytest.raises(IndexError, match=r"not in 0 \.\. 11"):
        packed.samples.row(id)


def test_another_parquet_file_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    pq.write_table(pa.table({"id": [1]}), tmp_path / "x.parquet")
    with pytest.raises(ShardError, match="columns ok, shard"):
        SampleTable(tmp_path / "x.parquet")


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(ShardError, match="not readable as a sample table"):
        SampleTable(tmp_path / "x.parquet")


@pytest.mark.parametrize("shares", [False, True], ids=["in memory", "in files"])
def test_a_damaged_column_is_named_and_is_no_fault_of_the_folder(
    packed: ShardSet,
    tmp_path: Path,
    shares: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("shards.sample_table.SHARED_FROM_ROWS", 1)
    path = packed.samples.path_of_file
    place = pq.ParquetFile(path).metadata.row_group(0).column(SCHEMA.names.index("mos"))
    data = bytearray(path.read_bytes())
    data[place.data_page_offset : place.data_page_offset + 30] = b"\xff" * 30
    path.write_bytes(data)
    table = SampleTable(path, ColumnFiles(tmp_path / "files", path) if shares else None)
    with pytest.raises(ShardError, match="column mos is damaged"):
        _ = table.mos
    assert table.size.shape == (12,)
    assert not caplog.text


def test_a_column_that_lost_rows_is_refused(
    packed: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SampleTable(packed.samples.path_of_file)
    short = pq.read_table(packed.samples.path_of_file, columns=["group"]).slice(0, 7)
    whole = table._file
    monkeypatch.setattr(
        table, "_file", SimpleNamespace(metadata=whole.metadata, read=lambda names: short)
    )
    with pytest.raises(ShardError, match=r"column group is damaged \(7 of 12 rows\)"):
        _ = table.group
