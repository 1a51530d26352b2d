"""`lmcl score --resume`: no row is lost, and none is taken for that of another image."""

import csv
import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from lmcl.cli.score import command
from lmcl.errors import LmclError
from lmcl.inference.batch_job import ScoringOptions, score_items
from lmcl.inference.inputs import list_items
from lmcl.inference.scores_file import RowJournal, read_rows, sources_path

Rows = dict[str, dict[str, str]]


class Workbench:
    """A folder with 12 photographs, a model, and one scores file that everything goes into."""

    def __init__(self, root: Path, photos: Path, model: Path) -> None:
        self.root, self.photos, self.model = root, photos, model
        self.output = root / "s.csv"

    def score(self, *arguments: Path | str) -> Result:
        line = [*arguments, "--model", self.model, "--output", self.output, "--device", "cpu"]
        return CliRunner().invoke(command, [*map(str, line), "--no-progress"])

    def rows(self) -> Rows:
        with self.output.open(newline="") as lines:
            return {row["path"]: row for row in csv.DictReader(lines)}

    def table(self, folder: Path, *names: str) -> Path:
        folder.mkdir(exist_ok=True)
        with (folder / "list.csv").open("w", newline="") as out:
            csv.writer(out).writerows([["path"], *([name] for name in names)])
        return folder / "list.csv"


@pytest.fixture
def bench(tmp_path: Path, photos: Path, model_folder: Path) -> Workbench:
    return Workbench(tmp_path, photos, model_folder)


def mistyped(b: Workbench) -> list[Path]:
    return [b.root / "phtos"]


def mistyped_then_corrected(b: Workbench) -> list[Path]:
    assert b.score(b.root / "phtos", "--resume").exit_code == 3
    return [b.photos]


def another_folder(b: Workbench) -> list[Path]:
    shutil.copytree(b.photos / "a b", b.root / "more")
    return [b.root / "more"]


def away(b: Workbench) -> list[Path]:
    b.photos.rename(b.root / "unmounted")
    return [b.photos]


def away_and_back(b: Workbench) -> list[Path]:
    b.photos.rename(b.root / "unmounted")
    assert b.score(b.photos, "--resume").exit_code == 3
    (b.root / "unmounted").rename(b.photos)
    return [b.photos]


def away_named_one_by_one(b: Workbench) -> list[Path]:
    files = sorted(b.photos.rglob("*.*g"))
    b.photos.rename(b.root / "unmounted")
    return files


def with_dots(b: Workbench) -> list[Path]:
    return [Path(f"{b.photos}/../photos/./a b"), b.photos]


def through_a_link(b: Workbench) -> list[Path]:
    (b.root / "link").symlink_to(b.photos)
    return [b.root / "link/"]


def relative(b: Workbench) -> list[Path]:
    return [Path(os.path.relpath(b.photos))]


def emptied(b: Workbench) -> list[Path]:
    (b.photos / "img.00.jpg").write_bytes(b"")
    return [b.photos]


def another_table(b: Workbench) -> list[Path]:
    first = b.table(b.root / "t0", "a.png")
    Image.new("RGB", (80, 80), "red").save(first.parent / "a.png")
    assert b.score(first, "--resume").exit_code == 0
    second = b.table(b.root / "t1", "a.png")
    Image.new("RGB", (80, 80), "blue").save(second.parent / "a.png")
    return [second]


def moved(b: Workbench) -> list[Path]:
    done = b.score(b.photos, "--resume", "--below", "1", "--move-to", b.root / "rejected")
    assert "moved 12 of 12" in done.output
    return [b.photos / "a b"]


def moved_and_named_where_they_were(b: Workbench) -> list[Path]:
    files = sorted(b.photos.rglob("*.*g"))
    moved(b)
    return files


def moved_and_named_where_they_are(b: Workbench) -> list[Path]:
    moved(b)
    return [b.root / "rejected"]


def moved_and_replaced(b: Workbench) -> list[Path]:
    moved(b)
    Image.new("RGB", (80, 80), "red").save(b.photos / "img.00.jpg")
    return [b.photos / "img.00.jpg", b.root / "rejected"]


def moved_and_put_back(b: Workbench) -> list[Path]:
    moved(b)
    done = CliRunner().invoke(command, ["--undo", str(b.root / "rejected" / "moves.csv")])
    assert done.exit_code == 0, done.output
    return [b.photos]


