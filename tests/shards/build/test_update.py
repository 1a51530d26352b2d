"""Sets that change: labels, images that come and go, versions that stay, splits extended."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from shards.build.build import build
from shards.cli import cli
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.read import open_set
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split
from shards.verify import verify


@pytest.fixture
def work(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    (tmp_path / "photos").mkdir()
    for k in range(26):
        (tmp_path / "photos" / f"{k:02d}.png").write_bytes(picture(k))
    build(open_table(labels(tmp_path, 20), images=tmp_path / "photos", extra_files="ignore"),
          tmp_path / "set", workers=1)  # fmt: skip
    write_split(tmp_path / "set", make_splits(open_set(tmp_path / "set"), repeats=1)[0])
    return tmp_path


def labels(work: Path, count: int, **changed: float) -> Path:
    rows = [f"{k:02d}.png,{changed.get(f'p{k}', k % 5)},g{k // 2}" for k in range(count)]
    (work / "l.csv").write_text("path,score,group\n" + "\n".join(rows) + "\n")
    return work / "l.csv"


def update(work: Path, *arguments: str | Path) -> str:
    command = ["update", str(work / "set"), *map(str, arguments), "--workers", "1", "--no-progress"]
    return CliRunner().invoke(cli, command, catch_exceptions=False).output


def hashes(work: Path) -> dict[str, str]:
    files = sorted((work / "set").glob("*.tar"))
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_new_labels_touch_no_shard_and_the_version_before_stays(work: Path) -> None:
    before, names = hashes(work), open_set(work / "set").manifest.ids_sha256
    told = update(work, labels(work, 20, p3=4.0, p4=0.5))
    assert "version 2, 20 images: 2 relabelled, 0 added, 0 withdrawn" in told
    new, old = open_set(work / "set"), open_set(f"{work / 'set'}@v1")
    assert hashes(work) == before
    assert (new.samples.mos[3], old.samples.mos[3]) == (4.0, 3.0)
    assert (new.samples.mos[4], old.samples.mos[4]) == (0.5, 4.0)
    assert new.manifest.ids_sha256 == names
    assert load_split(new, "70-10-20-seed123-00").set == "table"
    assert verify(work / "set", deep=True).ok
    assert verify(f"{work / 'set'}@v1", deep=True).ok
    assert "nothing was changed" in update(work, labels(work, 20, p3=4.0, p4=0.5))


def test_images_come_in_new_shards_and_go_by_a_list(work: Path) -> None:
    before = hashes(work)
    update(work, labels(work, 26), "--images", work / "photos")
    (work / "gone.txt").write_text("00.png\n./07.PNG\n")
    assert "24 images: 0 relabelled, 0 added, 2 withdrawn" in update(
        work, "--withdraw", work / "gone.txt"
    )
    assert {name: found for name, found in hashes(work).items() if name in before} == before
    newest = open_set(work / "set")
    assert set(range(26)) - set(newest.ids().tolist()) == {0, 7}
    for id, data, row in newest:
        assert data == (work / "photos" / row.path).read_bytes()
        assert row.path == f"{id:02d}.png"
    with pytest.raises(ShardError, match="was withdrawn from the set"):
        newest.read_bytes(7)
    assert [len(open_set(f"{work / 'set'}@v{k}")) for k in (1, 2, 3)] == [20, 26, 24]
    assert open_set(f"{work / 'set'}@v2").read_bytes(7) == (work / "photos/07.png").read_bytes()
    history = newest.manifest.history
    assert [(v.version, v.num_samples, bool(v.date)) for v in history] == [
        (1, 20, False), (2, 26, True), (3, 24, True)
    ]  # fmt: skip
    assert verify(work / "set", deep=True).ok
    shown = CliRunner().invoke(cli, ["info", str(work / "set")], catch_exceptions=False).output
    assert "version 2" in shown
    assert "24 images: 0 relabelled, 0 added, 2 withdrawn" in shown


def test_a_split_is_extended_and_no_old_image_changes_its_part(work: Path) -> None:
    old = load_split(open_set(work / "set"), "70-10-20-seed123-00")
    update(work, labels(work, 26), "--images", work / "photos")
    (work / "gone.txt").write_text("00.png\n")
    update(work, "--withdraw", work / "gone.txt")
    with pytest.raises(ShardError, match=r"of version 1: take it over with `--extend 70-10-20"):
        load_split(open_set(work / "set"), old.name)
    command = ["split", str(work / "set"), "--extend", old.name]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    newest = open_set(work / "set")
    new = load_split(newest, f"{old.name}@v3")
    for name in ("train", "val", "test"):
        assert set(old.part(name)) - {0} <= set(new.part(name))
    every = np.concatenate([new.train, new.val, new.test])
    assert sorted(every) == newest.ids().tolist()
    assert load_split(open_set(f"{work / 'set'}@v1"), old.name).hash == old.hash


def test_an_extended_split_names_every_version_it_fits(work: Path) -> None:
    old = "70-10-20-seed123-00"
    update(work, labels(work, 20, p3=4.0))
    update(work, labels(work, 26), "--images", work / "photos")
    command = ["split", str(work / "set"), "--extend", old]
    assert CliRunner().invoke(cli, command, catch_exceptions=False).exit_code == 0
    note = load_split(open_set(work / "set"), f"{old}@v3").note
    assert note.startswith(f"extends {old} of version 1 or 2 (with the same images): 6 new images")


def test_groups_of_old_images_take_new_ones_along(work: Path, picture) -> None:
    old = load_split(open_set(work / "set"), "70-10-20-seed123-00")
    (work / "l.csv").write_text("path,score,group\n20.png,1,g0\n21.png,1,g9\n")
    update(work, work / "l.csv", "--images", work / "photos")
    CliRunner().invoke(cli, ["split", str(work / "set"), "--extend", old.name])
    new = load_split(open_set(work / "set"), f"{old.name}@v2")
    for name in ("train", "val", "test"):
        assert (20 in new.part(name)) == (0 in old.part(name))
        assert (21 in new.part(name)) == (18 in old.part(name))


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("path,score\n00.png,9\n", [], r"1 of 1 scores are outside .*0 \.\. 4.*--score-range"),
        ("path,score\n00.png,1\n01.png,1\n00.png,2\n", [], "'00.png' is listed more than once"),
        ("path,score\n00.png,1\nnew.png,1\nnew.png,1\n", [], "'new.png' is listed more than"),
        ("path,score\nnew.png,1\n", [], "neither in the set nor there to be added, first new.png"),
        (
            "",
            ["--withdraw", "gone.txt"],
            "1 images to be withdrawn are not in the set, first x.png",
        ),
    ],
    ids=["range", "twice", "new-twice", "missing", "withdraw"],
)
def test_what_cannot_be_done_changes_nothing(
    work: Path, text: str, options: list[str], words: str
) -> None:
    before = (work / "set" / "manifest.json").read_bytes()
    (work / "l.csv").write_text(text)
    (work / "gone.txt").write_text("x.png\n")
    arguments = [work / "l.csv"] if text else []
    with pytest.raises(ShardError, match=words):
        update(work, *arguments, *(str(work / o) if o.endswith("txt") else o for o in options))
    assert (work / "set" / "manifest.json").read_bytes() == before
    update(work, labels(work, 20, p1=9.0), "--score-range", "0", "10")
    assert open_set(work / "set").score.high == 10


def test_labels_of_images_that_were_withdrawn_are_counted_apart(work: Path) -> None:
    (work / "gone.txt").write_text("00.png\n07.png\n")
    update(work, "--withdraw", work / "gone.txt")
    told = update(work, labels(work, 20, p0=4.0, p3=4.0))
    assert "2 of the table's images were withdrawn or rejected before and stay out" in told
    assert "18 images: 1 relabelled, 0 added, 0 withdrawn, 0 not named" in told
    assert open_set(work / "set").samples.mos[0] == 0.0


def test_new_images_that_cannot_be_packed_are_not_counted_as_added(work: Path) -> None:
    (work / "photos" / "20.png").write_bytes(b"\x89PNG")
    told = update(work, labels(work, 22), "--images", work / "photos", "--on-error", "skip")
    assert "21 images: 0 relabelled, 1 added" in told
    assert "1 images were left out" in told


def test_a_version_that_is_not_there_is_named(work: Path) -> None:
    with pytest.raises(ShardError, match="has no version 4; there are 1 to 1"):
        open_set(f"{work / 'set'}@v4")
