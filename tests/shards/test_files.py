"""Files and folders are written whole: the old one or the new one, readable by whom it should."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

import shards.files as files
from shards.errors import ShardError
from shards.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    check_own,
    is_temporary,
    remove_stale_temporaries,
    temporary_beside,
    this_process,
)


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_a_file_gets_the_mode_the_umask_allows_whoever_wrote_its_bytes(
    tmp_path: Path, umask: int
) -> None:
    old = os.umask(umask)
    try:
        with atomic_write(tmp_path / "bytes") as out:
            out.write(b"\x00\xff")
        with atomic_write(tmp_path / "text", "w") as text:
            text.write("ä\r\n")
        with atomic_path(tmp_path / "private") as temporary:
            temporary.chmod(0o600)
            temporary.write_bytes(b"of a library")
    finally:
        os.umask(old)
    assert [_mode(tmp_path / name) for name in ("bytes", "text", "private")] == [0o666 & ~umask] * 3
    assert (tmp_path / "text").read_bytes() == "ä\r\n".encode()
    assert sorted(os.listdir(tmp_path)) == ["bytes", "private", "text"]


def _write_half(out: BinaryIO, error: BaseException) -> None:
    out.write(b"half of the n")
    raise error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt(), ValueError()]
)
def test_an_error_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, error: BaseException
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(target) as out:
        _write_half(out, error)
    assert os.listdir(tmp_path) == ["file"]
    assert target.read_bytes() == b"old"


def test_a_link_is_replaced_and_what_it_pointed_at_stays(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"theirs")
    (tmp_path / "link").symlink_to("victim")
    with atomic_write(tmp_path / "link") as out:
        out.write(b"mine")
    assert (tmp_path / "victim").read_bytes() == b"theirs"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("name", ["a", "n" * 255, "ä" * 120, ".hidden", "line\nbreak"])
def test_every_name_a_file_may_have_can_be_written(tmp_path: Path, name: str) -> None:
    assert is_temporary(temporary_beside(tmp_path / name).name)
    with atomic_write(tmp_path / name) as out:
        out.write(b"x")
    assert os.listdir(tmp_path) == [name]


def test_two_writers_of_one_file_do_not_share_a_temporary(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "file") as first, atomic_write(tmp_path / "file") as second:
        first.write(b"first")
        second.write(b"second")
    assert (tmp_path / "file").read_bytes() == b"first"


def _temporary_of(code: str, folder: Path, *, wait: bool) -> "subprocess.Popen[bytes]":
    script = (
        "import sys\nfrom pathlib import Path\nfrom shards.files import temporary_beside\n"
        f"Path(temporary_beside(Path({str(folder / 'file')!r}))).write_bytes(b'half')\n"
        "print(flush=True)\n" + code
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.readline()
    if wait:
        child.communicate()
    return child


def test_temporaries_of_dead_processes_are_removed_and_those_of_living_ones_never(
    tmp_path: Path,
) -> None:
    _temporary_of("", tmp_path, wait=True)
    living = _temporary_of("sys.stdin.read()", tmp_path, wait=False)
    others = [
        ".file.0123456789abcdef-1-1-0.part",  # of another machine
        ".file.part",
        "file.tmp",
        "notes.txt",
    ]
    me = temporary_beside(tmp_path / "file").name
    host = me.split(".")[2].split("-")[0]
    reused = f".file.{host}-{os.getpid()}-{this_process().start - 1}-0.part"
    for name in [*others, me, reused]:
        (tmp_path / name).write_bytes(b"")
    try:
        assert remove_stale_temporaries(tmp_path) == 2  # of the dead child, of the reused number
        left = {path.name for path in tmp_path.iterdir()}
        assert left > {*others, me}
        assert len(left - {*others, me}) == 1
    finally:
        living.communicate()
    assert remove_stale_temporaries(tmp_path) == 1
    assert remove_stale_temporaries(tmp_path / "no such folder") == 0


def test_folders_and_links_with_the_name_of_a_stale_temporary_stay(tmp_path: Path) -> None:
    host = temporary_beside(tmp_path / "file").name.split(".")[2].split("-")[0]
    folder = tmp_path / f".file.{host}-{os.getpid()}-1-0.part"
    folder.mkdir()
    link = tmp_path / f".file.{host}-{os.getpid()}-1-1.part"
    link.symlink_to("anything")
    assert remove_stale_temporaries(tmp_path) == 0
    assert folder.is_dir()
    assert link.is_symlink()


def _fill(folder: Path, text: str) -> None:
    (folder / "model").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "card").write_text(text)


def _fill_half(folder: Path) -> None:
    _fill(folder, "half")
    raise OSError(errno.ENOSPC, "full")


def _no_exchange(first: Path, second: Path) -> bool:
    return False


@pytest.fixture(params=["exchange", "two renames"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", _no_exchange)


@pytest.mark.usefixtures("_way")
def test_a_folder_is_replaced_and_what_others_put_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("old", "new"):
        with atomic_folder(target) as folder:
            _fill(folder, text)
        (target / "notes.txt").write_text("mine")
        (target / "sub" / "notes.txt").write_text("mine")
    with atomic_folder(target) as folder:
        _fill(folder, "newest")
    assert os.listdir(tmp_path) == ["model"]
    found = {str(p.relative_to(target)): p.read_text() for p in target.rglob("*") if p.is_file()}
    assert found == {
        "model": "newest",
        "notes.txt": "mine",
        "sub/card": "newest",
        "sub/notes.txt": "mine",
    }


@pytest.mark.usefixtures("_way")
def test_a_link_to_a_folder_is_replaced_and_the_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "model").write_text("theirs")
    (tmp_path / "model").symlink_to("theirs")
    with atomic_folder(tmp_path / "model") as folder:
        _fill(folder, "mine")
    assert (tmp_path / "theirs" / "model").read_text() == "theirs"
    assert (tmp_path / "model" / "model").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["model", "theirs"]


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: None])
def test_an_error_leaves_the_old_folder(tmp_path: Path, make: Callable[[Path], None]) -> None:
    target = tmp_path / "model"
    make(target)
    before = os.listdir(tmp_path)
    with pytest.raises(OSError, match="full"), atomic_folder(target) as folder:
        _fill_half(folder)
    assert os.listdir(tmp_path) == before


_SAVE_FOR_EVER = """
import sys
from pathlib import Path
from shards.files import atomic_folder
number = 0
while True:
    with atomic_folder(Path(sys.argv[1])) as folder:
        for name in ("config", "weights"):
            (folder / name).write_text(str(number) * 20_000)
    print(number, flush=True)
    number = (number + 1) % 10
