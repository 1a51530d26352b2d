"""Ranks end when their launcher is killed -9: of a scoring, and of a training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import is_running

REPO = Path(__file__).resolve().parents[2]
BEFORE = REPO / "tests" / "data" / "before_move"
LAUNCH = [
    *[sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"],
    *["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"],
]


def descendants(pid: int) -> set[int]:
    """Every living process that a process has started, directly or not."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(place.name)] = int(fields[1])
    found, added = {pid}, {pid}
    while added:
        added = {child for child, parent in parents.items() if parent in found} - found
        found |= added
    return found - {pid}


def until(is_so: Callable[[], bool], seconds: float = 180) -> None:
    give_up = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A set, a model and a configuration."""
    for name in ("set", "finished"):
        shutil.copytree(BEFORE / name, tmp_path / name)
    text = (BEFORE / "half" / "config.toml").read_text()
    (tmp_path / "run.toml").write_text(text)
    return tmp_path


def photos(folder: Path, count: int) -> Path:
    """Many names of one picture, so that a scoring takes a while."""
    folder.mkdir()
    Image.linear_gradient("L").convert("RGB").save(folder / "0.png")
    for k in range(1, count):
        os.link(folder / "0.png", folder / f"{k}.png")
    return folder


def rows(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in folder.glob(".s.csv.rows-*"))


def steps(folder: Path) -> int:
    log = folder / "run" / "log.jsonl"
    return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["score", "train"])
def test_ranks_end_with_a_launcher_that_was_killed(work: Path, kind: str) -> None:
    command = {
        "score": [
            *["-m", "lmcl", "score", str(photos(work / "photos", 6000)), "--threads", "1"],
            *["--model", "finished/model", "--output", "s.csv", "--no-progress"],
        ],
        "train": [
            *[str(REPO / "train.py"), "--config", "run.toml", "--output", "run", "--no-progress"],
            *["--set", "train.epochs=500"],
        ],
    }[kind]
    count = rows if kind == "score" else steps
    port = {"score": "29681", "train": "29682"}[kind]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    said = (work / "said").open("wb")
    launcher = subprocess.Popen(
        [*LAUNCH, "--main_process_port", port, *command],
        cwd=work,
        env=environment,
        stdout=said,
        stderr=said,
        start_new_session=True,
    )
    try:
        until(lambda: count(work) >= 4 or launcher.poll() is not None)
        assert launcher.poll() is None, (work / "said").read_text()[-3000:]
        below = descendants(launcher.pid)
        assert len(below) >= 3, "a launcher of torch's and two ranks"
    finally:
        launcher.send_signal(signal.SIGKILL)
        launcher.wait()
        said.close()
    until(lambda: not any(map(is_running, below)), seconds=120)
    done = count(work)
    assert done >= 4
    time.sleep(0.5)
    assert count(work) == done
    if kind == "train":
        events = [json.loads(line) for line in (work / "run/log.jsonl").read_text().splitlines()]
        assert any((work / "run" / "checkpoints").glob("*.pt")), events[-1]
