"""One job at a time: who holds a path is said, and a lock nobody holds any more stops nobody."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from shards.files import this_process
from shards.lock import Holder, LockedError, lock_file_of, lock_folder, lock_path

_HOLD = """
import sys
sys.argv = ["/somewhere/lmcl", "train", "s3://user:secret@host/set"]
from shards.lock import lock_path
with lock_path({path!r}, "training"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def _other(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    child = subprocess.Popen(
        [sys.executable, "-c", _HOLD.format(path=str(path))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    try:
        yield child
    finally:
        child.communicate()


@pytest.fixture(params=["folder", "file", "file to be made"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What can be locked."""
    target = tmp_path / "runs.v1"
    if request.param == "folder":
        target.mkdir()
    elif request.param == "file":
        target.write_bytes(b"")
    return target


def test_a_second_job_is_told_who_holds_the_path_and_exits_with_2(path: Path) -> None:
    with _other(path) as child:
        with pytest.raises(LockedError) as caught, lock_path(path, "training"):
            pass
        message = str(caught.value)
        assert caught.value.exit_code == 2
        assert re.search(rf"in use by `lmcl train` \(process {child.pid}, training since", message)
        assert "secret" not in message
        assert "secret" not in lock_file_of(path).read_text()
    with lock_path(path, "training"):
        pass
    assert not lock_file_of(path).exists()


def test_a_lock_of_a_killed_process_is_taken_over(path: Path) -> None:
    with _other(path) as child:
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert lock_file_of(path).exists()
        with lock_path(path, "training") as holder:
            assert holder.process == this_process()
    assert not lock_file_of(path).exists()


def test_a_lock_of_this_process_is_not_taken_twice(path: Path) -> None:
    with lock_path(path, "first"):
        with pytest.raises(LockedError, match="this very process"), lock_path(path, "second"):
            pass
        assert lock_file_of(path).exists()


def _leave(path: Path, holder: Holder) -> None:
    lock_file_of(path).write_bytes(msgspec.json.encode(holder))


def _holder(**changes: object) -> Holder:
    process = replace(this_process(), **changes)  # type: ignore[arg-type]
    return Holder(process=process, command="lmcl score", purpose="scoring", since="2026-01-01")


@pytest.mark.parametrize(
    "changes",
    [
        {"start": 1},  # the number is another process's now
        {"pid": 2**22 + 1},  # above the largest number there can be
        {"boot": "another-boot/pid:[1]", "machine": "this"},  # the machine was started again
        {"boot": "same-kernel"},  # another container on this machine, that is gone
    ],
    ids=["number in use again", "gone", "restarted", "other container"],
)
def test_stale_locks_are_recognised(
    path: Path, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = this_process()
    if changes.get("machine") == "this":
        changes["machine"] = "this"
        monkeypatch.setattr("shards.files._identity", lambda pid: replace(here, machine="this"))
    if changes.get("boot") == "same-kernel":
        changes = {"boot": here.boot.partition("/")[0] + "/pid:[7]"}
    _leave(path, _holder(**changes))
    with lock_path(path, "scoring") as holder:
        assert holder.process.pid == os.getpid()
    assert not lock_file_of(path).exists()


def test_a_lock_of_another_machine_is_left_and_the_sentence_names_machine_and_file(
    path: Path,
) -> None:
    _leave(path, _holder(host="node\x1b[2J7", machine="other", boot="other/x"))
    with pytest.raises(LockedError) as caught, lock_path(path, "scoring"):
        pass
    message = str(caught.value)
    assert r"on node\x1b[2J7" in message
    assert f"remove {lock_file_of(path)}" in message
    lock_file_of(path).unlink()  # the way out that the sentence names
    with lock_path(path, "scoring"):
        pass


def test_a_living_process_of_another_container_keeps_its_lock(path: Path) -> None:
    with _other(path):
        file = lock_file_of(path)
        held = msgspec.json.decode(file.read_bytes(), type=Holder)
        boot = held.process.boot.partition("/")[0] + "/pid:[7]"
        elsewhere = replace(held, process=replace(held.process, boot=boot))
        # In place: the file itself stays locked by the child.
        with file.open("r+b") as out:
            out.write(msgspec.json.encode(elsewhere).ljust(file.stat().st_size))
        with pytest.raises(LockedError, match="if nothing runs there"), lock_path(path, "x"):
            pass


@pytest.mark.parametrize(
    "contents", [b"", b"{}", b"\x00" * 9000, b"[" * 4000, b'{"process": null}']
)
def test_a_lock_file_that_says_nothing_is_not_believed_and_not_removed(
    tmp_path: Path, contents: bytes
) -> None:
    lock_file_of(tmp_path).write_bytes(contents)
    with pytest.raises(LockedError, match=r"remove that file"), lock_path(tmp_path, "x"):
        pass
    assert lock_file_of(tmp_path).read_bytes() == contents


@pytest.mark.parametrize(
    ("field", "value"), [("pid", 2**80), ("pid", -1), ("pid", 0), ("start", -1), ("start", 2**80)]
)
def test_a_lock_of_an_impossible_process_is_not_believed(
    tmp_path: Path, field: str, value: int
) -> None:
    told = msgspec.json.decode(msgspec.json.encode(_holder(start=0)))
    told["process"][field] = value
    lock_file_of(tmp_path).write_text(json.dumps(told))
    with pytest.raises(LockedError, match="remove that file"), lock_path(tmp_path, "x"):
        pass


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_lock_file_is_neither_followed_nor_waited_for(tmp_path: Path, kind: str) -> None:
    (tmp_path / "set").mkdir()
    file = lock_file_of(tmp_path / "set")
    (tmp_path / "victim").write_bytes(b"theirs")
    {
        "fifo": lambda: os.mkfifo(file),
        "link": lambda: file.symlink_to(tmp_path / "victim"),
        "folder": file.mkdir,
    }[kind]()
    with pytest.raises(LockedError), lock_folder(tmp_path / "set", "x"):
        pass
    assert os.path.lexists(file)
    assert (tmp_path / "victim").read_bytes() == b"theirs"


def test_of_many_that_find_a_stale_lock_exactly_one_gets_it(tmp_path: Path) -> None:
    _leave(tmp_path, _holder(start=1))
    script = (
        "import sys\nfrom shards.errors import ShardError\n"
        "from shards.lock import lock_folder\n"
        "print('ready', flush=True)\nsys.stdin.readline()\n"
        f"try:\n    with lock_folder({str(tmp_path)!r}, 'x'):\n"
        "        print('got', flush=True); sys.stdin.readline()\n"
        "except ShardError as error:\n    print('held', error.exit_code, flush=True)\n"
    )
    children = [
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(6)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write(b"\n")
        child.stdin.flush()
    answers = [child.stdout.readline() for child in children if child.stdout]
    for child in children:
        child.communicate(b"\n")
    assert sorted(answers) == [b"got\n"] + [b"held 2\n"] * 5


def test_threads_of_one_process_take_turns(tmp_path: Path) -> None:
    inside, most = [], []

    def work() -> None:
        for _ in range(20):
            with contextlib.suppress(LockedError), lock_folder(tmp_path, "x"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert os.listdir(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    from shards.errors import ShardError

    with (
        pytest.raises(
            ShardError,
            match="file is a file, and no folder can be made there; choose another output",
        ),
        lock_folder(tmp_path / "file" / "run", "x"),
    ):
        pass
