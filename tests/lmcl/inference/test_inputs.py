"""What is named becomes items: nothing is lost, nothing is read as what it is not."""

import gzip
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from lmcl.inference.inputs import Item, TableOptions, list_items
from shards.side_files import LeftOut, PathFilter

ODD = os.fsdecode(b"caf\xe9.jpg")


def listed(*arguments: Path | str, **options) -> list[Item]:
    return list_items([str(a) for a in arguments], **options)


def tar_of(file: Path, *members: Path) -> Path:
    with tarfile.open(file, "w") as tar:
        for member in members:
            tar.add(member, member.name)
    return file


def test_a_name_that_is_not_utf8_is_spelled_out_and_its_file_is_read(photos: Path) -> None:
    shutil.copy(photos / "img.00.jpg", photos / ODD)
    by_folder = {i.path: i for i in listed(photos)}
    (by_table,) = listed(_table(photos / "l.csv", b"path\ncaf\xe9.jpg\n"))
    assert by_folder[f"{photos}/caf\\xe9.jpg"].read() == (photos / "img.00.jpg").read_bytes()
    assert by_table.path == "caf\\xe9.jpg"
    assert by_table.read() == (photos / "img.00.jpg").read_bytes()


def test_two_tables_that_give_two_images_one_name_are_two_items(photos, tmp_path) -> None:
    for k in range(2):
        (tmp_path / f"t{k}").mkdir()
        shutil.copy(photos / f"img.0{k}.jpg", tmp_path / f"t{k}" / "a.jpg")
        _table(tmp_path / f"t{k}" / "l.csv", b"path\na.jpg\n")
    items = listed(tmp_path / "t0" / "l.csv", tmp_path / "t1" / "l.csv")
    assert [i.path for i in items] == [f"{tmp_path}/t0/a.jpg", f"{tmp_path}/t1/a.jpg"]
    assert items[0].read() != items[1].read()
    # Alone, a table's own names stay: people join scores to their table by them.
    assert [i.path for i in listed(tmp_path / "t0" / "l.csv")] == ["a.jpg"]


def test_two_members_of_one_name_are_two_items(photos, tmp_path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for k in range(2):
            tar.add(photos / f"img.0{k}.jpg", "a.jpg")
    items = listed(tmp_path / "x.tar")
    assert [i.read() for i in items] == [(photos / f"img.0{k}.jpg").read_bytes() for k in (0, 1)]
    assert [i.path for i in items] == [f"{tmp_path}/x.tar/a.jpg at {i.offset}" for i in items]


def test_an_image_is_listed_once_however_it_is_named(photos, monkeypatch) -> None:
    monkeypatch.chdir(photos)
    table = _table(photos / "l.csv", b"path\nimg.00.jpg\n./img.00.jpg\n")
    assert (
        len(listed("img.00.jpg", "./img.00.jpg", photos / "img.00.jpg", table, "img.00.jp*")) == 1
    )


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"path,note\nimg.00.jpg,b\xe9\n", ""),
        (b"path\ncaf\xe9.jpg\n", "no such file; the table's text is not UTF-8"),
        (b"note,path\nx\n", "line 2 of the table has no path"),
        (b"path,note\n,x\n", "line 2 of the table has no path"),
        (b"path\na\x00b.jpg\n", "a NUL character"),
        (b"title\nx\n", "no column 'path' among title"),
        (b"", "no column 'path' among no columns"),
        (b"img.00.jpg,.5\nimg.01.jpg,.6\n", "the first line holds the image 'img.00.jpg'"),
        (b"path;image\nimg.00.jpg;x\n", "'path' and 'image' could all be the path"),
        (b"path\nfotos/nothing.jpg\n", ""),
        (b'path\n"' + b"x" * 200_000 + b'"\n', "field larger than field limit"),
        (b"path\n", "holds no image"),
    ],
    ids=[
        "latin-1",
        "latin-1-path",
        "short",
        "empty",
        "nul",
        "other",
        "void",
        "headerless",
        "two",
        "absent",
        "long",
        "0",
    ],
)
def test_a_bad_table_is_a_row_that_says_what_is_wrong_with_it(photos, data, problem) -> None:
    (item,) = listed(_table(photos / "l.csv", data))
    assert problem in item.problem
    assert bool(item.problem) == bool(problem)


