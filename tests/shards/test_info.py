import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from shards.build.build import build
from shards.datasets.unlabelled import open_unlabelled
from shards.files import check_own
from shards.info import SHEET_MARK, contact_sheet, describe_set
from shards.read import ShardSet, open_set
from shards.sample import DataSet


def test_the_description_counts_what_is_there(packed: ShardSet) -> None:
    text = describe_set(packed)
    for part in (
        "12 in 3 shards",
        "groups      4",
        "mos, 0 .. 5.5, higher is better",
        "12 labelled, 0 .. 5.5, mean 2.75",
        "14..14 wide, 10..14 high",
        "bmp 4, jpg 4, png 4",
        "a 6, b 6",
        "test 3, train 6, val 3",
    ):
        assert part in text


def test_a_set_without_scores_says_so(tmp_path: Path, table: Callable[..., DataSet]) -> None:
    table()
    build(open_unlabelled(tmp_path / "mine"), tmp_path / "o", workers=1)
    assert "can be scored, not trained on" in describe_set(open_set(tmp_path / "o"))


def test_the_sheet_shows_as_many_images_as_fit(packed: ShardSet) -> None:
    sheet = Image.open(io.BytesIO(contact_sheet(packed, columns=4, rows=2, tile=64)))
    assert sheet.size == (4 * 64, 2 * (64 + 18))
    assert np.asarray(sheet).std() > 10


def test_the_sheet_is_the_same_every_time(packed: ShardSet) -> None:
    assert contact_sheet(packed) == contact_sheet(packed)


def test_a_sheet_is_known_by_its_mark(packed: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "sheet.png").write_bytes(contact_sheet(packed))
    check_own(tmp_path / "sheet.png", SHEET_MARK)
