import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmcl.cli.gmad import command
from lmcl.errors import LmclError
from lmcl.inference.scores_file import FORMATS, Layout, Row, write_rows
from lmcl.report.gmad import Scores, common_pool, find_duels, read_scores


def pool(name: str, score: np.ndarray) -> Scores:
    return Scores(name=name, path=tuple(f"{i}.png" for i in range(len(score))), score=score)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.05, 2.0))
def test_the_first_pair_is_the_widest_of_all_pairs_the_defender_holds_for_equal(
    seed, tolerance
) -> None:
    rng = np.random.default_rng(seed)
    attacker, defender = pool("a", rng.normal(size=25)), pool("d", rng.normal(size=25))
    duels = find_duels(attacker, defender, levels=1, top=1, tolerance=tolerance)
    a, d = attacker.score / attacker.score.std(), defender.score / defender.score.std()
    pairs = itertools.combinations(range(25), 2)
    gaps = [abs(a[i] - a[j]) for i, j in pairs if abs(d[i] - d[j]) <= tolerance]
    assert [x.gap for x in duels] == pytest.approx([max(gaps)] if gaps else [])


def test_no_image_stands_in_two_pairs_of_a_level() -> None:
    rng = np.random.default_rng(1)
    duels = find_duels(
        pool("a", rng.normal(size=300)), pool("d", rng.normal(size=300)), levels=4, top=5
    )
    rows = [r for x in duels for r in (x.better, x.worse)]
    assert len(duels) == 20
    assert len(rows) == len(set(rows))
    assert all(x.slack <= 0.1 and x.gap > 0 for x in duels)


def test_levels_rise_with_the_scores_of_the_defender() -> None:
    rng = np.random.default_rng(2)
    defender = pool("d", rng.normal(size=200))
    duels = find_duels(pool("a", rng.normal(size=200)), defender, levels=3, top=1)
    means = [defender.score[[x.better, x.worse]].mean() for x in duels]
    assert means == sorted(means)


def test_lower_is_better_is_turned_and_errors_are_left_out(tmp_path: Path) -> None:
    file = tmp_path / "dmos.csv"
    file.write_text(
        "path,score,scale,higher_is_better,error\na.png,10,dmos,False,\nb.png,,dmos,False,broken\n"
    )
    found = read_scores(file)
    assert found.path == ("a.png",)
    assert found.score.tolist() == [-10.0]


def test_only_images_scored_by_both_are_compared() -> None:
    a = Scores(name="a", path=("x", "y", "z"), score=np.array([1.0, 2.0, 3.0]))
    b = Scores(name="b", path=("z", "w", "x"), score=np.array([30.0, 0.0, 10.0]))
    left, right = common_pool(a, b)
    assert left.path == right.path == ("x", "z")
    assert right.score.tolist() == [10.0, 30.0]
    with pytest.raises(LmclError, match="0 images stand in both"):
        common_pool(a, pool("c", np.zeros(3)))


def test_a_model_that_says_nothing_is_refused() -> None:
    with pytest.raises(LmclError, match="all 9 scores are equal"):
        find_duels(pool("a", np.ones(9)), pool("d", np.arange(9.0)))


