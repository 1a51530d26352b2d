from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcl.errors import LmclError
from lmcl.evaluation.predictions import complete, make_predictions, read_csv

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(NAMES, st.floats(-1e30, 1e30, allow_nan=False)), max_size=8))
def test_reading_what_was_written_gives_the_same_columns(tmp_path_factory, rows) -> None:
    file = tmp_path_factory.mktemp("p") / "test.csv"
    written = make_predictions(
        id=np.arange(len(rows)),
        path=[name for name, _ in rows],
        mos=[value for _, value in rows],
        prediction=[value / 3 for _, value in rows],
        subset=[name[::-1] for name, _ in rows],
        size=np.full((len(rows), 2), 240),
    )
    written.write_csv(file)
    read = read_csv(file)
    for column in ("id", "path", "mos", "prediction", "mos_std", "subset", "level", "height", "y"):
        np.testing.assert_array_equal(getattr(read, column), getattr(written, column))


def test_ids_are_sorted_and_rows_move_with_them() -> None:
    found = make_predictions(id=[3, 1], path=["c", "a"], mos=[30.0, 10.0], prediction=[3.0, 1.0])
    assert found.path.tolist() == ["a", "c"]
    assert found.mos.tolist() == [10.0, 30.0]


def test_an_id_that_occurs_twice_is_refused() -> None:
    with pytest.raises(LmclError, match="ids must rise and be unique") as caught:
        make_predictions(id=[1, 1], path=["a", "b"], mos=[1.0, 2.0], prediction=[1.0, 2.0])
    assert caught.value.exit_code == 3


def test_padding_of_a_distributed_loader_is_dropped_and_order_restored() -> None:
    gathered = complete([5, 2, 9, 5, 5], [0.5, 0.2, 0.9, 0.5, 0.5], [2, 5, 9])
    assert gathered.tolist() == [0.2, 0.5, 0.9]


@pytest.mark.parametrize(
    ("ids", "values", "message"),
    [
        ([2, 5], [0.2, 0.5], "missing ids 9"),
        ([2, 5, 9, -1], [0.2, 0.5, 0.9, 0.0], "ids of other parts -1"),
        ([2, 5, 9, 9], [0.2, 0.5, 0.9, 0.8], "ids 9 have two different values"),
    ],
    ids=["missing", "padding-minus-one", "batch-dependent"],
)
def test_incomplete_or_contradicting_predictions_are_refused(ids, values, message) -> None:
    with pytest.raises(LmclError, match=message):
        complete(ids, values, [2, 5, 9])


def test_a_missing_file_names_the_command_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(LmclError, match="lmcl eval") as caught:
        read_csv(tmp_path / "test.csv")
    assert caught.value.exit_code == 4


def test_a_field_that_is_no_number_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text("id,path,mos,prediction\n0,a.png,1.0,2.0\n1,b.png,good,2.0\n")
    with pytest.raises(LmclError, match="line 3, column mos: 'good'"):
        read_csv(file)


def test_a_file_without_predictions_column_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "test.csv"
    file.write_text("id,path,mos\n0,a.png,1.0\n")
    with pytest.raises(LmclError, match="column prediction is missing"):
        read_csv(file)
