"""Tables as people have them, through the command that packs them: bad rows are named, or left out.

The tables are CSVs of a study; `shards/datasets/table.py` reads them.
"""

import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from shards.cli import cli
from shards.errors import ShardError
from shards.read import open_set

Picture = Callable[..., bytes]
BAD = {
    "b2.png": ("", "score '' is not a finite number"),
    "b3.png": ("nan", "score 'nan' is not a finite number"),
    "b4.png": ("good", "score 'good' is not a finite number"),
    "gone.png": ("2", "gone.png"),
    "": ("2", "names no image"),
}


def build(table: Path, out: Path, *options: object) -> Result:
    line = ["build", "table", table, "--output", out, "--workers", "1", "--no-progress", *options]
    return CliRunner().invoke(cli, [str(word) for word in line])


def message_of(done: Result) -> str:
    assert isinstance(done.exception, ShardError), done.output
    assert done.exception.exit_code == 3
    return str(done.exception)


@pytest.fixture
def photos(tmp_path: Path, picture: Picture) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a0.png", "a1.png", "b2.png", "b3.png", "b4.png"):
        (folder / name).write_bytes(picture(int(name[1])))
    return folder


def write(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("path,score\n" + "".join(f"{name},{score}\n" for name, score in rows))
    return path


def test_bad_rows_are_named_at_once_or_rejected(tmp_path: Path, photos: Path) -> None:
    rows = [("a0.png", "1"), ("a1.png", "2"), *((name, score) for name, (score, _) in BAD.items())]
    table = write(tmp_path / "labels.csv", rows)
    options = ("--images", photos)
    message = message_of(build(table, tmp_path / "out", *options))
    assert f"{table}: of its rows, 5 cannot be packed" in message
    for number, (_, why) in enumerate(BAD.values(), start=4):
        assert f"row {number}: " in message
        assert why in message
    assert "--on-error skip" in message
    assert not (tmp_path / "out").exists()
    done = build(table, tmp_path / "out", *options, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert "5 images were left out" in done.output
    found = [json.loads(s) for s in (tmp_path / "out/rejected.jsonl").read_text().splitlines()]
    assert [line["path"] for line in found] == [*list(BAD)[:4], "row-00000008"]
    for line, (_, why) in zip(found, BAD.values(), strict=True):
        assert why in line["error"]
    packed = open_set(tmp_path / "out")
    assert packed.samples.path[packed.ids()].tolist() == ["a0.png", "a1.png"]
    assert (packed.manifest.score.low, packed.manifest.score.high) == (1.0, 2.0)
    again = build(table, tmp_path / "out", *options, "--on-error", "skip")
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize("is_there", [True, False])
def test_of_many_bad_rows_the_first_twenty_are_named(
    tmp_path: Path, picture: Picture, is_there: bool
) -> None:
    (tmp_path / "ok.png").write_bytes(picture(1))
    for k in range(30 if is_there else 0):
        (tmp_path / f"b{k:03d}.png").write_bytes(b"not looked at")
    bad = [(f"b{k:03d}.png", "" if is_there else "3") for k in range(30)]
    message = message_of(
        build(write(tmp_path / "l.csv", [("ok.png", "1"), *bad]), tmp_path / "out")
    )
    assert ("30 cannot be packed, the first 20 are" in message) == is_there
    assert ("30 of 31 labelled images are not there" in message) != is_there
    assert all(f"row {k}: " in message for k in range(3, 23))
    assert "row 23" not in message
    assert "--on-error skip" in message


def test_a_table_without_a_usable_row_is_refused_also_when_skipping(
    tmp_path: Path, photos: Path
) -> None:
    table = write(tmp_path / "l.csv", [("a0.png", "good"), ("a1.png", "bad")])
    options = ("--images", photos, "--extra-files", "ignore", "--on-error", "skip")
    assert "of its rows, 2 cannot be packed, they are: row 2: " in message_of(
        build(table, tmp_path / "out", *options)
    )


@pytest.mark.parametrize("cell", ["", "3/10"])
def test_an_update_with_a_bad_row_does_not_advise_to_skip_it(
    tmp_path: Path, photos: Path, cell: str
) -> None:
    options = ("--images", photos, "--extra-files", "ignore")
    good = write(tmp_path / "l.csv", [("a0.png", "1"), ("a1.png", "2")])
    assert build(good, tmp_path / "out", *options).exit_code == 0
    bad = write(tmp_path / "new.csv", [("a0.png", cell), ("a1.png", "2")])
    line = ["update", str(tmp_path / "out"), str(bad), "--on-error", "skip"]
    message = message_of(CliRunner().invoke(cli, line))
    assert "row 2: score" in message
    assert "skip" not in message


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("3/10", "a fraction"),
        ("3 ± .3", "--std-column"),
        ("3 +/- 0.3", "--std-column"),
        ("3 (0.3)", "--std-column"),
        ("'3", "a number in quotation marks"),
        ("73 %", "percent signs"),
    ],
)
def test_a_score_with_more_than_its_number_is_named(
    tmp_path: Path, photos: Path, cell: str, why: str
) -> None:
    table = write(tmp_path / "l.csv", [("a0.png", cell), ("a1.png", "2")])
    message = message_of(
        build(table, tmp_path / "o", "--images", photos, "--extra-files", "ignore")
    )
    assert f"{table}: row 2: score {cell!r} is not a finite number" in message
    assert why in message