@pytest.mark.parametrize(
    "text",
    [
        "path\nimg.00.jpg\n", "file_name,score\nimg.00.jpg,3\n", "Image Path;MOS\nimg.00.jpg;2,5\n",
        "sep=;\nfilepath;x;\n.\\IMG.00.JPG;;\n", "path\n'img.00.jpg'\n",
        "path\nphotos/img.00.jpg\n", "path\nC:\\Users\\me\\photos\\img.00.jpg\n",
        "path\nfile://{folder}/img.00.jpg\n", "path\n{folder}/img.00.jpg\n",
        "# a study\n\npath\nimg.00.jpg\n",
    ],
)  # fmt: skip
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_table_as_others_write_it_names_the_same_image(photos, text, encoding) -> None:
    text = text.replace("{folder}", photos.as_posix())
    (item,) = listed(_table(photos / "l.csv", text.encode(encoding)))
    assert item.read() == (photos / "img.00.jpg").read_bytes()


def test_a_table_of_another_folder_is_read_by_options_and_offered(photos, tmp_path) -> None:
    (tmp_path / "lists").mkdir()
    table = _table(tmp_path / "lists" / "l.csv", b"path;other\nx;img.00.jpg\n")
    options = TableOptions(path_column="Other", images=photos)
    (item,) = listed(table, tables=options)
    assert item.read() == (photos / "img.00.jpg").read_bytes()
    _table(table, f"path\n{photos.name}/img.00.jpg\n".encode())
    (item,) = listed(table)
    assert f"did you mean `--images {photos.parent}`" in item.problem
    assert listed(table, tables=TableOptions(images=photos.parent))[0].read()


def test_what_was_recognised_is_told_in_one_line(photos) -> None:
    told: list[str] = []
    _table(photos / "l.csv", "path;x\nimg.00.jpg;1\n".encode("utf-16"))
    listed(photos / "l.csv", tables=TableOptions(tell=told.append))
    assert told == [f"{photos}/l.csv: read as UTF-16, cells between semicolons"]


def test_a_nul_on_stdin_is_a_row(photos) -> None:
    bad, good = listed("-", stdin=iter(["a\0b.jpg\n", f"{photos}/img.00.jpg\n"]))
    assert "a NUL character" in bad.problem
    assert bad.path == "a\\x00b.jpg"
    assert good.problem == ""


def test_tars_in_folders_and_patterns_are_opened(photos, tmp_path) -> None:
    (tmp_path / "set" / "deeper").mkdir(parents=True)
    tar_of(tmp_path / "set" / "0.tar", photos / "img.00.jpg", photos / "img.01.jpg")
    tar_of(tmp_path / "set" / "deeper" / "1.tar", photos / "img.02.jpg")
    named = [f"{tmp_path}/set/0.tar/img.0{k}.jpg" for k in range(2)]
    named.append(f"{tmp_path}/set/deeper/1.tar/img.02.jpg")
    assert [i.path for i in listed(tmp_path / "set")] == named
    assert [i.path for i in listed(tmp_path / "set" / "**" / "*.tar")] == named
    assert [i.path for i in listed(tmp_path / "set" / "*.tar")] == named[:2]


def test_a_pattern_for_tables_opens_them_and_a_folder_does_not(photos) -> None:
    _table(photos / "l.csv", b"path\nimg.00.jpg\nimg.01.jpg\n")
    assert [i.path for i in listed(photos / "*.csv")] == ["img.00.jpg", "img.01.jpg"]
    others = LeftOut()
    assert not [i for i in listed(photos, others=others) if i.path.endswith(".csv")]
    assert others.sentences() == ("1 file of other kinds left out: 1 .csv",)


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz"])
def test_a_compressed_tar_is_refused_and_not_read_at_wrong_places(photos, tmp_path, name) -> None:
    plain = tar_of(tmp_path / "plain", photos / "img.00.jpg").read_bytes()
    (tmp_path / name).write_bytes(gzip.compress(plain))
    (item,) = listed(tmp_path / name)
    assert "compressed; members are read in place, so unpack it" in item.problem
    subprocess.run(item.problem.rpartition(": ")[2].strip("`"), shell=True, check=True)
    (item,) = listed(tmp_path / "x.tar")
    assert item.read() == (photos / "img.00.jpg").read_bytes()


