"""Files from elsewhere, in a folder, a table or a tar: a row each, and nothing else happens."""

import csv
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from lmcl.cli.score import command
from lmcl.errors import LmclError
from lmcl.inference.inputs import list_items
from lmcl.inference.saliency_overlay import draw_all
from lmcl.report.gmad import _picture

Make = Callable[[Path], object]
POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"


def sparse(path: Path) -> None:
    path.touch()
    os.truncate(path, 5 << 30)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def bomb(path: Path) -> None:
    path.write_bytes(b"P6\n40000 40000\n255\n")


FILES: dict[str, tuple[Make, str]] = {
    "fifo": (os.mkfifo, "neither a file nor a folder|is a FIFO"),
    "device": (device, "neither a file nor a folder|is a character device"),
    "sparse": (sparse, "5,368,709,120 bytes, more than"),
    "folder": (Path.mkdir, "holds no image|is a folder"),
    "postscript": (lambda path: path.write_bytes(POSTSCRIPT), "not a readable image"),
    "fits": (lambda path: path.write_bytes(b"SIMPLE  =                    T"), "not a readable"),
    "bomb": (bomb, "pixels"),
    "empty": (Path.touch, "the file is empty"),
}


@pytest.mark.parametrize("way", ["folder", "table", "saliency", "gmad"])
@pytest.mark.parametrize("case", FILES)
def test_what_is_no_still_image_is_named_and_starts_no_process(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, way: str
) -> None:
    import re

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a process was started")

    make, words = FILES[case]
    folder = tmp_path / "photos"
    folder.mkdir()
    make(folder / "a.jpg")
    (tmp_path / "list.csv").write_text("path\nphotos/a.jpg\n")
    for name in ("Popen", "run", "check_call"):
        monkeypatch.setattr(subprocess, name, refuse)
    if way == "gmad":
        _, said = _picture(folder / "a.jpg")
    elif way == "saliency":
        with pytest.raises(LmclError) as caught:
            draw_all([str(folder)], model_folder, tmp_path / "out", progress=False)
        said = str(caught.value)
    else:
        named = folder if way == "folder" else tmp_path / "list.csv"
        output = tmp_path / "s.csv"
        line = [named, "--model", model_folder, "--output", output, "--device", "cpu"]
        assert CliRunner().invoke(command, [*map(str, line), "--no-progress"]).exit_code == 3
        with output.open(newline="") as lines:
            (row,) = csv.DictReader(lines)
        said = row["error"]
    assert re.search(words, said), said
    assert len(said.encode()) <= 2048


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157] = size.ljust(12, b"\0"), kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def packed(size: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(out, "PNG")
    data = out.getvalue()
    good = header("good.png", b"%011o" % len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0")
    return good + (b"" if size < 0 else bytes(size))


TARS = {
    "8-gigabytes": header("a.png", b"%011o" % (8 << 30)),
    "a-terabyte": header("a.png", b"\x80" + (1 << 40).to_bytes(11, "big")),
    "negative": header("a.png", b"\xff" + (2**88 - 512).to_bytes(11, "big")),
    "long-names": (header("x", b"%011o" % 512, b"L") + b"n" * 512) * 3000,
    "no-number": header("a.png", b"99999999999"),
    "cut": header("a.png", b"%011o" % 5000) + b"x" * 100,
}


@pytest.mark.parametrize("case", TARS)
def test_a_forged_tar_is_a_row_and_what_stands_before_is_scored(
    model_folder: Path, tmp_path: Path, case: str
) -> None:
    (tmp_path / "x.tar").write_bytes(packed(-1) + TARS[case] + bytes(1024))
    output = tmp_path / "s.csv"
    line = [tmp_path / "x.tar", "--model", model_folder, "--output", output, "--device", "cpu"]
    assert CliRunner().invoke(command, [*map(str, line), "--no-progress"]).exit_code == 3
    with output.open(newline="") as lines:
        good, bad = csv.DictReader(lines)
    assert good["path"].endswith("x.tar/good.png")
    assert good["score"]
    assert "the tar cannot be read" in bad["error"]


NAMES = (
    "=HYPERLINK(1).jpg",
    "+1.jpg",
    "-a.jpg",
    "@SUM(A1).jpg",
    "\t=1.jpg",
    "\x1b[2J\x1b[31m.jpg",
    "a\nerror: forged.jpg",
    "\u202egpj.exe.jpg",
)


def test_no_name_is_a_formula_in_a_table_or_a_command_to_a_terminal(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in NAMES:
        Image.new("RGB", (64, 64), "red").save(Path(name).absolute())
    line = ["--model", str(model_folder), "--below", "1", "--device", "cpu", "--no-progress"]
    for output in ("s.csv", "s.jsonl"):
        asked = [*line, "--output", output, "--", *NAMES]
        done = CliRunner().invoke(command, asked)
        assert done.exit_code == 0, done.output
        assert "\x1b" not in done.output
        # A line of counts, one of the missing calibration, one a name, one of the filter.
        assert len(done.output.splitlines()) == len(NAMES) + 3
        assert f"{len(NAMES)} rows (0 failed, 0 kept)" in done.output
    with open("s.csv", newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    assert not [row["path"] for row in rows if row["path"].startswith(("=", "+", "-", "@", "\t"))]
    assert all(Path(row["path"]).is_file() for row in rows)
    assert [i.file for i in list_items(["s.csv"])] == [os.path.normpath(r["path"]) for r in rows]
    resumed = CliRunner().invoke(command, ["--resume", *line, "--output", "s.csv", "--", *NAMES])
    assert f"(0 failed, {len(NAMES)} kept)" in resumed.output