def write_lists(path: Path, picture: Picture) -> Path:
    """Two images and one score in each row, in Parquet or as Arrow's file or stream."""
    images = [
        [{"bytes": picture(2 * k + j), "path": f"{k}{j}.png"} for j in (0, 1)] for k in (0, 1)
    ]
    table = pa.table({"score": [1.0, 2.0], "Images": images})
    if path.suffix == ".parquet":
        pq.write_table(table, path)
        return path
    make = pa.ipc.new_file if path.stem == "file" else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as out, make(out, table.schema) as writer:
        writer.write_table(table)
    return path


@pytest.mark.parametrize("name", ["l.parquet", "file.arrow", "stream.arrow"])
@pytest.mark.parametrize("options", [(), ("--path-column", "Images")])
def test_a_column_of_lists_is_refused_with_a_command_that_works(
    tmp_path: Path, picture: Picture, name: str, options: tuple[str, ...]
) -> None:
    table = write_lists(tmp_path / name, picture)
    message = message_of(build(table, tmp_path / "out", *options))
    assert "column 'images' holds a list of images in each row" in message
    command = message.split("`")[1].replace("'IN'", repr(str(table)))
    subprocess.run(
        command.replace("python", sys.executable, 1), shell=True, check=True, cwd=tmp_path
    )
    done = build(tmp_path / "OUT.parquet", tmp_path / "out")
    assert done.exit_code == 0, done.output
    packed = open_set(tmp_path / "out")
    assert packed.samples.path.tolist() == ["00.png", "10.png"]
    assert packed.read_bytes(1) == picture(2)


def test_one_json_object_of_scores_by_path_is_read(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "l.json").write_text('{"a0.png": 3, "a1.png": "2.5"}')
    options = ("--images", photos, "--extra-files", "ignore")
    done = build(tmp_path / "l.json", tmp_path / "out", *options)
    assert done.exit_code == 0, done.output
    assert "l.json: read as one object of scores by path" in done.output
    assert open_set(tmp_path / "out").samples.mos.tolist() == [3.0, 2.5]


@pytest.mark.parametrize(
    "text",
    [
        '{"path": "a0.png", "score": 3}',
        '{"path": {"0": "a0.png"}, "score": {"0": 3}}',
        '{"a0.png": {"mos": 3}}',
        "{}",
        "3",
    ],
)
def test_other_json_is_refused_with_how_it_is_written(
    tmp_path: Path, photos: Path, text: str
) -> None:
    (tmp_path / "l.json").write_text(text)
    message = message_of(build(tmp_path / "l.json", tmp_path / "out", "--images", photos))
    assert "no list of objects; write an object for each image" in message
    assert "to_json(PATH, orient='records')" in message


@pytest.mark.parametrize("ending", ["csv", "txt"])
def test_names_in_another_unicode_form_and_of_255_bytes_are_found(
    tmp_path: Path, picture: Picture, ending: str
) -> None:
    names = ["caf\u00e9.png", "a" * 251 + ".png"]
    (tmp_path / "photos").mkdir()
    for k, name in enumerate(names):
        (tmp_path / "photos" / name).write_bytes(picture(k))
    rows = [(unicodedata.normalize("NFD", name), str(k)) for k, name in enumerate(names)]
    table = write(tmp_path / f"l.{ending}", rows)
    done = build(table, tmp_path / "out", "--images", tmp_path / "photos")
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").samples.path.tolist() == names