@pytest.mark.parametrize(
    ("change", "scored", "failed", "exit_code"),
    [
        (mistyped, 12, 1, 3),
        (mistyped_then_corrected, 12, 0, 0),
        (another_folder, 18, 0, 0),
        (away, 12, 1, 3),
        (away_and_back, 12, 0, 0),
        (away_named_one_by_one, 12, 0, 0),
        (with_dots, 12, 0, 0),
        (through_a_link, 12, 0, 0),
        (relative, 12, 0, 0),
        (emptied, 12, 0, 3),
        (another_table, 14, 0, 0),
        (moved, 12, 1, 3),
        (moved_and_named_where_they_were, 12, 0, 0),
        (moved_and_named_where_they_are, 12, 0, 0),
        (moved_and_replaced, 13, 0, 0),
        (moved_and_put_back, 12, 0, 0),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value),
)
def test_a_resumed_file_keeps_every_score_whatever_is_named(
    bench: Workbench,
    change: Callable[[Workbench], list[Path]],
    scored: int,
    failed: int,
    exit_code: int,
) -> None:
    assert bench.score(bench.photos).exit_code == 0
    before = sorted(row["score"] for row in bench.rows().values())
    named = change(bench)
    done = bench.score(*named, "--resume")
    rows = bench.rows().values()
    after = sorted(row["score"] for row in rows if row["score"])
    assert (len(after), sum(bool(row["error"]) for row in rows)) == (scored, failed)
    assert done.exit_code == exit_code, done.output
    assert all(after.count(score) >= before.count(score) for score in before)
    assert not list(bench.root.glob(".s.csv*"))


def test_a_file_that_has_changed_is_scored_again_and_said(bench: Workbench, caplog) -> None:
    bench.score(bench.photos)
    before = bench.rows()
    changed = bench.photos / "img.03.jpg"
    Image.new("RGB", (90, 70), "green").save(changed)
    done = bench.score(bench.photos, "--resume")
    after = bench.rows()
    assert "12 rows (0 failed, 11 kept)" in done.output
    assert "1 images have changed since they were scored" in caplog.text
    assert {path for path in before if before[path] != after[path]} == {str(changed)}
    assert list(after) == list(before)


def test_the_rows_of_an_earlier_version_are_known_by_their_names(bench: Workbench) -> None:
    bench.score(bench.photos)
    sources_path(bench.output).unlink()
    before = bench.output.read_bytes()
    spelled = os.path.relpath(bench.photos)
    assert "12 rows (0 failed, 12 kept)" in bench.score(spelled, "--resume").output
    assert bench.output.read_bytes() == before
    assert len(sources_path(bench.output).read_text().splitlines()) == 12


@pytest.mark.parametrize("resume", [(), ("--resume",)], ids=["again", "resume"])
def test_the_corrected_command_works_after_one_that_scored_nothing(
    bench: Workbench, resume: tuple[str, ...]
) -> None:
    assert bench.score(bench.root / "phtos").exit_code == 3
    done = bench.score(bench.photos, *resume)
    assert done.exit_code == 0, done.output
    assert sum(bool(row["score"]) for row in bench.rows().values()) == len(bench.rows()) == 12


def test_a_file_that_is_not_ours_is_never_replaced(bench: Workbench) -> None:
    bench.output.write_text("path,score,error,quality\nmine,,,\n")
    for resume in ((), ("--resume",)):
        error = bench.score(bench.photos, *resume).exception
        assert isinstance(error, LmclError)
        assert error.exit_code in (2, 5)
        assert "mine" in bench.output.read_text()


def test_the_old_file_stands_until_the_new_one_is_whole(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmcl.inference import scores_file

    bench.score(bench.photos)
    before = bench.output.read_bytes()
    shutil.copytree(bench.photos / "a b", bench.root / "more")

    def no_space(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(scores_file, "_write_csv", no_space)
        assert isinstance(bench.score(bench.root / "more", "--resume").exception, OSError)
    assert bench.output.read_bytes() == before
    done = bench.score(bench.root / "more", "--resume")
    assert "18 rows (0 failed, 6 kept, 12 of other images)" in done.output


def test_journals_of_earlier_versions_and_torn_lines_are_read(
    scorer, photos: Path, tmp_path: Path, caplog
) -> None:
    output, items = tmp_path / "s.csv", list_items([str(photos)])
    whole = tmp_path / "whole.csv"
    score_items(scorer, items, ScoringOptions(output=whole, progress=False))
    old = [
        {"path": r.path, "score": r.score, "quality": r.quality, "error": "", "box": None}
        | {"crops": []}
        for r in read_rows(whole)
    ][:5]
    # The earlier version went on in the same file: a torn line has the next one at its end.
    lines = [json.dumps(row) for row in old]
    text = "\n".join([*lines[:2], f'{{"path": "half{lines[2]}', *lines[3:]])
    (tmp_path / ".s.csv.rows-0000-1").write_text(f'{text}\n{{"score": 1}}\n{{"path": "torn')
    shutil.copy(tmp_path / "whole.csv.origin.json", tmp_path / "s.csv.origin.json")
    options = ScoringOptions(output=output, progress=False, resume=True)
    summary = score_items(scorer, items, options)
    assert (summary.rows, summary.failed, summary.reused) == (12, 0, 4)
    assert "3 lines of journals are torn" in caplog.text
    # What the earlier version did not know stays empty.
    expected = [
        dataclasses.replace(row, width=None, height=None) if place in (0, 1, 3, 4) else row
        for place, row in enumerate(read_rows(whole))
    ]
    assert list(read_rows(output)) == expected


def test_every_journal_has_a_name_of_its_own(tmp_path: Path) -> None:
    journals = [RowJournal(tmp_path / "s.csv", rank=0) for _ in range(3)]
    for journal in journals:
        journal.close()
    assert len({journal.path for journal in journals}) == 3