"""


def test_a_kill_at_any_moment_of_replacing_a_folder_leaves_one_of_the_two(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for moment in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", _SAVE_FOR_EVER, str(target)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.05 + 0.013 * moment)
        child.kill()
        child.communicate()
        held = {p.name: p.read_text() for p in target.iterdir() if p.name != files._NEW}
        assert set(held) - {"mine"} == {"config", "weights"}
        assert held["config"] == held["weights"]
        assert len(set(held["config"])) == 1


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("point", range(1, 13))
@pytest.mark.parametrize("is_first", [False, True], ids=["over an old one", "the first"])
def test_a_folder_after_a_kill_is_what_it_would_have_been(
    tmp_path: Path, is_first: bool, point: int
) -> None:
    """The child ends at the n-th touch of the disk; what others put into the folder is kept."""
    target = tmp_path / "model"
    if not is_first:
        with atomic_folder(target) as folder:
            _fill(folder, "old")
        (target / "mine.txt").write_text("mine")
    pid = os.fork()
    if pid == 0:
        touches = 0

        def touch(event: str, arguments: object) -> None:
            nonlocal touches
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"):
                touches += 1
                if touches == point:
                    os._exit(9)

        sys.addaudithook(touch)
        with atomic_folder(target) as folder:
            _fill(folder, "new")
        os._exit(0)
    os.waitpid(pid, 0)
    with atomic_folder(target) as folder:
        _fill(folder, "newest")
    assert os.listdir(tmp_path) == ["model"]
    held = {path.name: path.read_text() for path in target.iterdir() if path.is_file()}
    assert held == {"model": "newest"} | ({} if is_first else {"mine.txt": "mine"})


@pytest.mark.parametrize("there", ["nothing", "ours", "theirs", "empty", "a folder", "a FIFO"])
def test_only_what_carries_the_mark_may_be_replaced(tmp_path: Path, there: str) -> None:
    path = tmp_path / "sheet.png"
    make: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "ours": lambda: path.write_bytes(b"head lmcl mark " + bytes(100_000)),
        "theirs": lambda: path.write_bytes(bytes(100_000) + b"lmcl mark"),
        "empty": lambda: path.write_bytes(b""),
        "a folder": path.mkdir,
        "a FIFO": lambda: os.mkfifo(path),
    }
    make[there]()
    if there in ("nothing", "ours"):
        check_own(path, b"lmcl mark")
        return
    with pytest.raises(ShardError, match="is there already") as caught:
        check_own(path, b"lmcl mark")
    assert caught.value.exit_code == 2
