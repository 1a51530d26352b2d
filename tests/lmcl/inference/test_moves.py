"""Images that are moved aside: nothing is written over or lost, and all of it can be undone."""

import csv
import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from lmcl.cli.score import command
from lmcl.errors import LmclError
from lmcl.inference import moves as moving
from lmcl.inference.moves import Move, carry_out, read_moves, rename_no_replace, undo_moves


def tree(folder: Path) -> dict[str, str]:
    """Every file and link below a folder, with its bytes or the name it leads to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = path.read_bytes().hex()
    return found


def move_all(folder: Path, target: Path) -> list[moving.MoveOutcome]:
    files = sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    moves = [Move(source=p, target=target / p.relative_to(folder), quality=0.1) for p in files]
    return list(carry_out(moves, target))


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    """Files, and every kind of link to them."""
    folder = tmp_path / "shots"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.jpg", "sub/b.jpg", "line\nbreak.jpg", os.fsdecode(b"caf\xe9,.jpg")):
        (folder / name).write_text(f"bytes of {name!r}")
    (tmp_path / "outside.jpg").write_text("outside")
    (folder / "sub" / "up.jpg").symlink_to("../a.jpg")
    (folder / "side.jpg").symlink_to("sub/b.jpg")
    (folder / "chain.jpg").symlink_to("sub/up.jpg")
    (folder / "sub" / "out.jpg").symlink_to("../../outside.jpg")
    (folder / "far.jpg").symlink_to("sub/out.jpg")
    (folder / "out.jpg").symlink_to("../outside.jpg")
    (folder / "absolute.jpg").symlink_to(tmp_path / "outside.jpg")
    return folder


def rename_by(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Let the file system be one that cannot rename so, or is another one."""
    if way in ("link", "copy"):
        monkeypatch.setattr(moving, "_rename", lambda *_: False)
    if way == "copy":
        real = moving._link

        def link(source: Path, target: Path) -> bool:
            return source.suffix == ".part" and real(source, target)

        monkeypatch.setattr(moving, "_link", link)


def put(path: Path, kind: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to("nowhere")
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("way", ["rename", "link", "copy"])
@pytest.mark.parametrize("kind", ["file", "folder", "dangling", "fifo"])
def test_nothing_is_written_over_here_or_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    source, target = tmp_path / "from" / "a.jpg", tmp_path / "to" / "a.jpg"
    put(source, "file")
    put(target, kind)
    rename_by(monkeypatch, way)
    with pytest.raises(FileExistsError):
        rename_no_replace(source, target)
    assert source.read_text() == "precious"
    (outcome,) = carry_out([Move(source=source, target=target, quality=0.0)], target.parent)
    assert outcome.move.target.name == "a-2.jpg"
    put(source, kind)
    (back,) = undo_moves(target.parent / "moves.csv")
    assert back.problem == "its old place is taken"
    assert outcome.move.target.read_text() == "precious"


def test_a_target_that_appears_at_the_last_moment_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = tmp_path / "a.jpg", tmp_path / "to" / "a.jpg"
    source.write_text("mine")
    write = moving._Recorder.write

    def race(self: moving._Recorder, move: Move) -> None:
        write(self, move)
        if move.target == target:
            target.write_text("theirs")

    monkeypatch.setattr(moving._Recorder, "write", race)
    (outcome,) = carry_out([Move(source=source, target=target, quality=0.0)], target.parent)
    assert (target.read_text(), outcome.move.target.read_text()) == ("theirs", "mine")
    # The first record never came true: what lies there is not ours to move.
    assert len(list(undo_moves(target.parent / "moves.csv"))) == 2
    assert (target.read_text(), source.read_text()) == ("theirs", "mine")


@pytest.mark.parametrize("text", ["nowhere.jpg", "link.jpg", "gone/x.jpg"])
def test_a_link_that_leads_nowhere_is_left_and_said(tmp_path: Path, text: str) -> None:
    link = tmp_path / "link.jpg"
    link.symlink_to(text)
    (outcome,) = carry_out(
        [Move(source=link, target=tmp_path / "to" / "link.jpg", quality=0.0)], tmp_path / "to"
    )
    assert outcome.problem
    assert os.readlink(link) == text


def test_nothing_leaves_the_folder_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "to").mkdir()
    (tmp_path / "to" / "sub").symlink_to(tmp_path / "elsewhere")
    source = tmp_path / "a.jpg"
    source.write_text("mine")
    target = tmp_path / "to" / "sub" / "a.jpg"
    (outcome,) = carry_out([Move(source=source, target=target, quality=0.0)], tmp_path / "to")
    assert "leads out of" in outcome.problem
    assert source.exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_record_of_somebody_else_moves_nothing_from_outside(tmp_path: Path) -> None:
    victim = tmp_path / "home" / "id_rsa"
    victim.parent.mkdir()
    victim.write_text("secret")
    record = tmp_path / "download" / "moves.csv"
    record.parent.mkdir()
    found = victim.stat()
    with record.open("w", newline="") as out:
        csv.writer(out, lineterminator="\n").writerows(
            [
                moving.MOVES_COLUMNS,
                [tmp_path / "taken", victim, "", found.st_size, found.st_mtime_ns, ""],
                [tmp_path / "taken", record.parent / ".." / "home" / "id_rsa", "", 6, 0, ""],
            ]
        )
    assert {o.problem for o in undo_moves(record)} <= {
        f"lies outside {record.parent}/",
        "is not the file that was moved there",
    }
    assert victim.read_text() == "secret"


