"""A process for tests of `kill -9`: a command, killed at chosen touches of the disk, and run again.

    python tests/killed.py KIND ROOT TRIES [MORE...]

`ROOT/start` is what there is before the command. Every open, rename, link, removal and new folder
below `ROOT/work` is a touch, and every row of scores, of which every other is only half written.
Said at the end, as JSON: touches of an undisturbed command, and what went wrong after which kill.
"""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lmcl.cli import report, score, train
from lmcl.inference import moves
from lmcl.inference.scores_file import RowJournal
from lmcl.models.pretrained import load_model, save_model

EVENTS = ("open", "os.rename", "os.remove", "os.link", "os.symlink", "os.mkdir", "os.rmdir")
KIND, ROOT, TRIES, MORE = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
WORK = ROOT / "work"
touches, limit = 0, 0


def touch() -> None:
    global touches
    touches += 1
    if touches == limit:
        os.kill(os.getpid(), signal.SIGKILL)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    name = arguments[0] if event in EVENTS else None
    is_name = isinstance(name, str | bytes)
    if is_name and os.path.abspath(os.fsdecode(name)).startswith(str(WORK)):
        touch()


def half_append(self: Any, row: Any, append: Any = RowJournal.append) -> None:
    if touches + 1 == limit and limit % 2:
        self._file.write(b'{"path": "torn')
        self._file.flush()
    touch()
    append(self, row)


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any) -> Any:
        touch()
        found = function(*arguments)
        touch()
        return found

    return run


def scoring(*paths: Path, gate: tuple[str, ...] = ()) -> None:
    options = ["--model", MORE[0], "--output", str(WORK / "s.csv"), "--resume", "--device", "cpu"]
    line = [*map(str, paths), *options, "--no-progress", "--threads", "1", *gate]
    score.command(line, standalone_mode=False)


def training() -> None:
    line = ["--config", "run.toml", "--output", "half", "--resume", "auto", "--no-progress"]
    train.command(line, standalone_mode=False)


def saving() -> None:
    released = load_model(ROOT / "newer")
    save_model(WORK / "model", released.model, released.card)


PHOTOS = WORK / "photos"
COMMANDS: dict[str, Callable[[], object]] = {
    "score": lambda: scoring(PHOTOS),
    "move": lambda: scoring(PHOTOS, gate=("--below", MORE[1], "--move-to", str(WORK / "rejected"))),
    "report": lambda: report.command([str(WORK / "run")], standalone_mode=False),
    "train": training,
    "model": saving,
}


def run(command: Callable[[], object], *, kill_at: int = 0, count_to: int = 0) -> int:
    """Exit status of the command in a process of its own; -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        global limit
        limit = kill_at
        os.chdir(WORK)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
        RowJournal.append = half_append  # type: ignore[method-assign]
        moves.rename_no_replace = around(moves.rename_no_replace)
        sys.addaudithook(audit)
        code = 0
        try:
            command()
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 70
        if count_to:
            os.write(count_to, str(touches).encode())
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def fresh() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    shutil.copytree(ROOT / "start", WORK, symlinks=True)


def is_compared(name: str) -> bool:
    """Whether a file is to be the same in the end: not times, nor where images lie now."""
    if KIND in ("score", "move"):
        return not name.endswith((".json", ".sources.jsonl"))
    if KIND == "train":
        return name.startswith(("half/model/", "half/predictions/", "half/metrics.json", "set/"))
    return True


def state() -> dict[str, str]:
    found = {}
    for path in sorted(WORK.rglob("*")):
        name = path.relative_to(WORK).as_posix()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file() and is_compared(name):
            found[name] = path.read_bytes().hex()
        elif "/." in f"/{name}":
            found[name] = "left behind"
    return found


def is_old_or_new(now: dict[str, str], old: dict[str, str], new: dict[str, str]) -> bool:
    """Whether a killed report or model shows whole files; of a model, all of one of the two."""
    names = [name for name in old if "/." not in f"/{name}" and old[name] != new.get(name)]
    states = [all(now.get(name) == one.get(name) for name in names) for one in (old, new)]
    if KIND == "report":
        return all(now.get(name) in (old[name], new[name]) for name in names)
    return KIND != "model" or any(states)


def main() -> None:
    torch.set_num_threads(1)
    command = COMMANDS[KIND]
    fresh()
    if KIND in ("score", "move"):
        assert run(lambda: scoring(PHOTOS / "a b")) == 0
        shutil.rmtree(ROOT / "start")
        shutil.copytree(WORK, ROOT / "start", symlinks=True)
        fresh()
    before = state()
    read, write = os.pipe()
    assert run(command, count_to=write) == 0
    total = int(os.read(read, 20))
    expected = state()
    chosen = sorted(random.Random(TRIES).sample(range(1, total), TRIES))
    failed = []
    for at in chosen:
        fresh()
        killed = run(command, kill_at=at)
        is_whole = is_old_or_new(state(), before, expected)
        again = run(command)
        if (killed, is_whole, again) != (-9, True, 0) or state() != expected:
            now = state()
            differing = [n for n in {*now, *expected} if now.get(n) != expected.get(n)]
            failed.append((at, killed, is_whole, again, differing))
    print(json.dumps({"touches": total, "tries": len(chosen), "failed": failed}))


main()
