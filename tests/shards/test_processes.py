import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.processes import command_ending_with_parent
from tests.processes import is_running

# A pool whose workers write a file every 20 ms, for ever.
POOL = """
import concurrent.futures, multiprocessing, os, sys, time
from pathlib import Path
from shards.processes import end_with_parent

def write(folder, number):
    Path(folder, f"pid-{os.getpid()}").touch()
    for turn in range(10**9):
        Path(folder, f"{number}-{turn % 50}").write_text(str(time.time()))
        time.sleep(0.02)

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[2])
    with concurrent.futures.ProcessPoolExecutor(
        2, mp_context=context, initializer=end_with_parent
    ) as pool:
        list(pool.map(write, [sys.argv[1]] * 2, range(2)))
"""
WORKER = """
import os, sys, time
from pathlib import Path
Path(sys.argv[1], f"pid-{os.getpid()}").touch()
for turn in range(10**9):
    Path(sys.argv[1], f"{os.getpid()}-{turn % 50}").write_text(str(time.time()))
    time.sleep(0.02)
"""
COMMAND = """
import subprocess, sys
from shards.processes import command_ending_with_parent
children = [subprocess.Popen(command_ending_with_parent([sys.executable, *sys.argv[1:]]))]
children[0].wait()
"""


def until(condition: Callable[[], bool], *, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def pids(folder: Path) -> list[int]:
    return [int(path.name.partition("-")[2]) for path in folder.glob("pid-*")]


def state(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("how", ["spawn", "forkserver", "command"])
def test_workers_of_a_killed_parent_are_gone_and_write_no_more(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "pool.py").write_text(POOL)
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "command.py").write_text(COMMAND)
    command = (
        ["command.py", "worker.py", str(folder)]
        if how == "command"
        else ["pool.py", str(folder), how]
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, *command], cwd=tmp_path, env=environment) as parent:
        try:
            until(lambda: len(pids(folder)) == (1 if how == "command" else 2))
            workers = pids(folder)
            assert all(map(is_running, workers))
        finally:
            parent.send_signal(signal.SIGKILL)
    until(lambda: not any(map(is_running, workers)), seconds=60)
    before = state(folder)
    time.sleep(0.3)
    assert state(folder) == before


def test_a_wrapped_command_keeps_its_status_and_its_streams() -> None:
    script = "import sys; print(sys.stdin.read(), sys.argv[1:]); sys.exit(7)"
    done = subprocess.run(
        command_ending_with_parent([sys.executable, "-c", script, "a b", "--c"]),
        input="in",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (7, "in ['a b', '--c']\n")


def test_a_command_that_is_not_there_is_a_sentence() -> None:
    done = subprocess.run(
        command_ending_with_parent(["lmcl-no-such-program"]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 127
    assert (
        done.stderr
        == "error: 'lmcl-no-such-program' cannot be started: No such file or directory\n"
    )


def test_a_command_whose_parent_has_died_meanwhile_does_not_start() -> None:
    """The helper is given the id of a parent that is not its own."""
    command = command_ending_with_parent([sys.executable, "-c", "print('ran')"])
    command[4] = str(os.getppid())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
