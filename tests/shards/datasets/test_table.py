import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.datasets.table import open_table
from shards.errors import ShardError

ROWS = [
    {"path": "a b.png", "score": 3.5, "std": 0.2, "group": "one", "split": "Training"},
    {"path": "sub/c.PNG", "score": 1.0, "std": None, "group": "two", "split": "test"},
]


@pytest.fixture
def images(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (folder / "a b.png").write_bytes(picture(1))
    (folder / "sub/c.PNG").write_bytes(picture(2))
    return folder


def write_table(path: Path) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    else:
        mark = "\t" if path.suffix == ".tsv" else ","
        lines = [mark.join(ROWS[0])]
        lines += [mark.join("" if v is None else str(v) for v in row.values()) for row in ROWS]
        path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8")


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_every_format_reads_alike(images: Path, tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"labels.{ending}"
    write_table(path)
    first, second = open_table(path, images=images).samples()
    assert (first.path, first.mos, first.mos_std, first.part) == ("a b.png", 3.5, 0.2, "train")
    assert (second.group, second.mos_std, second.part) == ("two", None, "test")
    assert second.file == images / "sub/c.PNG"


def test_case_of_names_does_not_matter(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,score\nA B.PNG,1\nsub/c.png,2\n")
    assert [s.file.name for s in open_table(tmp_path / "l.csv", images=images).samples()] == [
        "a b.png",
        "c.PNG",
    ]


def test_an_image_without_a_group_is_its_own(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,score\na b.png,1\nsub/c.PNG,2\n")
    samples = list(open_table(tmp_path / "l.csv", images=images).samples())
    assert len({sample.group for sample in samples}) == 2


def test_dmos_columns_are_differences(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,dmos\na b.png,1\nsub/c.PNG,2\n")
    score = open_table(tmp_path / "l.csv", images=images).score
    assert score is not None
    assert not score.higher_is_better


def test_an_unlabelled_file_is_refused_unless_ignored(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("path,score\na b.png,1\n")
    with pytest.raises(ShardError, match=r"1 images have no label in l\.csv.*--extra-files ignore"):
        open_table(tmp_path / "l.csv", images=images)
    dataset = open_table(tmp_path / "l.csv", images=images, extra_files="ignore")
    assert len(list(dataset.samples())) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("path,score\n", "has no rows"),
        ("score\n1\n", "no column 'path'"),
        ("path,quality\na b.png,1\n", "no column 'score'"),
        ("path,score\na b.png,nan\n", "row 2: score 'nan' is not a finite number"),
        ("path,score\na b.png,\n", "row 2: score '' is not a finite number"),
        ("path,score\na b.png,inf\n", "not a finite number"),
        ("path,score\na b.png,good\n", "not a finite number"),
        ("path,score\na b.png,73 %\n", "'73 %' is not a finite number; take the percent signs off"),
        ("path,score\na b.png,1,2\n", "row 2 has 3 cells, the header 2"),
        ("path,score\n,1\n", "row 2: names no image"),
        ("path,score\n../secret.png,1\n", "is not inside the images folder"),
        ("path,score\n/etc/passwd,1\n", "is not inside the images folder"),
        ("path,score,split\na b.png,1,holdout\n", "none of train, val, test"),
        *[
            (f"path,score,level\na b.png,1,{level}\n", f"level '{level}' is no whole number from 0")
            for level in ("high", "inf", "nan", "99999999999", "-1", "1.5")
        ],
        ("path,score\na b.png,1e308\n", r"score '1e308' is beyond 1e\+100"),
        ("path,score,std\na b.png,1,-0.5\n", "std '-0.5' is negative"),
        ('path,score\n"a b.png,1\n', "cannot be read"),
    ],
)
def test_a_bad_row_is_named(images: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "l.csv").write_text(text)
    with pytest.raises(ShardError, match=message) as caught:
        open_table(tmp_path / "l.csv", images=images)
    assert "l.csv" in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "data"),
    [("l.jsonl", b"{"), ("l.jsonl", b"[1]"), ("l.parquet", b"PAR1"), ("l.csv", b"\xff\xfe\x00a")],
)
def test_a_damaged_table_is_refused(images: Path, tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ShardError, match=name.replace(".", r"\.")):
        open_table(tmp_path / name, images=images)


def test_an_unknown_ending_is_a_usage_error(images: Path, tmp_path: Path) -> None:
    (tmp_path / "l.dat").write_text("x")
    with pytest.raises(ShardError, match=r"ends in \.csv, \.tsv") as caught:
        open_table(tmp_path / "l.dat", images=images)
    assert caught.value.exit_code == 2
