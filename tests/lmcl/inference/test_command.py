"""`lmcl score` and its neighbours as people call them: what goes wrong is a sentence."""

import csv
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from lmcl.cli.main import main
from lmcl.cli.score import command
from lmcl.inference.scores_file import read_rows
from shards.errors import ShardError

REPO = Path(__file__).resolve().parents[3]
ODD = os.fsdecode(b"caf\xe9.jpg")
SIZES = {
    "dot.png": (2, 2),
    "line.png": (400, 3),
    "plain.png": (90, 70),
    "square.png": (40, 40),
    "strip.png": (40, 400),
}


def score(*arguments: Path | str, model: Path, output: Path, **options):
    line = [*arguments, "--model", model, "--output", output, "--device", "cpu", "--no-progress"]
    return CliRunner().invoke(command, [str(part) for part in line], **options)


def names(output: Path) -> list[str]:
    if output.suffix == ".csv":
        with output.open(newline="", encoding="utf-8") as lines:
            return [row["path"] for row in csv.DictReader(lines)]
    if output.suffix == ".jsonl":
        return [json.loads(line)["path"] for line in output.read_text("utf-8").splitlines()]
    return pq.read_table(output)["path"].to_pylist()


def test_a_mistyped_folder_says_on_the_terminal_why_nothing_was_scored(
    model_folder, photos, tmp_path
) -> None:
    done = score(photos / "img.00.jpg", "fotos", model=model_folder, output=tmp_path / "s.csv")
    assert done.exit_code == 3
    assert "(1 failed, 0 kept)" in done.output
    said = next(line for line in done.stderr.splitlines() if line.startswith("not scored"))
    assert said.startswith("not scored, the first: fotos: ")
    assert "no such file" in said


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_name_that_is_not_utf8_is_written_and_taken_up_again(
    model_folder, photos, tmp_path, suffix
) -> None:
    shutil.copy(photos / "img.00.jpg", photos / ODD)
    (photos / "gone.jpg").symlink_to(os.fsdecode(b"\xff"))
    output = tmp_path / f"s{suffix}"
    first = score(photos, model=model_folder, output=output)
    again = score(photos, "--resume", model=model_folder, output=output)
    assert "(1 failed, 0 kept)" in first.output
    assert "(1 failed, 13 kept)" in again.output
    assert f"{photos}/caf\\xe9.jpg" in names(output)


