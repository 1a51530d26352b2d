import pytest

from shards.datasets.roles import GROUP, PATH, SCORE, SPLIT, STD, Role, find_column
from shards.errors import ShardError


@pytest.mark.parametrize(
    ("role", "names"),
    [
        (PATH, ["path", "file_name", "filepath", "image_path", "image path", "imagepath", "image",
                "filename", "img-name", "name", "photo", "file path"]),
        (SCORE, ["score", "mos", "dmos", "mos score", "mos_score", "mean opinion score",
                 "meanopinionscore", "mos (1-5)", "mean-opinion-score [0..100]"]),
        (STD, ["std", "sd", "mos_std", "std. dev.", "standard deviation"]),
        (GROUP, ["group", "reference", "ref_img"]),
        (SPLIT, ["split", "part", "set", "official_split"]),
    ],
)  # fmt: skip
def test_a_column_is_found_however_others_call_it(role: Role, names: list[str]) -> None:
    for name in names:
        assert find_column(["x", name, "y"], role, where="t") == name


def test_two_candidates_are_refused_and_the_option_chooses() -> None:
    names = ["path", "score", "mos", "zscore"]
    with pytest.raises(ShardError, match=r"'score' and 'mos' could .*`--score-column score`"):
        find_column(names, SCORE, where="t")
    assert find_column(names, SCORE, "MOS", where="t") == "mos"
    assert find_column(names, SCORE, "Z-Score", where="t") == "zscore"
    with pytest.raises(ShardError, match=r"no such column among .*did you mean 'score'"):
        find_column(names, SCORE, "scores", where="t")


def test_what_is_not_needed_may_be_told_not_to_be_there() -> None:
    assert find_column(["path", "set"], SPLIT, "none", where="t") is None
    assert find_column(["path"], SPLIT, where="t") is None
    with pytest.raises(ShardError, match="no column 'path' among a, b"):
        find_column(["a", "b"], PATH, where="t")
    with pytest.raises(ShardError, match=r"the first line holds the image 'a\.jpg'"):
        find_column(["a.jpg", "3"], PATH, where="t")
