"""The same table as CSV, TSV, JSONL, Parquet and xlsx is the same set: samples, groups, splits."""

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.sample_table import group_key

Rows = list[dict[str, Any]]


def _text(value: Any) -> str:
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)


def write_csv(path: Path, rows: Rows, delimiter: str = ",") -> None:
    # With the mark that spreadsheets put in front.
    with path.open("w", encoding="utf-8-sig", newline="") as out:
        writer = csv.writer(out, delimiter=delimiter)
        writer.writerow(rows[0])
        writer.writerows([[_text(value) for value in row.values()] for row in rows])


def write_jsonl(path: Path, rows: Rows) -> None:
    path.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: Rows) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_xlsx(path: Path, rows: Rows) -> None:
    book = openpyxl.Workbook()
    book.active.append(list(rows[0]))
    for row in rows:
        book.active.append([None if _text(value) == "" else value for value in row.values()])
    book.save(path)


WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    "csv": write_csv,
    "tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "xlsx": write_xlsx,
}
NAMES = st.text("abAB01 .-", min_size=1, max_size=6).map(str.strip).filter(lambda s: s != "")


# openpyxl writes 16 digits.
EXACT = st.integers(-(10**6), 10**6).map(lambda k: k / 64)


def column(values: st.SearchStrategy[Any], rows: int) -> st.SearchStrategy[list[Any]]:
    return st.lists(st.one_of(st.none(), values), min_size=rows, max_size=rows)


GROUPS = st.sampled_from(
    [st.integers(0, 2), st.sampled_from([0.0, 1.0, 2.5, math.nan]), st.booleans(), NAMES,
     st.sampled_from(["0", "00", "False", "g 1"])]
)  # fmt: skip


# An example takes two seconds (two children), so none is shrunk.
@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.too_slow],
)
@given(data=st.data())
def test_every_format_of_a_table_gives_the_same_samples(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    count = 9
    columns = {
        name: data.draw(column(data.draw(kinds), count))
        for name, kinds in {
            "group": GROUPS,
            "distortion": GROUPS,
            "subset": GROUPS,
            "level": st.just(st.integers(0, 5)),
            "std": st.just(EXACT.map(abs)),
            "split": st.just(st.sampled_from(["train", "val", "test", ""])),
        }.items()
    }
    scores = data.draw(st.lists(EXACT, min_size=count, max_size=count))
    rows = [
        {"path": f"{k}.png", "score": scores[k]} | {name: c[k] for name, c in columns.items()}
        for k in range(count)
    ]
    folder = tmp_path_factory.mktemp("t")
    for k in range(count):
        (folder / f"{k}.png").write_bytes(b"")
    found = {}
    for ending, write in WRITERS.items():
        write(folder / f"labels.{ending}", rows)
        found[ending] = list(open_table(folder / f"labels.{ending}", images=folder).samples())
    for ending in WRITERS:
        assert found[ending] == found["csv"], ending
    for row, sample in zip(rows, found["csv"], strict=True):
        if _text(row["group"]) in ("", "nan"):
            assert sample.group == row["path"]
        else:
            assert sample.group != row["path"]
            assert group_key(sample.group) == group_key(found["parquet"][int(sample.path[0])].group)


@pytest.mark.parametrize("ending", WRITERS)
@pytest.mark.parametrize("zero", [0, 0.0, False])
def test_a_group_numbered_zero_is_a_group(tmp_path: Path, ending: str, zero: Any) -> None:
    rows: Rows = [
        {"path": f"{k}.png", "score": 1.0 + k, "group": zero, "distortion": zero, "subset": zero}
        for k in range(3)
    ]
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(b"")
    WRITERS[ending](tmp_path / f"labels.{ending}", rows)
    samples = list(open_table(tmp_path / f"labels.{ending}", images=tmp_path).samples())
    expected = "False" if zero is False else "0"
    assert {sample.group for sample in samples} == {expected}
    assert {sample.distortion for sample in samples} == {expected}
    assert {sample.subset for sample in samples} == {expected}


@pytest.mark.parametrize("ending", WRITERS)
def test_two_columns_that_differ_in_case_are_refused(tmp_path: Path, ending: str) -> None:
    WRITERS[ending](tmp_path / f"x.{ending}", [{"path": "a.png", "score": 1.0, "Score": 2.0}])
    with pytest.raises(ShardError, match="'score' and 'Score' have one name"):
        open_table(tmp_path / f"x.{ending}", images=tmp_path)


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_column_of_pictures_is_no_path(tmp_path: Path, ending: str) -> None:
    rows: Rows = [{"image": {"bytes": "x" * 300_000, "path": None}, "score": 1.0}]
    WRITERS[ending](tmp_path / f"x.{ending}", rows)
    with pytest.raises(ShardError, match=r"image: holds a structure of .*bytes") as caught:
        open_table(tmp_path / f"x.{ending}", images=tmp_path)
    assert len(str(caught.value).encode()) <= 600


def test_a_name_that_stands_twice_in_a_json_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"path": "a.png", "score": 1, "score": 2}\n')
    with pytest.raises(ShardError, match="'score' and 'score' have one name"):
        open_table(tmp_path / "x.jsonl", images=tmp_path)


@pytest.mark.parametrize("score", ["1_0", "True", "0x10", "1,5,2", "NaN", "inf"])
def test_what_is_no_number_is_no_score(tmp_path: Path, score: str) -> None:
    (tmp_path / "x.tsv").write_text(f"path\tscore\na.png\t{score}\n")
    with pytest.raises(ShardError, match=r"row 2: score .* is not a finite number"):
        open_table(tmp_path / "x.tsv", images=tmp_path)
