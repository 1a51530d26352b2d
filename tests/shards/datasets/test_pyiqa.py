from collections.abc import Callable
from pathlib import Path

import pytest

from shards.datasets.pyiqa import open_pyiqa
from shards.errors import ShardError


def open_text(tmp_path: Path, name: str, text: str) -> list[tuple[str, float | None, str, str]]:
    (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
    dataset = open_pyiqa(tmp_path / name, images=tmp_path)
    return [(s.path, s.mos, s.group, s.part) for s in dataset.samples()]


def test_without_a_reference_the_image_is_the_first_column(tmp_path: Path) -> None:
    text = "img_name,mos,std,official_split\n1.jpg,50,1,train\n2.jpg,60,2,val\n"
    assert open_text(tmp_path, "meta_info_KonIQ10kDataset.csv", text) == [
        ("1.jpg", 50.0, "1.jpg", "train"),
        ("2.jpg", 60.0, "2.jpg", "val"),
    ]


def test_with_a_reference_the_image_is_the_second_column(tmp_path: Path) -> None:
    text = "ref_name,dist_name,dmos\nrefimgs/a.bmp,jp2k/img1.bmp,50\nrefimgs/a.bmp,wn/img1.bmp,60\n"
    rows = open_text(tmp_path, "meta_info_LIVEIQADataset.csv", text)
    assert rows[1] == ("wn/img1.bmp", 60.0, "refimgs/a.bmp", "")
    dataset = open_pyiqa(tmp_path / "meta_info_LIVEIQADataset.csv")
    assert dataset.score is not None
    assert not dataset.score.higher_is_better
    assert dataset.name == "liveiqa"


def test_livec_training_rows_are_dropped(tmp_path: Path) -> None:
    rows = "".join(f"trainingImages/t{k}.bmp,50,1\n" for k in range(1, 8)) + "3.bmp,40,1\n"
    found = open_text(tmp_path, "meta_info_LIVEChallengeDataset.csv", "img_name,mos,std\n" + rows)
    assert [row[0] for row in found] == ["3.bmp"]


def test_patches_stay_with_their_image(tmp_path: Path) -> None:
    text = "img_name,mos\nvoc/A.jpg,50\npatches/A.jpg_patch_1.jpg,60\n"
    first, second = open_text(tmp_path, "meta_info_FLIVEDataset.csv", text)
    assert first[2] == second[2] == "a.jpg"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "needs 2 columns"),
        ("img_name,mos\n", "has no rows"),
        ("img_name,mos\na.png,nan\n", "not a finite number"),
        ("img_name,mos\n../a.png,1\n", "leaves the images folder"),
    ],
)
def test_a_bad_file_is_named(
    tmp_path: Path, text: str, message: str, picture: Callable[..., bytes]
) -> None:
    with pytest.raises(ShardError, match=message):
        open_text(tmp_path, "meta_info_XDataset.csv", text)
