"""Images in a column of Parquet or Arrow, as Hugging Face writes them, are a set like any other."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmcl.inference.inputs import TableOptions, list_items
from shards.build.build import build
from shards.build.pack import PackOptions
from shards.datasets.pictures import read_picture
from shards.datasets.rows import open_rows
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.read import open_set
from shards.sample import Embedded

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COUNT = 23


def table_of(pictures: list[bytes | None], names: list[str | None], **columns: list) -> pa.Table:
    cells = [{"bytes": b, "path": n} for b, n in zip(pictures, names, strict=True)]
    return pa.table({"image": pa.array(cells, STRUCT), **columns})


def write_stream(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)


def write_arrow(file: Path, table: pa.Table) -> None:
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


WRITERS: dict[str, Callable[[Path, pa.Table], None]] = {
    "groups.parquet": lambda file, table: pq.write_table(table, file, row_group_size=7),
    "one.parquet": lambda file, table: pq.write_table(table, file),
    "stream.arrow": write_stream,
    "file.arrow": write_arrow,
}


@pytest.fixture
def pictures(picture: Callable[..., bytes]) -> list[bytes]:
    return [picture(k, codec=("jpg", "png")[k % 2]) for k in range(COUNT)]


def hub_table(pictures: list[bytes]) -> pa.Table:
    return table_of(
        list(pictures),
        [f"img/{k:03d}.jpg" for k in range(COUNT)],
        MOS=[1 + k % 5 for k in range(COUNT)],
        split=[("train", "test", "validation")[k % 3] for k in range(COUNT)],
    )


@pytest.mark.parametrize("name", WRITERS)
def test_a_hub_table_is_built_and_listed_with_the_same_bytes(
    tmp_path: Path, pictures: list[bytes], name: str
) -> None:
    WRITERS[name](tmp_path / name, hub_table(pictures))
    dataset = open_table(tmp_path / name)
    assert dataset.notes == (f"{name}: read as images from its column 'image'",)
    build(dataset, tmp_path / "out", workers=1)
    packed = open_set(tmp_path / "out")
    assert [data for _, data, _ in packed] == pictures
    assert packed.samples.path.tolist() == [f"img/{k:03d}.jpg" for k in range(COUNT)]
    assert packed.samples.mos.tolist() == [1.0 + k % 5 for k in range(COUNT)]
    assert packed.samples.part.tolist()[:3] == ["train", "test", "val"]
    items = list_items([str(tmp_path / name)])
    order = [*range(0, COUNT, 2), *range(1, COUNT, 2)]
    assert [items[k].read() for k in order] == [pictures[k] for k in order]
    assert items[2].path == f"{tmp_path}/{name}/img/002.jpg"
    assert not any(item.is_file for item in items)


def test_pictures_without_names_are_called_by_their_rows(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    names = ["a.jpg", "a.jpg", None, "/home/x/../b.jpg"]
    pq.write_table(table_of(list(pictures[:4]), names, score=[1, 2, 3, 4]), tmp_path / "x.parquet")
    paths = [sample.path for sample in open_table(tmp_path / "x.parquet").samples()]
    assert paths == [
        "row-00000001-a.jpg",
        "row-00000002-a.jpg",
        "row-00000003",
        "row-00000004-b.jpg",
    ]


def test_a_folder_of_a_hub_has_parts_by_the_names_of_its_files(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    (tmp_path / "data").mkdir()
    for part, one in (("train", 0), ("test", 2), ("validation", 4)):
        table = table_of(pictures[one : one + 2], ["a.jpg", "b.jpg"], mos=[1.0, 2.0])
        pq.write_table(table, tmp_path / "data" / f"{part}-00000-of-00001.parquet")
    samples = list(open_table(tmp_path).samples())
    assert [(s.path, s.part) for s in samples] == [
        (f"{part}-00000-of-00001/{name}.jpg", short)
        for part, short in (("test", "test"), ("train", "train"), ("validation", "val"))
        for name in "ab"
    ]


def test_a_row_without_bytes_is_refused_or_left_out(tmp_path: Path, pictures: list[bytes]) -> None:
    table = table_of([pictures[0], None, pictures[2]], ["a", "b", "c"], score=[1, 2, 3])
    pq.write_table(table, tmp_path / "x.parquet")
    dataset = open_table(tmp_path / "x.parquet")
    with pytest.raises(ShardError, match="row 2 holds no bytes of an image in the column 'image'"):
        build(dataset, tmp_path / "out", workers=1)
    build(dataset, tmp_path / "out", workers=1, options=PackOptions(on_error="skip"))
    assert open_set(tmp_path / "out").manifest.num_rejected == 1
    assert "row 2" in json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["error"]


def test_two_columns_of_pictures_are_refused_and_the_option_chooses(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    table = table_of(list(pictures[:2]), ["a", "b"], score=[1, 2])
    table = table.append_column("Reference", pa.array(pictures[2:4], pa.binary()))
    pq.write_table(table, tmp_path / "x.parquet")
    assert open_rows(tmp_path / "x.parquet").pictures == ("image", "reference")
    with pytest.raises(ShardError, match=r"'image' and 'reference' all hold images.*--path-column"):
        open_table(tmp_path / "x.parquet")
    (first, _) = list_items(
        [str(tmp_path / "x.parquet")], tables=TableOptions(path_column="Reference")
    )
    assert first.read() == pictures[2]


def test_rows_in_any_order_are_the_right_ones(tmp_path: Path, pictures: list[bytes]) -> None:
    pq.write_table(hub_table(pictures), tmp_path / "x.parquet", row_group_size=5)
    for row in (3, 22, 0, 1, 7, 6, 22):
        place = Embedded(column="image", row=row)
        assert read_picture(tmp_path / "x.parquet", place) == pictures[row]
    with pytest.raises(ShardError, match="ends before row 24"):
        read_picture(tmp_path / "x.parquet", Embedded(column="image", row=23))


def test_the_command_reads_a_hub_table_and_says_little(
    tmp_path: Path, pictures: list[bytes]
) -> None:
    pq.write_table(hub_table(pictures), tmp_path / "x.parquet")
    command = [sys.executable, "-c", "from shards.cli import main; main()", "build", "table"]
    command += [str(tmp_path / "x.parquet"), "--output", str(tmp_path / "o"), "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{COUNT} images in 1 shards" in done.stdout
    assert "--protocol official" in done.stdout
    assert len(done.stdout) < 500
