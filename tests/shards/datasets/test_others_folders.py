"""Folders as people have them, through the command that packs them: what is left out is said."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shards.cli import cli
from shards.read import open_set


def build(kind: str, source: Path, out: Path, *options: str) -> Result:
    line = ["build", kind, str(source), "--output", str(out), "--workers", "1", "--no-progress"]
    return CliRunner().invoke(cli, [*line, *options])


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    """Three images, one of them of an odd ending, among what lies beside images."""
    folder = tmp_path / "photos"
    for name in ("a.jpg", "sub/b.png", "sub/c.img"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(picture(len(name), codec="jpg" if "jpg" in name else "png"))
    for name in ("x.tif", "y.TIF", "z.tif", "sub/p.heic", "sub/notes.txt", "q.xmp", "noend"):
        (folder / name).write_bytes(b"something else")
    for name in ("@eaDir/a.jpg", "__MACOSX/._a.jpg", "Thumbs.db", "._a.jpg", ".hidden.jpg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"of the system")
    (tmp_path / "elsewhere").mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    return folder


def test_what_is_no_image_is_counted_by_kind(folder: Path, tmp_path: Path) -> None:
    done = build("unlabelled", folder, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").samples.path.tolist() == ["a.jpg", "sub/b.png", "sub/c.img"]
    assert (
        "7 files of other kinds left out: 3 .tif, 1 .heic, 1 .txt, 1 .xmp, 1 without an ending\n"
        in done.output
    )
    assert "links to folders are not followed: linked; name the folders" in done.output


def test_patterns_choose_what_is_packed_and_need_no_label(folder: Path, tmp_path: Path) -> None:
    done = build("unlabelled", folder, tmp_path / "one", "--exclude", "sub", "--exclude", "*.tif")
    assert open_set(tmp_path / "one").samples.path.tolist() == ["a.jpg"]
    assert "left out by --include and --exclude" in done.output
    labels = tmp_path / "labels.csv"
    labels.write_text("path,score\na.jpg,1\nsub/c.img,2\nsub/b.png,3\n")
    options = ("--images", str(folder), "--include", "*.jpg", "--include", "*.img")
    done = build("table", labels, tmp_path / "two", *options)
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "two").samples.path.tolist() == ["a.jpg", "sub/c.img"]
    assert "5 files of other kinds" not in done.output
