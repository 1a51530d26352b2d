import json
from pathlib import Path

import pytest

from lmcl import demo
from lmcl.errors import LmclError
from shards.lock import LockedError, lock_folder

TINY = (
    "crops.size=32",
    "crops.random=3",
    "crops.evaluation=2",
    "saliency.view=32",
    "saliency.window=2",
    "train.epochs=1",
    "encoder.width=24",
)


def test_the_demo_leaves_a_report_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "CONTENTS", 6)
    folder = tmp_path / "demo"
    said = demo.run_demo(folder, overrides=TINY, progress=False)
    assert "test: SRCC" in said
    assert "lmcl-shard build table" in said
    page = (folder / "report.html").read_text()
    assert "synthetic" in page
    again = demo.run_demo(folder, overrides=TINY, progress=False)
    assert "finished before" in again
    # What is not the demo's stays, here and where its links and its marker point.
    mine = [folder / "images" / "mine.jpg", folder / "notes.txt", tmp_path / "notes.txt"]
    for file in mine[1:]:
        file.write_text("precious")
    marker = folder / demo.MARKER
    listed = json.loads(marker.read_text())
    assert {"images/labels.csv", "config.toml", "model/config.json"} <= set(listed["files"])
    listed["files"] += ["../notes.txt", str(tmp_path / "notes.txt"), "notes.txt", "", "images"]
    marker.write_text(json.dumps(listed))
    demo._clear(folder)
    assert [p.name for p in folder.rglob("*")] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "precious"


KEPT = {
    "photos": ("images/mine.jpg", "images/labels.csv"),
    "a-set": ("shards/manifest.json",),
    "a-run-of-an-earlier-version": ("config.toml", "images/demo.txt", "shards/manifest.json"),
    "anything": ("precious.txt",),
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.parametrize("marker", [None, {"files": [], "foreign": []}], ids=["none", "empty"])
def test_starting_over_deletes_nothing_that_no_marker_lists(
    tmp_path: Path, case: str, marker: object
) -> None:
    for name in KEPT[case]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("precious")
    if marker is not None:
        (tmp_path / demo.MARKER).write_text(json.dumps(marker))
    if case != "anything" or marker is None:
        with pytest.raises(LmclError, match=r"nothing (in it )?is deleted.*another --output"):
            demo._clear(tmp_path)
    else:
        demo._clear(tmp_path)
    assert all((tmp_path / name).read_text() == "precious" for name in KEPT[case])


@pytest.mark.parametrize("link", ["shards", "images/sub", "model/config.json"])
def test_starting_over_goes_through_no_link(tmp_path: Path, link: str) -> None:
    victim, folder = tmp_path / "victim", tmp_path / "demo"
    victim.mkdir()
    (victim / "manifest.json").write_text("precious")
    (folder / link).parent.mkdir(parents=True)
    (folder / link).symlink_to(victim)
    files = [link, f"{link}/manifest.json"]
    (folder / demo.MARKER).write_text(json.dumps({"files": files, "foreign": []}))
    demo._clear(folder)
    assert (victim / "manifest.json").read_text() == "precious"
    assert not (folder / link).is_symlink()


def test_starting_over_never_deletes_a_folder_that_is_no_demo(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(LmclError, match="not the folder of a demo run"):
        demo.run_demo(tmp_path, again=True, progress=False)
    assert (tmp_path / "precious.txt").exists()


@pytest.mark.parametrize("again", [False, True], ids=["demo", "again"])
def test_two_demos_never_share_a_folder(tmp_path: Path, again: bool) -> None:
    folder = tmp_path / "demo"
    with lock_folder(folder, "lmcl train"):
        (folder / "config.toml").write_text("precious")
        with pytest.raises(LockedError, match="works on it already") as caught:
            demo.run_demo(folder, again=again, progress=False)
    assert caught.value.exit_code == 2
    assert [path.name for path in folder.iterdir()] == ["config.toml"]
