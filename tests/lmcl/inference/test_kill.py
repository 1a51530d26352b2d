"""kill -9 at any moment: the same command again ends as an undisturbed one, and nothing is lost.

A child process kills itself at the n-th touch of the disk: every open, rename, link, removal and
row counts, and of every other row only half is written.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
CHILD = '''
import json, os, random, shutil, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from lmcl.cli.score import command
from lmcl.inference import batch_job, moves
from lmcl.inference.scores_file import RowJournal

root, model, mode, tries = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
work, photos = root / "work", root / "work" / "photos"
line = [str(photos), "--model", model, "--output", str(work / "s.csv"), "--resume"]
line += ["--device", "cpu", "--no-progress", "--threads", "1"]
gate = ["--below", sys.argv[5], "--move-to", str(work / "rejected")] if mode == "move" else []
touches, limit = 0, 0


def touch():
    global touches
    touches += 1
    if touches == limit:
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir"):
        name = arguments[0]
        if isinstance(name, (str, bytes)) and os.fsdecode(name).startswith(str(work)):
            touch()


def half_append(self, row, append=RowJournal.append):
    if touches + 1 == limit and limit % 2:
        self._file.write(b'{"path": "torn')
        self._file.flush()
    touch()
    append(self, row)


def around(function):
    def run(*arguments):
        touch()
        found = function(*arguments)
        touch()
        return found
    return run


def run(arguments, kill_at=0, count_to=None):
    """Exit status of the command in a process of its own; 9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        global limit
        limit = kill_at
        sys.stdout = open(os.devnull, "w")
        RowJournal.append = half_append
        moves.rename_no_replace = around(moves.rename_no_replace)
        sys.addaudithook(audit)
        try:
            command(arguments, standalone_mode=False)
            code = 0
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 70
        if count_to:
            os.write(count_to, str(touches).encode())
        os._exit(code)
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)


def fresh():
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(root / "start", work, symlinks=True)


def state():
    found = {}
    for path in sorted(work.rglob("*")):
        name = path.relative_to(work).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        # After a kill amid moves the sources say already where the images are now.
        elif path.is_file() and not name.endswith((".json", ".sources.jsonl")):
            found[name] = path.read_bytes().hex()
    return found


fresh()
assert run([str(photos / "a b"), *line[1:]]) == 0
shutil.rmtree(root / "start")
shutil.copytree(work, root / "start", symlinks=True)
fresh()
read, write = os.pipe()
assert run([*line, *gate], count_to=write) == 0
total = int(os.read(read, 20))
expected = state()
chosen = random.Random(tries).sample(range(1, total), tries)
failed = []
for at in sorted(chosen):
    fresh()
    killed = run([*line, *gate], kill_at=at)
    again = run([*line, *gate])
    if (killed, again) != (-9, 0) or state() != expected:
        now = state()
        differing = [n for n in {*now, *expected} if now.get(n) != expected.get(n)]
        failed.append((at, killed, again, differing))
print(json.dumps({"touches": total, "tries": len(chosen), "failed": failed}))
'''


@pytest.mark.parametrize(
    "tries", [3, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.parametrize("mode", ["score", "move"])
def test_a_job_killed_anywhere_ends_as_an_undisturbed_one(
    model_folder: Path, photos: Path, tmp_path: Path, mode: str, tries: int
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    (photos / "link.jpg").symlink_to("img.01.jpg")
    photos.rename(start / "photos")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path, model_folder, mode, str(tries), "1"],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1700,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{mode}: killed at {tries} of {found['touches']} touches of the disk")
    assert found["failed"] == [], done.stderr[-2000:]
