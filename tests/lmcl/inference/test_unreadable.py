"""Folders and links that cannot be read: what is good is scored, what is missing is said.

The tests may run as root, whom no mode stops. Without two capabilities root is stopped as anyone.
"""

import contextlib
import csv
import ctypes
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcl.cli.score import command
from lmcl.inference.inputs import list_items

AS_ROOT = os.geteuid() == 0
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2
VERSION = 0x20080522
"""Of the structures of capset(2): two words each of effective, permitted and inheritable."""


@contextlib.contextmanager
def stopped_by_modes() -> Iterator[None]:
    """This thread, and the threads it starts within, may do what a mode allows and no more."""
    if not AS_ROOT:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = struct.pack("Ii", VERSION, 0), ctypes.create_string_buffer(24)
    if libc.capget(header, held):
        pytest.skip("root whose capabilities are not known may read everything")
    effective, *others = struct.unpack("6I", held.raw)
    less = struct.pack("6I", effective & ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH), *others)
    assert libc.capset(header, less) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held.raw) == 0


@pytest.fixture
def shut(photos: Path) -> Iterator[Callable[[str, int], Path]]:
    """Takes a folder's rights away, and gives them back when the test is over."""
    taken: list[Path] = []

    def shut_folder(name: str, mode: int) -> Path:
        folder = photos / name
        folder.chmod(mode)
        taken.append(folder)
        return folder

    yield shut_folder
    for folder in taken:
        folder.chmod(0o755)


def score(*arguments: Path | str, output: Path) -> tuple[int, dict[str, dict[str, str]]]:
    """`lmcl score` by one whom modes stop; its exit code and its rows by name."""
    line = [*arguments, "--output", output, "--device", "cpu", "--no-progress"]
    with stopped_by_modes():
        done = CliRunner().invoke(command, [str(word) for word in line], catch_exceptions=False)
    with output.open(newline="") as lines:
        return done.exit_code, {Path(r["path"]).name: r for r in csv.DictReader(lines)}


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "*/*"], ids=["folder", "all-below", "level"])
def test_a_locked_folder_is_a_row_and_every_other_image_is_scored(
    model_folder, photos, shut, tmp_path, pattern
) -> None:
    (photos / "open").mkdir()
    for i in range(3):
        shutil.copy(photos / f"img.{i:02d}.jpg", photos / "open" / f"{i}.jpg")
    locked = shut("a b", 0)
    code, rows = score(photos / pattern, "--model", model_folder, output=tmp_path / "s.csv")
    good = {"": 9, "**/*.jpg": 9, "*/*": 3}[pattern]
    assert code == 3
    assert [name for name, r in rows.items() if r["error"]] == [locked.name]
    assert sum(bool(r["score"]) for r in rows.values()) == good
    assert "cannot be opened (Permission denied), no image in it" in rows["a b"]["error"]


def test_a_folder_that_lists_names_but_opens_nothing_fails_row_by_row(
    model_folder, photos, shut, tmp_path
) -> None:
    shut("a b", 0o444)
    code, rows = score(photos, "--model", model_folder, output=tmp_path / "s.csv")
    bad = {name for name, r in rows.items() if r["error"]}
    assert code == 3
    assert bad == {f"{i} (1).png" for i in range(6)}
    assert all("Permission denied" in rows[name]["error"] for name in bad)
    assert sum(bool(r["score"]) for r in rows.values()) == 6


def test_an_image_a_table_and_a_tar_without_rights_are_rows(
    model_folder, photos, shut, tmp_path
) -> None:
    for name in ("img.00.jpg", "list.csv", "pack.tar"):
        (photos / name).touch()
        shut(name, 0)
    inside = shut("a b", 0) / "0 (1).png"
    names = ("img.00.jpg", "list.csv", "pack.tar", "img.01.jpg")
    code, rows = score(
        *(photos / n for n in names), inside, "--model", model_folder, output=tmp_path / "s.csv"
    )
    assert code == 3
    assert {name for name, r in rows.items() if not r["error"]} == {"img.01.jpg"}
    assert all("Permission denied" in r["error"] for r in rows.values() if r["error"])


def test_links_are_followed_to_files_and_every_other_link_says_why_not(photos, tmp_path) -> None:
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    (photos / "loop.jpg").symlink_to("loop.jpg")
    (photos / "up").symlink_to("..", target_is_directory=True)
    (photos / "good.jpg").symlink_to("img.00.jpg")
    os.mkfifo(photos / "pipe.jpg")
    items = {Path(i.path).name: i for i in list_items([str(photos)])}
    assert items["good.jpg"].read() == items["img.00.jpg"].read()
    assert items["gone.jpg"].problem.startswith("a broken link: nowhere.jpg does not exist")
    assert "leads back to itself" in items["loop.jpg"].problem
    assert "a link to the folder .., which is not followed" in items["up"].problem
    assert items["pipe.jpg"].problem == "neither a file nor a folder"
    assert sum(i.problem == "" for i in items.values()) == 13
    (single,) = list_items([str(photos / "gone.jpg")])
    assert "broken link" in single.problem


def test_what_was_locked_is_scored_when_the_job_is_resumed(
    model_folder, photos, shut, tmp_path
) -> None:
    locked, output = shut("a b", 0), tmp_path / "s.csv"
    assert score(photos, "--model", model_folder, output=output)[0] == 3
    locked.chmod(0o755)
    code, rows = score(photos, "--model", model_folder, "--resume", output=output)
    assert code == 0
    assert len(rows) == 12
    assert all(r["score"] for r in rows.values())
