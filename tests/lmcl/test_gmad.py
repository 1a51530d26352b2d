import csv
import itertools
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from lmcl.errors import LmclError
from lmcl.gmad import Scores, command, common_pool, find_duels, read_scores


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
    [(None, "no such file", 4), ("path,x\n", "needs the columns path and score", 3)],
)
def test_files_that_cannot_be_used_say_why(tmp_path: Path, text, message, code) -> None:
    file = tmp_path / "a.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LmclError, match=message) as caught:
        read_scores(file)
    assert caught.value.exit_code == code


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
