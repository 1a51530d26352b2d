from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.saliency_table import SaliencyTable


def _table() -> SaliencyTable:
    ids = np.array([2, 5, 9])
    return SaliencyTable(
        ids=ids, boxes=np.stack([ids, ids + 1, ids * 0 + 8, ids * 0 + 8], 1).astype(np.int32)
    )


def test_boxes_are_found_in_the_order_asked_for() -> None:
    assert _table().lookup(np.array([9, 2, 2]))[:, 0].tolist() == [9, 2, 2]


@pytest.mark.parametrize("missing", [0, 3, 10])
def test_a_sample_without_a_box_is_named(missing: int) -> None:
    with pytest.raises(
        PipelineError, match=f"no box for 1 of 2 samples, first {missing}"
    ) as caught:
        _table().lookup(np.array([5, missing]))
    assert caught.value.ids == (missing,)


def test_a_written_table_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "saliency" / "epoch-00.parquet"
    _table().write(path)
    again = SaliencyTable.read(path)
    assert again.ids.tolist() == [2, 5, 9]
    assert np.array_equal(again.boxes, _table().boxes)
    assert [file.name for file in path.parent.iterdir()] == ["epoch-00.parquet"]


def test_a_missing_table_exits_with_missing_input(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="no saliency table there") as caught:
        SaliencyTable.read(tmp_path / "epoch-00.parquet")
    assert caught.value.exit_code == 4


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "epoch-00.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(PipelineError, match="not a saliency table"):
        SaliencyTable.read(path)


def test_unsorted_or_double_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="must increase"):
        SaliencyTable(ids=np.array([2, 2]), boxes=np.zeros((2, 4), dtype=np.int32))