def test_what_holds_no_image_is_a_row(tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    tar_of(tmp_path / "x.tar")
    for place in ("empty", "x.tar"):
        (item,) = listed(tmp_path / place)
        assert item.problem == "holds no image"
    (item,) = listed("-", stdin=iter([]))
    assert item.problem == "no path came on stdin"


def test_what_is_left_out_is_not_listed_however_it_is_reached(photos, tmp_path) -> None:
    (photos / "bad" / "deeper").mkdir(parents=True)
    for name in ("bad/img.00.jpg", "bad/deeper/img.01.jpg", "scores.csv"):
        (photos / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(photos)
    out = [tmp_path / "link" / "bad", photos / "scores.csv"]
    lines = iter([f"{photos}/bad/img.00.jpg\n"])
    for arguments in ([photos], [photos / "**"], sorted(photos.iterdir())):
        assert len(listed(*arguments, left_out=out)) == 12
    assert listed(photos / "*.csv", left_out=out)[0].problem
    assert listed("-", stdin=lines, left_out=out) == []


def _table(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


SYSTEM = ("@eaDir/a.jpg", "sub/__MACOSX/._a.jpg", "Thumbs.db", "._a.jpg", "sub/desktop.ini")
OTHERS = ("a.xmp", "sub/b.XMP", "labels.csv", "clip.mp4", "readme.md")


@pytest.mark.parametrize("how", ["{}", "{}/**", "{}/*"])
def test_what_lies_beside_images_is_no_error_and_is_said(photos, how) -> None:
    before = [item.path for item in listed(how.format(photos))]
    for name in (*SYSTEM, *OTHERS):
        (photos / name).parent.mkdir(exist_ok=True, parents=True)
        (photos / name).write_bytes(b"none")
    others = LeftOut()
    found = listed(how.format(photos), others=others)
    assert [item.path for item in found if not item.problem] == before
    sentence = "5 files of other kinds left out: 2 .xmp, 1 .csv, 1 .md, 1 .mp4"
    assert others.sentences() == (sentence,)
    (asked,) = listed(photos / "*.mp4")
    assert asked.path.endswith("clip.mp4")


@pytest.mark.parametrize(
    ("include", "exclude", "count"),
    [(["*.jpg"], [], 6), ([], ["a b"], 6), ([], ["*.png", "img.00*"], 5), (["a b/*"], [], 6)],
)
def test_patterns_choose_below_the_argument(photos, include, exclude, count) -> None:
    files = PathFilter(include=include, exclude=exclude)
    assert len(listed(photos, files=files)) == count
    tar = tar_of(photos.parent / "x.tar", *sorted(photos.rglob("*.*g")))
    assert len(listed(tar, files=PathFilter(include=["*.jpg"]))) == 6


@pytest.mark.parametrize("text", ["{0}/{{a,b}}.tar", "{0}/a.tar::{0}/b.tar", "@{0}/list.txt"])
def test_several_names_in_one_argument(photos, tmp_path, text) -> None:
    tar_of(tmp_path / "a.tar", photos / "img.00.jpg")
    tar_of(tmp_path / "b.tar", photos / "img.01.jpg")
    (tmp_path / "list.txt").write_text("a.tar\nb.tar\n")
    named = [item.path for item in listed(text.format(tmp_path))]
    assert named == [f"{tmp_path}/a.tar/img.00.jpg", f"{tmp_path}/b.tar/img.01.jpg"]


def test_a_missing_list_is_a_row(tmp_path) -> None:
    (item,) = listed(f"@{tmp_path}/gone.txt")
    assert "after @ stands the name of a text file" in item.problem


def test_members_of_a_tar_are_images_by_ending_or_content(photos, tmp_path) -> None:
    whole = (photos / "img.00.jpg").read_bytes()
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("d/", "d/a.img", "d/b.jpe", "d/._b.jpe", "d/c.json", "d/e.bin", "d/f.heic"):
            info = tarfile.TarInfo(name.rstrip("/"))
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            info.size = 0 if name.endswith("/") else len(whole)
            data = b"\0" * len(whole) if name.endswith(".bin") else whole
            archive.addfile(info, io.BytesIO(data))
    others = LeftOut()
    named = [Path(item.path).name for item in listed(tmp_path / "x.tar", others=others)]
    assert named == ["a.img", "b.jpe", "f.heic"]
    assert others.sentences() == ("2 files of other kinds left out: 1 .bin, 1 .json",)