@pytest.mark.slow
def test_two_processes_share_what_comes_on_stdin(model_folder, photos, tmp_path) -> None:
    shutil.copy(photos / "img.00.jpg", photos / ODD)
    files = sorted(map(str, photos.glob("*.jpg")))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port"]
    done = subprocess.run(
        [
            *(sys.executable, *launcher, port, "-m", "lmcl", "score", "-", "--model", model_folder),
            *("--output", tmp_path / "s.csv", "--device", "cpu", "--no-progress"),
        ],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        input=os.fsencode("\n".join(files)),
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert names(tmp_path / "s.csv") == [f.replace("\udce9", "\\xe9") for f in files]


def test_a_closed_stdin_is_a_row(model_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    asked = ["score", "-", "--model", str(model_folder), "--output", str(tmp_path / "s.csv")]
    with pytest.raises(SystemExit) as caught:
        main([*asked, "--device", "cpu", "--no-progress"])
    assert caught.value.code == 3
    assert "no path came on stdin" in (tmp_path / "s.csv").read_text()


@pytest.mark.parametrize("below", ["3", "-0.1", "nan", "inf"])
def test_a_limit_in_another_scale_moves_nothing(model_folder, photos, tmp_path, below) -> None:
    gate = ["--below", below, "--move-to", tmp_path / "rejected"]
    done = score(photos, *gate, model=model_folder, output=tmp_path / "s.csv")
    assert done.exit_code == 2
    assert "is not in 0..1: it is a quality" in done.output
    assert not (tmp_path / "rejected").exists()


def test_what_was_moved_inside_the_folder_is_left_alone_the_second_time(
    model_folder, photos
) -> None:
    target, output = photos / "rejected", photos / "s.csv"
    gate = [photos, "--below", "1", "--move-to", target, "--sheet", photos / "sheet.html"]
    assert "moved 12 of 12" in score(*gate, model=model_folder, output=output).output
    before = sorted(target.rglob("*"))
    shutil.copy(target / "img.00.jpg", photos / "new.jpg")
    again = score(*gate, "--resume", model=model_folder, output=output)
    assert "moved 1 of 1" in again.output
    assert sorted(target.rglob("*")) == sorted([*before, target / "new.jpg"])


def test_a_link_is_moved_under_its_own_name(model_folder, photos, tmp_path) -> None:
    (photos / "a b" / "mine.jpg").symlink_to("../img.00.jpg")
    gate = ["--below", "1", "--move-to", tmp_path / "rejected"]
    score(photos / "a b", *gate, model=model_folder, output=tmp_path / "s.csv")
    moved = tmp_path / "rejected" / "mine.jpg"
    assert moved.is_symlink()
    assert moved.samefile(photos / "img.00.jpg")


@pytest.mark.parametrize("name", ["s[1].csv", "s?.csv", "s*.csv"])
def test_an_output_name_is_never_a_pattern(model_folder, photos, tmp_path, name) -> None:
    (tmp_path / ".s1.csv.rows-0000-1").write_text("of another job\n")
    images = photos / "a b"
    assert score(images, model=model_folder, output=tmp_path / name).exit_code == 0
    assert len(names(tmp_path / name)) == 6
    assert "6 kept" in score(images, "--resume", model=model_folder, output=tmp_path / name).output
    assert (tmp_path / ".s1.csv.rows-0000-1").exists()


@pytest.mark.parametrize(
    ("asked", "words", "code"),
    [
        (["--device", "foo"], "device 'foo' cannot be used", 2),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used", 2),
        (["--device", "meta"], "device 'meta' cannot be used", 2),
        (["--device", "cpu", "--output", "/proc/x/s.csv"], "error: /proc/x: No such file", 1),
    ],
    ids=["no-device", "no-card", "no-numbers", "no-folder"],
)
def test_what_the_machine_refuses_is_a_sentence(
    model_folder, photos, tmp_path, monkeypatch, capsys, asked, words, code
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["score", str(photos / "a b"), "--model", str(model_folder), "--no-progress", *asked])
    assert caught.value.code == code
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.csv"))


def test_a_report_that_cannot_be_written_is_a_sentence(model_folder, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", str(model_folder), "--format", "pt2", "--output", "/proc/x/m.pt2"])
    assert caught.value.code == 1
    assert "error: /proc/x: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_scores_file_inside_the_folder_is_no_row_of_the_next(
    model_folder, photos, suffix
) -> None:
    for name in ("first", "second"):
        output = photos / "a b" / f"{name}{suffix}"
        assert score(photos / "a b", model=model_folder, output=output).exit_code == 0
        assert len(names(output)) == 6


def test_an_empty_folder_is_a_failure_and_says_so(model_folder, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    done = score(tmp_path / "empty", model=model_folder, output=tmp_path / "s.csv")
    assert done.exit_code == 3
    assert "holds no image" in (tmp_path / "s.csv").read_text()


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_sizes_and_notes_are_the_last_columns(model_folder, tmp_path, suffix) -> None:
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size, (90, 120, 30)).save(folder / name)
    output = tmp_path / f"s{suffix}"
    done = score(folder, model=model_folder, output=output)
    assert (done.exit_code, "3 with a note" in done.output) == (0, True)
    rows = {Path(row.path).name: row for row in read_rows(output)}
    assert {name: (row.width, row.height) for name, row in rows.items()} == SIZES
    assert {name: row.note for name, row in rows.items() if row.note} == {
        "dot.png": "tiny: 2 x 2 pixels",
        "line.png": "tiny: 400 x 3 pixels",
        "strip.png": "extreme shape: 40 x 400 pixels",
    }
    if suffix == ".csv":
        assert output.read_text().splitlines()[0].endswith("quality,note,width,height")


def test_min_side_refuses_in_the_row_and_by_the_exit_code(model_folder, tmp_path) -> None:
    folder = tmp_path / "sizes"
    folder.mkdir()
    for name, size in SIZES.items():
        Image.new("RGB", size, (90, 120, 30)).save(folder / name)
    done = score(folder, "--min-side", "40", model=model_folder, output=tmp_path / "s.csv")
    errors = {Path(row.path).name: row.error for row in read_rows(tmp_path / "s.csv")}
    assert done.exit_code == 3
    assert {name for name, error in errors.items() if error} == {"dot.png", "line.png"}
    assert "2 x 2 pixels, with a side below the 40 of `--min-side`" in errors["dot.png"]


def test_a_sheet_replaces_a_sheet_and_no_photograph(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    photo, page = photos / "img.00.jpg", tmp_path / "sheet.html"
    before, options = photo.read_bytes(), {"model": model_folder, "catch_exceptions": True}
    refused = score(photo, "--sheet", photo, output=tmp_path / "s.csv", **options)
    assert isinstance(refused.exception, ShardError)
    assert "was not written by this command" in str(refused.exception)
    assert photo.read_bytes() == before
    assert not (tmp_path / "s.csv").exists()
    for name in ("s.csv", "t.csv"):
        done = score(photo, "--sheet", page, output=tmp_path / name, **options)
        assert done.exit_code == 0, done.output


def test_without_a_model_the_starter_scores(photos, tmp_path) -> None:
    output = tmp_path / "s.csv"
    asked = [str(photos / "img.00.jpg"), "--output", str(output), "--device", "cpu"]
    done = CliRunner().invoke(command, [*asked, "--no-progress"])
    assert done.exit_code == 0, done.output
    assert "scale biq2021 mos 0..1, higher is better" in done.output
    (row,) = csv.DictReader(output.read_text(encoding="utf-8").splitlines())
    assert 0 < float(row["quality"]) < 1


def tiff_of_16_bits(pixels: np.ndarray, *, white_is_zero: bool) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "TIFF")
    data = bytearray(out.getvalue())
    (directory,) = struct.unpack("<I", data[4:8])
    for at in range(directory + 2, directory + 2 + 12 * data[directory], 12):
        if data[at : at + 2] == struct.pack("<H", 262):
            data[at + 8] = not white_is_zero
    return bytes(data)


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """One picture in files that are whole, damaged, or something else than their names say."""
    folder = tmp_path / "odd"
    folder.mkdir()
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((128, 96))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=92)
    whole = out.getvalue()
    middle = len(whole) * 2 // 3
    (folder / "whole.jpg").write_bytes(whole)
    (folder / "no-end.jpg").write_bytes(whole[:-2])
    (folder / "half.jpg").write_bytes(whole[:middle])
    (folder / "end-inside.jpg").write_bytes(whole[:middle] + b"\xff\xd9" + whole[middle + 2 :])
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><html><head></head></html>")
    (folder / "film.jpg").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(99))
    (folder / "drawn.png").write_bytes(b"<svg xmlns='http://www.w3.org/2000/svg'/>")
    (folder / "a.jxl").write_bytes(b"\xff\x0a" + bytes(99))
    image.save(folder / "a.avif")
    wide = np.asarray(image.convert("L")).astype(np.uint16) * 257
    (folder / "black0.tif").write_bytes(tiff_of_16_bits(wide, white_is_zero=False))
    (folder / "white0.tif").write_bytes(tiff_of_16_bits(0xFFFF - wide, white_is_zero=True))
    return folder


