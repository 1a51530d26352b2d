"""Scores that cannot be what they are said to be stop a build, or are a line."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from shards.cli import cli
from shards.errors import ShardError


@pytest.fixture
def folder(tmp_path: Path, picture) -> Path:
    (tmp_path / "photos").mkdir()
    for k in range(12):
        (tmp_path / "photos" / f"{k}.png").write_bytes(picture(k))
    return tmp_path


def run(folder: Path, scores: list[float], *options: str, std: list[float] | None = None) -> str:
    rows = [f"{k}.png,{score}" + (f",{std[k]}" if std else "") for k, score in enumerate(scores)]
    header = "path,score" + (",std" if std else "")
    (folder / "l.csv").write_text("\n".join([header, *rows]) + "\n")
    command = ["build", "table", str(folder / "l.csv"), "--images", str(folder / "photos")]
    command += ["--output", str(folder / "out"), "--workers", "1", "--no-progress", *options]
    return CliRunner().invoke(cli, command, catch_exceptions=False).output


@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "build"])
def test_a_score_outside_the_range_stops(folder: Path, dry: list[str]) -> None:
    scores = [1.0, 7.5, 2.0, 0.5] + [3.0, 4.0] * 4
    with pytest.raises(ShardError, match=r"2 of 12 scores .* 1 \.\. 5, first row 3 1\.png: 7\.5; "
                       r"scores lie between 0\.5 and 7\.5.*--score-range"):  # fmt: skip
        run(folder, scores, "--score-range", "1", "5", *dry)
    assert not (folder / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("scores", "std", "words"),
    [
        ([3.0] * 12, None, "all 12 scores are 3; nothing can be learned"),
        ([0.0] * 8 + [1.0, 2.0, 3.0, 4.0], None,
         "8 of 12 scores are 0, while all lie between 0 and 4"),
        ([1.0 + k / 3 for k in range(12)], [12.5] * 12,
         "12 deviations are larger than the scale .*up to 12.5, first row 2 0.png: 12.5"),
        ([1.0 + k / 3 for k in range(12)], [0.5] * 12, ""),
    ],
    ids=["equal", "most", "std", "sound"],
)  # fmt: skip
def test_strange_scores_are_one_line_in_both(folder: Path, scores, std, words: str) -> None:
    for options in (["--dry-run"], []):
        told = run(folder, scores, *options, std=std)
        assert len(re.findall(r"table: (all|\d+)", told)) == bool(words)
        assert re.search(words, told)
