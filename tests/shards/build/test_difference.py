"""A build that finds another set says what is different."""

from pathlib import Path

import pytest

from shards.build.build import build
from shards.build.pack import PackOptions
from shards.datasets.table import open_table
from shards.errors import ShardError

HEADER = "path,score,group,split\n"
ROWS = [f"{k}.png,{k},g{k // 2},train" for k in range(6)]


@pytest.mark.parametrize(
    ("rows", "name", "options", "words"),
    [
        ([*ROWS, "6.png,1,x,train", "7.png,2,x,train"], "table", {}, "2 more images; choose"),
        (ROWS[:5], "table", {}, "1 fewer image; choose"),
        ([r.replace(",2,", ",2.5,") for r in ROWS], "table", {}, "the same images, 1 other score;"),
        ([r.replace("train", "val") for r in ROWS], "table", {}, "the same images, 6 other parts;"),
        ([*ROWS[1:], "6.png,1,x,train"], "table", {}, "1 more image, 1 fewer image;"),
        (ROWS, "other", {}, "the same images, the name 'other' instead of 'table';"),
        (ROWS, "table", {"max_pixels": 999}, "the same images and labels, other options"),
    ],
)  # fmt: skip
def test_another_source_is_described(
    tmp_path: Path, picture, rows: list[str], name: str, options: dict, words: str
) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(8):
        (tmp_path / "photos" / f"{k}.png").write_bytes(picture(k))

    def dataset(lines: list[str], name: str = "table"):
        (tmp_path / "l.csv").write_text(HEADER + "\n".join(lines) + "\n")
        return open_table(
            tmp_path / "l.csv", images=tmp_path / "photos", extra_files="ignore", name=name
        )

    build(dataset(ROWS), tmp_path / "out", workers=1)
    with pytest.raises(ShardError, match=r"holds a finished set 'table' of 6 images") as caught:
        build(dataset(rows, name), tmp_path / "out", workers=1, options=PackOptions(**options))
    assert words in str(caught.value)