@pytest.mark.parametrize(
    ("text", "exit_code"), [(None, 4), ("path,score\na,1\n", 3), ("", 3)], ids=["no", "other", "0"]
)
def test_what_is_no_record_is_a_sentence(tmp_path: Path, text: str | None, exit_code: int) -> None:
    file = tmp_path / "to" / "moves.csv"
    if text is not None:
        file.parent.mkdir()
        file.write_text(text)
        with pytest.raises(LmclError, match="is no record of moves"):
            list(carry_out([Move(source=tmp_path, target=file, quality=0.0)], file.parent))
        assert file.read_text() == text
    with pytest.raises(LmclError) as caught:
        list(undo_moves(file))
    assert caught.value.exit_code == exit_code
    assert file.exists() == (text is not None)


def test_a_torn_end_of_the_record_is_taken_off_before_it_goes_on(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_text(name)
    folder = tmp_path / "to"
    moves = [Move(source=tmp_path / n, target=folder / n, quality=0.0) for n in ("a.jpg", "b.jpg")]
    list(carry_out(moves[:1], folder))
    with (folder / "moves.csv").open("a") as out:
        out.write('"/half, of a line')
    list(carry_out(moves[1:], folder))
    assert [Path(r.old).name for r in read_moves(folder / "moves.csv")] == ["a.jpg", "b.jpg"]


def test_the_command_records_moves_prints_them_after_and_undoes_them(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    (photos / "link.jpg").symlink_to("img.00.jpg")
    (photos / "gone.jpg").symlink_to("nowhere.jpg")
    before, target = tree(photos), tmp_path / "rejected"
    line = [photos, "--model", model_folder, "--output", tmp_path / "s.csv", "--device", "cpu"]
    gate = ["--below", "1", "--move-to", target]
    done = CliRunner().invoke(command, [str(part) for part in [*line, *gate]])
    assert "moved 13 of 14 images below 1" in done.output
    assert (target / "link.jpg").read_bytes() == (target / "img.00.jpg").read_bytes()
    assert list(tree(photos)) == ["gone.jpg"]
    with (target / "moves.csv").open(newline="") as lines:
        records = list(csv.DictReader(lines))
    assert {r["old"]: Path(r["new"]).exists() for r in records} == {
        str(photos / name): True for name in before if name != "gone.jpg"
    }
    assert all(0 <= float(r["score"]) <= 100 for r in records)
    shutil.copy(target / "img.01.jpg", photos / "img.01.jpg")
    back = CliRunner().invoke(command, ["--undo", str(target / "moves.csv")])
    assert "put back 12 images" in back.output
    assert "its old place is taken" in back.output
    assert tree(photos) == before


@pytest.mark.parametrize("extra", [["photos"], ["--model", "m"], ["--move-to", "x"]])
def test_undo_stands_alone(extra: list[str]) -> None:
    assert CliRunner().invoke(command, ["--undo", "moves.csv", *extra]).exit_code == 2
