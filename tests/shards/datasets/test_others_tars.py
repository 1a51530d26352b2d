"""Tars as others make them, through the command that packs them."""

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from shards.cli import cli
from shards.errors import ShardError
from shards.read import open_set

Members = Sequence[tuple[str, bytes]]
Picture = Callable[..., bytes]


def write(path: Path, members: Members) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            info.size = len(data)
            info.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(info, io.BytesIO(data))


def build(source: Path | str, out: Path, *options: str, **how: str) -> Result:
    line = ["build", "wds", str(source), "--output", str(out), "--workers", "1", "--no-progress"]
    return CliRunner().invoke(cli, [*line, *options], **how)


def score(value: object) -> bytes:
    return json.dumps({"mos": value}).encode()


@pytest.fixture
def samples(picture: Picture) -> Callable[[str, str], Members]:
    def make(key: str, ending: str = "jpg") -> Members:
        number = int(key[-1])
        return [
            (f"{key}.{ending}", picture(number, codec="jpg" if "p" not in ending else "png")),
            (f"{key}.json", score(number)),
        ]

    return make


def test_a_tar_of_a_folder_in_the_order_of_the_disk_is_read(tmp_path: Path, samples) -> None:
    (tmp_path / "set").mkdir()
    for k in (1, 0, 2):
        for name, data in samples(f"00{k}"):
            (tmp_path / "set" / name).write_bytes(data)
    # Scores first, then images: no sample's members stand together.
    for name in ("._000.jpg", "Thumbs.db"):
        (tmp_path / "set" / name).write_bytes(b"of the system")
    order = sorted(os.listdir(tmp_path / "set"), key=lambda name: (name[-4:], name))
    tar = ["tar", "cf", "x.tar", "--no-recursion", "set", *(f"set/{name}" for name in order)]
    subprocess.run(tar, cwd=tmp_path, check=True)
    done = build(tmp_path / "x.tar", tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = open_set(tmp_path / "out").samples
    assert {str(p): m for p, m in zip(table.path, table.mos, strict=True)} == {
        f"x/set/00{k}.jpg": float(k) for k in range(3)
    }
    assert "left out" not in done.output


@pytest.mark.parametrize("how", ["folder", "braces", "colons", "list", "stdin", "stars"])
def test_two_tars_of_one_name_are_two_files(tmp_path: Path, samples, how: str) -> None:
    root = tmp_path / "root"
    write(root / "train" / "0.tar", [*samples("000"), *samples("001")])
    write(root / "val" / "0.tar", samples("002"))
    (tmp_path / "list.txt").write_text("root/train/0.tar\nroot/val/0.tar\n")
    source = {
        "folder": str(root),
        "braces": f"{root}/{{train,val}}/0.tar",
        "colons": f"{root}/train/0.tar::{root}/val/{{0..0}}.tar",
        "list": f"@{tmp_path}/list.txt",
        "stdin": "-",
        "stars": f"{root}/*/*.tar",
    }[how]
    names = f"{root}/train/0.tar\n{root}/val/0.tar\n" if how == "stdin" else ""
    done = build(source, tmp_path / "out", input=names)
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").samples.path.tolist() == [
        "train/0/000.jpg",
        "train/0/001.jpg",
        "val/0/002.jpg",
    ]