@pytest.mark.parametrize(
    ("text", "message", "code"),
    [
        (None, "no such file", 4),
        ("path,x\n", "needs the columns path and score", 3),
        ("", "is empty", 3),
        ("path,score\n", "no image in it has a score", 3),
        ("path,score,error\na.png,,broken\n", "no image in it has a score", 3),
        ("path,score\na.png,1\nb.png,nan\n", "b.png has the score nan .1 of 2 images", 3),
        ("path,score\na.png,-inf\nb.png,2\n", "a.png has the score -inf .1 of 2 images", 3),
        ("path,score\na.png,1\na.png,2\n", "a.png has two scores, 1 and 2", 3),
        (
            "path,score,higher_is_better\na.png,1,true\nb.png,2,false\n",
            "false in some rows and not in others",
            3,
        ),
    ],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, text, message, code) -> None:
    file = tmp_path / "a.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LmclError, match=message) as caught:
        read_scores(file)
    assert caught.value.exit_code == code


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_of_lmcl_score_is_read(tmp_path: Path, suffix: str) -> None:
    rows = [
        Row(path=f"{one}.png", score=10.0 + one, quality=0.1 * one, error="") for one in range(3)
    ]
    rows.append(Row(path="broken.png", score=None, quality=None, error="no image"))
    layout = Layout(scale="dmos 0..100", higher_is_better=False, box=False, crops=False)
    write_rows(iter(rows), tmp_path / f"a{suffix}", layout)
    found = read_scores(tmp_path / f"a{suffix}")
    assert found.path == ("0.png", "1.png", "2.png")
    assert found.score.tolist() == [-10.0, -11.0, -12.0]
    assert found.scale == "dmos 0..100, lower is better"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"path,score\n\xcf\xf0\xe8\xe2.png,1\n", "cannot be read as CSV .*is not UTF-8"),
        ("a.parquet", b"path,score\n", "cannot be read as Parquet"),
        ("a.jsonl", b"path,score\n", "cannot be read as JSON lines"),
        ("a.jsonl", b"3\n", "line 1 is not a JSON object"),
        ("a.jsonl", b'{"path": "a", "score": [1]}\n', "column score"),
    ],
    ids=["cyrillic", "parquet", "jsonl", "number", "list"],
)
def test_a_file_that_is_not_what_its_name_says_is_named(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LmclError, match=words) as caught:
        read_scores(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "content",
    [
        b"path,score\na.png,2.5\nb.png,1\n",
        b"path;score\r\na.png;2,5\r\nb.png;1\r\n",
        "sep=;\npath;score;\na.png;2,5;\nb.png;1;\n".encode("utf-16"),
        b"\xef\xbb\xbfpath\tscore\na.png\t2,5\nb.png\t1\n",
    ],
    ids=["plain", "semicolons", "utf-16", "tabs"],
)
def test_scores_that_a_spreadsheet_saved_again_are_the_same(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    found = read_scores(tmp_path / "a.csv")
    assert (found.path, found.score.tolist()) == (("a.png", "b.png"), [2.5, 1.0])


def _scores_file(file: Path, scores: list[float]) -> str:
    rows = [f"{one}.png,{score}" for one, score in enumerate(scores)]
    file.write_text("\n".join(["path,score", *rows]) + "\n")
    return str(file)


def test_one_file_against_itself_or_its_copy_is_refused(tmp_path: Path) -> None:
    a = _scores_file(tmp_path / "a.csv", [1, 2, 3, 4])
    b = _scores_file(tmp_path / "b.csv", [1, 2, 3, 4])
    for other in (a, b):
        found = CliRunner().invoke(command, [a, other, "--output", str(tmp_path / "out")])
        assert "both give each of the 4 images the same score" in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_an_image_named_twice_with_one_score_is_one_image(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("path,score\na.png,1\nb.png,2\na.png,1\nc.png,3\n")
    found = read_scores(file)
    assert found.path == ("a.png", "b.png", "c.png")
    assert found.score.tolist() == [1, 2, 3]


def test_a_page_without_any_picture_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = _scores_file(tmp_path / "a.csv", [1, 2, 3, 4])
    b = _scores_file(tmp_path / "b.csv", [4, 1, 3, 2])
    asked = [a, b, "--tolerance", "9", "--levels", "1", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(command, [*asked, "--images", str(tmp_path)])
    assert found.exit_code == 0
    assert "name the folder the paths lie in by --images" in caplog.text


def test_a_contest_without_a_pair_says_so_and_writes_nothing(tmp_path: Path) -> None:
    a = _scores_file(tmp_path / "a.csv", [1, 2, 3, 4])
    b = _scores_file(tmp_path / "b.csv", [1, 2, 4, 8])
    asked = [a, b, "--tolerance", "0", "--output", str(tmp_path / "out")]
    found = CliRunner().invoke(command, asked)
    assert isinstance(found.exception, LmclError)
    assert "among 4 images in 5 levels there is no pair" in str(found.exception)
    assert "raise --tolerance" in str(found.exception)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_page_with_the_images_and_a_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    (tmp_path / "img").mkdir()
    for name in ("a", "b"):
        with (tmp_path / f"{name}.csv").open("w") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "score"])
            writer.writerows([f"{i}.png", rng.normal()] for i in range(40))
    for i in range(39):
        Image.fromarray(np.full((20, 30, 3), i * 6, np.uint8)).save(tmp_path / "img" / f"{i}.png")
    found = CliRunner().invoke(
        command,
        [str(tmp_path / n) for n in ("a.csv", "b.csv")]
        + ["--images", str(tmp_path / "img"), "--output", str(tmp_path / "out"), "--levels", "2"]
        + ["--tolerance", "3", "--top", "10"],
    )
    assert found.exit_code == 0, found.output
    page = (tmp_path / "out" / "gmad.html").read_text()
    with (tmp_path / "out" / "gmad.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == 40
    assert page.count('src="data:image/jpeg;base64,/') == 2 * 40 - 2
    assert page.count("cannot be shown") == 2


def test_output_may_name_the_page_itself(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        rows = [f"{i}.png,{rng.normal()}" for i in range(40)]
        (tmp_path / f"{name}.csv").write_text("path,score\n" + "\n".join(rows) + "\n")
    page = tmp_path / "pages" / "duel.html"
    found = CliRunner().invoke(
        command,
        [str(tmp_path / name) for name in ("a.csv", "b.csv")]
        + ["--output", str(page), "--levels", "2", "--tolerance", "3"],
    )
    assert found.exit_code == 0, found.output
    assert found.output.strip() == str(page)
    assert sorted(each.name for each in page.parent.iterdir()) == ["duel.csv", "duel.html"]
    assert "duel.csv" in page.read_text()


def test_a_model_whose_lower_scores_are_better_is_shown_with_its_own_scores(tmp_path: Path) -> None:
    for name, better in (("up", "true"), ("down", "false")):
        with (tmp_path / f"{name}.csv").open("w") as out:
            writer = csv.writer(out)
            writer.writerow(["path", "score", "scale", "higher_is_better"])
            turn = [7, 3, 9, 1, 5, 8, 2, 6, 4, 0] if name == "down" else range(10)
            writer.writerows(
                [f"{i}.png", 10.0 + v, f"{name} set", better] for i, v in enumerate(turn)
            )
    asked = [str(tmp_path / n) for n in ("up.csv", "down.csv")]
    asked += ["--output", str(tmp_path / "out"), "--levels", "3", "--tolerance", "2"]
    assert CliRunner().invoke(command, asked, catch_exceptions=False).exit_code == 0
    page = (tmp_path / "out" / "gmad.html").read_text()
    assert "down <b>1" in page
    assert "<b>\N{MINUS SIGN}1" not in page
    assert "up answers in up set, higher is better; down answers in down set, lower" in page
    assert "Level 1 of 3, the worst" in page
    assert "Level 3 of 3, the best" in page
    assert "lmcl report from the run folder" not in page
