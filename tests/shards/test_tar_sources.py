"""Which tars a text stands for; and that the advice about compressed ones works."""

import subprocess
import tarfile
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.tar_sources import expand_braces, expand_names, find_tars


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.tar", ["a.tar"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{0..6..3}", ["0", "3", "6"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("{a,{b,c}d}", ["a", "bd", "cd"]),
        ("{x}.tar", ["{x}.tar"]),
        ("open{1..2.tar", ["open{1..2.tar"]),
    ],
)
def test_braces_stand_for_what_a_shell_says(text: str, names: list[str]) -> None:
    assert sorted(expand_braces(text)) == sorted(names)
    assert expand_braces(text)[0] == names[0]


@pytest.mark.parametrize("text", ["{0..9999999}", "{0..999}{0..999}{0..999}"])
def test_braces_for_millions_are_refused(text: str) -> None:
    with pytest.raises(ShardError, match="more than 1,000,000 tars"):
        expand_braces(text)


def test_lists_are_joined_read_and_looked_for_beside_themselves(tmp_path: Path) -> None:
    (tmp_path / "b.tar").touch()
    (tmp_path / "list.txt").write_text("# mine\nb.tar\n\nc-{0..1}.tar\n")
    assert list(expand_names(f"a.tar::@{tmp_path}/list.txt::-", stdin=["d.tar\n"])) == [
        "a.tar",
        f"{tmp_path}/b.tar",
        "c-0.tar",
        "c-1.tar",
        "d.tar",
    ]
    with pytest.raises(ShardError, match="after @ stands the name of a text file"):
        list(expand_names("@gone.txt"))


def test_a_name_with_colons_that_is_there_is_itself(tmp_path: Path) -> None:
    (tmp_path / "a::b{1..2}.tar").touch()
    assert list(expand_names(f"{tmp_path}/a::b{{1..2}}.tar")) == [f"{tmp_path}/a::b{{1..2}}.tar"]


def make_tar(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w"):
        pass
    return path


def test_names_carry_the_path_below_what_is_shared(tmp_path: Path) -> None:
    for place in ("train/0.tar", "val/0.tar", "@eaDir/9.tar", ".hidden/9.tar", "1.tar"):
        make_tar(tmp_path / place)
    assert [tar.name for tar in find_tars(str(tmp_path))] == ["1", "train/0", "val/0"]
    both = find_tars(f"{tmp_path}/train/0.tar::{tmp_path}/val/0.tar::{tmp_path}/train/0.tar")
    assert [tar.name for tar in both] == ["train/0", "val/0"]
    assert [tar.name for tar in find_tars(f"{tmp_path}/train/0.tar")] == ["0"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a b/x.tar.gz", "gzip"),
        ("x.tgz", "gzip"),
        ("x.tar", "gzip"),
        ("x.tar.xz", "xz"),
        ("x.tar.bz2", "bzip2"),
        ("x.tar.zst", "zstd"),
    ],
)
def test_the_advice_about_a_compressed_tar_makes_it_readable(
    tmp_path: Path, name: str, pack: str
) -> None:
    plain = make_tar(tmp_path / name)
    try:
        tar = plain.read_bytes()
        packed = subprocess.run([pack, "-c"], input=tar, capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip(f"{pack} is not installed here")
    plain.write_bytes(packed)
    with pytest.raises(ShardError, match=f"{pack}-compressed") as error:
        find_tars(str(tmp_path))
    command = str(error.value).rpartition(": ")[2].strip("`")
    subprocess.run(command, shell=True, check=True)
    (found,) = find_tars(str(tmp_path))
    assert found.path.suffix == ".tar"


def test_many_compressed_tars_are_unpacked_by_one_command(tmp_path: Path) -> None:
    for k in range(7):
        tar = make_tar(tmp_path / f"{k % 2}" / f"{k}.tar")
        subprocess.run(["gzip", tar], check=True)
    with pytest.raises(ShardError, match="and 6 others") as error:
        find_tars(str(tmp_path))
    subprocess.run(str(error.value).rpartition(": ")[2].strip("`"), shell=True, check=True)
    assert len(find_tars(str(tmp_path))) == 7