def test_bad_samples_are_named_at_once_or_rejected(tmp_path: Path, samples, picture) -> None:
    good = [*samples("000"), *samples("001")]
    bad = [
        ("no-image.json", score(1)),
        ("no-json.jpg", picture(7, codec="jpg")),
        ("null.jpg", picture(8, codec="jpg")),
        ("null.json", score(None)),
        ("word.jpg", picture(9, codec="jpg")),
        ("word.json", score("good")),
        ("other.jpg", picture(10, codec="jpg")),
        ("other.json", b'{"score": 1}'),
        ("torn.jpg", picture(11, codec="jpg")),
        ("torn.json", b'{"mos": '),
    ]
    write(tmp_path / "tars" / "x.tar", [*good, *bad, ("README.md", b"# mine")])
    failed = build(tmp_path / "tars", tmp_path / "out")
    assert isinstance(failed.exception, ShardError)
    message = str(failed.exception)
    assert "6 cannot be packed" in message
    for name, why in {
        "no-image": "has no image, only json",
        "no-json": "has no member .json",
        "null": "has null in the field 'mos'",
        "word": "score 'good' is not",
        "other": "has no field 'mos'",
        "torn": "has no JSON",
    }.items():
        assert f"x.tar: {name}" in message
        assert why in message
    assert len(message.encode()) <= 2048
    done = build(tmp_path / "tars", tmp_path / "out", "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert "1 file of other kinds left out: 1 .md" in done.output
    rejected = [
        json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    ]
    assert len(rejected) == 6
    assert open_set(tmp_path / "out").manifest.num_samples == 2


def test_of_many_bad_samples_the_first_twenty_are_named(tmp_path: Path, samples) -> None:
    write(tmp_path / "x.tar", [*samples("000"), *((f"b{k:03d}.json", score(k)) for k in range(30))])
    message = str(build(tmp_path / "x.tar", tmp_path / "out").exception)
    assert "30 cannot be packed, the first 20 are" in message
    assert all(f"b{k:03d}" in message for k in range(20))
    assert "b020" not in message


def test_of_several_bad_images_in_a_folder_all_are_named(tmp_path: Path, picture: Picture) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(4):
        whole = picture(k)
        (folder / f"{k}.png").write_bytes(whole if k % 2 else whole[:-30])
    line = ["build", "unlabelled", str(folder), "--output", str(tmp_path / "out"), "--workers", "1"]
    message = str(CliRunner().invoke(cli, line).exception)
    assert "2 cannot be packed" in message
    assert "0.png" in message
    assert "2.png" in message


@pytest.mark.parametrize("member", ["dist.jpg", "dist", "nope;dist.jpg", ".DIST.jpg"])
def test_one_of_several_images_is_chosen(tmp_path: Path, picture: Picture, member: str) -> None:
    images = {name: picture(k, codec="jpg") for k, name in enumerate(("dist", "ref", "mask"))}
    members = [(f"000.{name}.jpg", data) for name, data in images.items()]
    write(tmp_path / "x.tar", [*members, ("000.json", score(3))])
    refused = str(build(tmp_path / "x.tar", tmp_path / "out").exception)
    assert "has 3 images among" in refused
    assert "`--image-member dist.jpg`" in refused
    done = build(tmp_path / "x.tar", tmp_path / "out", "--image-member", member)
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").read_bytes(0) == images["dist"]


@pytest.mark.parametrize("ending", ["img", "jfif", "jpe", "JPG", "bin", "png"])
def test_unknown_endings_are_told_by_content(tmp_path: Path, samples, ending: str) -> None:
    write(tmp_path / "x.tar", samples("001", ending))
    done = build(tmp_path / "x.tar", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").manifest.num_samples == 1


@pytest.mark.parametrize("options", [("--include", "*.jpg"), ("--exclude", "*_ref*")])
def test_members_are_chosen_by_patterns(tmp_path: Path, picture: Picture, options) -> None:
    write(tmp_path / "x.tar", [("a.jpg", picture(1, codec="jpg")), ("a_ref.png", picture(2))])
    done = build(tmp_path / "x.tar", tmp_path / "out", "--score-member", "none", *options)
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "out").samples.path.tolist() == ["x/a.jpg"]
    assert "1 file left out by --include and --exclude" in done.output


def test_two_tars_joined_by_cat_are_not_half_read(tmp_path: Path, samples) -> None:
    write(tmp_path / "a.tar", samples("000"))
    write(tmp_path / "b.tar", samples("001"))
    joined = (tmp_path / "a.tar").read_bytes() + (tmp_path / "b.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(joined)
    (tmp_path / "b.tar").unlink()
    message = str(build(tmp_path / "a.tar", tmp_path / "out").exception)
    assert "a second archive begins at byte 10,240" in message
