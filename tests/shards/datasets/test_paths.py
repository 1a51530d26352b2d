"""Paths as others write them find the file of the folder, and never one outside it."""

import os
import unicodedata
from pathlib import Path

import pytest

from shards.datasets.files import FolderIndex
from shards.datasets.paths import PathFinder
from shards.datasets.table import open_table
from shards.errors import ShardError

NFC, NFD = (unicodedata.normalize(form, "caf\u00e9.jpg") for form in ("NFC", "NFD"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("a b.jpg", "sub/c.JPG", NFD, "photos/d.jpg"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a b.jpg", "a b.jpg"), ("A B.JPG", "a b.jpg"), ("./a b.jpg", "a b.jpg"),
        (".\\sub\\c.jpg", "sub/c.JPG"), ("'a b.jpg'", "a b.jpg"), ('"a b.jpg"', "a b.jpg"),
        ("photos/a b.jpg", "a b.jpg"), ("Photos\\sub\\c.jpg", "sub/c.JPG"),
        ("{photos}/a b.jpg", "a b.jpg"), ("file://{photos}/a%20b.jpg", "a b.jpg"),
        ("file://localhost{photos}/sub/c.jpg", "sub/c.JPG"),
        ("C:\\Users\\me\\photos\\a b.jpg", "a b.jpg"), ("file:///D:/photos/a%20b.jpg", "a b.jpg"),
        ("\\\\server\\share\\photos\\sub\\c.jpg", "sub/c.JPG"),
        ("/home/somebody/photos/a b.jpg", "a b.jpg"), (NFC, NFD), (NFD, NFD),
        ("a%20b.jpg", "a b.jpg"), ("photos%2Fa%20b.jpg", "a b.jpg"), ("sub%5Cc.jpg", "sub/c.JPG"),
        ("50%25.jpg", "50%25.jpg"), ("photos/50%25.jpg", "50%25.jpg"),
        ("photos/d.jpg", "photos/d.jpg"), ("photos/photos/d.jpg", "photos/d.jpg"),
    ],
)  # fmt: skip
def test_a_path_as_others_write_it_finds_the_file(photos: Path, text: str, name: str) -> None:
    for other in ("50%25.jpg", "50%.jpg"):
        (photos / other).write_bytes(b"")
    finder = PathFinder(FolderIndex(photos))
    assert finder.find(text.replace("{photos}", photos.as_posix()), where="t") == (name, True)


@pytest.mark.parametrize(
    "text",
    ["../photos/a b.jpg", "/etc/passwd", "photos/../../x.jpg", "file:///etc/passwd", "a\0b.jpg",
     "C:\\Windows\\x.jpg", "file:///%2e%2e/x.jpg", "%2e%2e%2fx.jpg", "a%00b.jpg",
     "\\\\server\\x.jpg", "{photos}/../x.jpg"],
)  # fmt: skip
def test_a_path_outside_the_folder_is_refused(photos: Path, text: str) -> None:
    (photos.parent / "x.jpg").write_bytes(b"")
    finder = PathFinder(FolderIndex(photos))
    text = text.replace("{photos}", photos.as_posix())
    with pytest.raises(ShardError, match="is not inside the images folder"):
        finder.find(text, where="t")


def test_a_link_out_of_the_folder_is_not_taken_for_its_name(photos: Path) -> None:
    (photos.parent / "other").mkdir()
    (photos.parent / "other" / "x.jpg").write_bytes(b"")
    os.symlink(photos.parent / "other", photos / "link")
    assert PathFinder(FolderIndex(photos)).find("photos/link/x.jpg", where="t")[1] is False


def test_names_that_differ_in_unicode_form_alone_are_refused(photos: Path) -> None:
    (photos / NFC).write_bytes(b"")
    with pytest.raises(ShardError, match=r"differ only in the Unicode form .*keep one"):
        FolderIndex(photos)


@pytest.mark.parametrize(
    ("text", "images", "words"),
    [
        ("photos/sub/c.JPG", "photos/sub", r"did you mean `--images \S*photos?`\?|did you mean"),
        ("c.jpg", "photos", r"did you mean `--images .*photos/sub`\?"),
        ("elsewhere/a b.jpg", "photos", "the folder holds 'a b.jpg': take 'elsewhere/' off"),
        ("a b.png", "photos", "the folder holds 'a b.jpg': write its ending"),
        ("nothing.jpg", "photos", "complete the folder, .*`--on-error skip`"),
    ],
    ids=["front", "below", "base", "ending", "nothing"],
)
def test_missing_comes_before_unlabelled_and_offers_a_way(
    photos: Path, tmp_path: Path, text: str, images: str, words: str
) -> None:
    if text.startswith("photos/"):
        (photos / "sub" / "c.JPG").rename(photos / "sub" / "other.jpg")
        (tmp_path / "photos" / "photos" / "sub").mkdir()
        (tmp_path / "photos" / "photos" / "sub" / "c.JPG").write_bytes(b"")
    (tmp_path / "l.csv").write_text(f"path,score\n{text},1\n")
    with pytest.raises(ShardError, match="1 of 1 labelled images are not there") as caught:
        open_table(tmp_path / "l.csv", images=tmp_path / images, missing="error")
    assert "no label" not in str(caught.value)
    with pytest.raises(ShardError, match=words):
        open_table(tmp_path / "l.csv", images=tmp_path / images, missing="error")


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
@pytest.mark.parametrize("is_folder", [True, False], ids=["folder", "file"])
def test_an_image_folder_of_a_hub_brings_its_table(
    photos: Path, name: str, is_folder: bool
) -> None:
    rows = [("a b.jpg", 1), ("sub/c.JPG", 2), (NFC, 3), ("photos/d.jpg", 4)]
    if name.endswith("csv"):
        text = "file_name,score\n" + "".join(f"{path},{score}\n" for path, score in rows)
    else:
        text = "".join(f'{{"file_name": "{path}", "score": {score}}}\n' for path, score in rows)
    (photos / name).write_text(text, encoding="utf-8")
    samples = list(open_table(photos if is_folder else photos / name).samples())
    assert [(s.path, s.mos) for s in samples] == [
        ("a b.jpg", 1.0), ("sub/c.JPG", 2.0), (NFD, 3.0), ("photos/d.jpg", 4.0)
    ]  # fmt: skip