def test_damage_is_a_note_and_what_is_no_image_is_named(model_folder, odd, tmp_path, capfd) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(Image.open(odd / "whole.jpg")).save(odd / "a.heic", quality=95)
    for name in ("a.heic", "a.avif"):
        whole = (odd / name).read_bytes()
        (odd / f"torn-{name}").write_bytes(whole[: len(whole) // 2])
    # The first tag says where the next directory is: beyond the end, as in a raw file cut short.
    (odd / "torn.dng").write_bytes(b"II*\0" + (8).to_bytes(4, "little") + bytes(6))
    done = score(odd, model=model_folder, output=tmp_path / "s.csv")
    rows = {Path(row.path).name: row for row in read_rows(tmp_path / "s.csv")}
    assert done.exit_code == 3
    assert {name: row.note for name, row in rows.items() if row.note} == {
        "no-end.jpg": "JPEG without its end marker, every row is there",
        "end-inside.jpg": "damaged JPEG: picture data ends before the last rows",
    }
    errors = {name: row.error for name, row in rows.items() if row.error}
    for name, what in {
        "page.jpg": "a web page (HTML)",
        "film.jpg": "a video",
        "drawn.png": "an SVG drawing",
        "a.jxl": "a JPEG XL image",
        "half.jpg": "image file is truncated",
        "torn-a.heic": "it is a HEIC image that is damaged",
        "torn-a.avif": "it is an AVIF image that is damaged",
        "torn.dng": "or a camera's raw file, which begins like one",
    }.items():
        if name.startswith("torn"):
            assert "copy it from its source again" in errors[name]
        assert what in errors.pop(name)
    assert errors == {}
    assert rows["no-end.jpg"].score == rows["whole.jpg"].score
    assert rows["white0.tif"].score == rows["black0.tif"].score
    assert abs(rows["a.heic"].quality - rows["whole.jpg"].quality) < 0.05
    assert "Warning" not in capfd.readouterr().err


def test_the_output_may_be_a_pipe(model_folder, photos) -> None:
    done = score(photos / "img.00.jpg", model=model_folder, output="-")
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["path"] for row in rows] == [str(photos / "img.00.jpg")]
    assert float(rows[0]["score"])
    assert "standard output: 1 rows" in done.stderr
    assert "/scores.csv" not in done.stderr
    again = score(photos, "--resume", model=model_folder, output="-")
    assert again.exit_code == 2
    assert "name a file" in again.output


def test_a_format_is_known_in_capitals(model_folder, photos, tmp_path) -> None:
    output = tmp_path / "S.CSV"
    for _ in range(2):
        done = score(photos / "img.00.jpg", "--resume", model=model_folder, output=output)
        assert done.exit_code == 0, done.output
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"], ids=["lines", "windows", "nul"])
def test_a_list_on_stdin_may_end_its_names_by_lines_or_by_nul(
    model_folder, photos, tmp_path, end
) -> None:
    odd = photos / ("a\nb.jpg" if end == "\0" else "a b.jpg")
    shutil.copy(photos / "img.00.jpg", odd)
    listed = [*sorted(map(str, photos.glob("img*.jpg"))), str(odd)]
    output = tmp_path / "s.csv"
    given = "".join(f"{name}{end}" for name in listed)
    done = score("-", model=model_folder, output=output, input=given)
    assert done.exit_code == 0, done.output
    assert len(names(output)) == len(listed)


@pytest.mark.parametrize(
    ("name", "line", "args"),
    [
        ("list.txt", "{name}", ()),
        ("list.csv", "{folder}/{name}\r", ()),
        ("below/list.txt", "photos/{name}", ()),
        ("list.TXT", "{name}\n", ("--images", "photos")),
    ],
    ids=["beside", "absolute-windows", "from-where-one-stands", "images"],
)
def test_a_list_of_paths_without_a_header_is_scored_line_by_line(
    model_folder, photos, tmp_path, monkeypatch, name, line, args
) -> None:
    folder = photos
    odd = folder / "a,b=c d.jpg"
    shutil.copy(folder / "img.00.jpg", odd)
    images = [*sorted(folder.glob("img*.jpg")), odd]
    beside = folder if name == "list.txt" else tmp_path
    (beside / name).parent.mkdir(exist_ok=True)
    lines = [line.format(folder=folder, name=image.name) for image in images]
    (beside / name).write_text("\n".join(lines) + "\n\n", newline="")
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "s.csv"
    done = score(beside / name, *args, model=model_folder, output=output)
    assert done.exit_code == 0, done.output
    assert [Path(path).name for path in names(output)] == [image.name for image in images]


@pytest.mark.parametrize("name", ["out", "out.txt", "out.xlsx"])
def test_an_output_of_no_format_is_refused_before_a_model_is_opened(photos, tmp_path, name) -> None:
    done = score(photos, model=tmp_path / "no-model", output=tmp_path / name)
    assert ".csv, .jsonl, .parquet" in str(done.exception)
