"""Pixels decoded at once, counted over processes that know nothing of each other."""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from PIL import Image

from shards.build.build import build
from shards.build.decode_budget import PixelBudget
from shards.build.plan import ShardSize
from shards.datasets.unlabelled import open_unlabelled
from shards.errors import ShardError
from shards.sample import DataSet

MEGA = 1_000_000
_context = multiprocessing.get_context("spawn")


def _hold(path: Path, budget: int, pixels: list[int], out: "multiprocessing.Queue[object]") -> None:
    mine = PixelBudget(path, pixels=budget)
    out.put("ready")
    for count in pixels:
        with mine.hold(count):
            began = time.monotonic()
            time.sleep(0.02)
            ended = time.monotonic()
        out.put((began, count))
        out.put((ended, -count))
    mine.close()
    out.put(None)


def _most_at_once(path: Path, budget: int, shares: list[list[int]]) -> int:
    """Runs one process per share; the most pixels that were held at any time."""
    out = _context.Queue()
    workers = [_context.Process(target=_hold, args=(path, budget, share, out)) for share in shares]
    for worker in workers:
        worker.start()
    events, ended = [], 0
    while ended < len(workers):
        found = out.get(timeout=60)
        ended += found is None
        if isinstance(found, tuple):
            events.append(found)
    for worker in workers:
        worker.join()
    assert len(events) == 2 * sum(map(len, shares))
    return max(itertools.accumulate(change for _, change in sorted(events)))


def test_processes_together_never_hold_more_than_the_budget(tmp_path: Path) -> None:
    shares = [[4 * MEGA, 1 * MEGA, 6 * MEGA] * 5, [3 * MEGA] * 15, [5 * MEGA, 2 * MEGA] * 8]
    most = _most_at_once(tmp_path / "lock", 8 * MEGA, shares)
    # More than any of them alone: they do go side by side where the budget allows it.
    assert 6 * MEGA < most <= 8 * MEGA


def test_what_is_larger_than_the_budget_goes_alone(tmp_path: Path) -> None:
    shares = [[50 * MEGA] * 5, [1 * MEGA] * 20, [1 * MEGA] * 20]
    assert _most_at_once(tmp_path / "lock", 8 * MEGA, shares) == 50 * MEGA


def _hold_for_ever(path: Path, out: "multiprocessing.Queue[str]") -> None:
    with PixelBudget(path, pixels=8 * MEGA).hold(8 * MEGA):
        out.put("held")
        time.sleep(600)


def test_a_killed_process_gives_back_what_it_held(tmp_path: Path) -> None:
    out = _context.Queue()
    worker = _context.Process(target=_hold_for_ever, args=(tmp_path / "lock", out))
    worker.start()
    assert out.get(timeout=60) == "held"
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with PixelBudget(tmp_path / "lock", pixels=8 * MEGA).hold(8 * MEGA):
        pass


def _flat_jpegs(folder: Path, count: int, side: int) -> DataSet:
    folder.mkdir()
    for k in range(count):
        Image.new("RGB", (side, side), (k, 90, 30)).save(folder / f"{k}.jpg", quality=50)
    return open_unlabelled(folder, name="big")


def _held_by_children() -> int:
    held = 0
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            held += child.memory_full_info().uss
    return held


def _most_memory(work: Callable[[], object]) -> int:
    """The most bytes that the children of this process held together while `work` ran."""
    most, done = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            # Processes are read one after another: one that hands over to the next in between would
            # be counted twice. It is not, twice in a row.
            most = max(most, min(_held_by_children(), _held_by_children()))
            time.sleep(0.004)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most


def test_workers_of_a_build_decode_huge_pictures_in_turns(tmp_path: Path) -> None:
    dataset = _flat_jpegs(tmp_path / "source", 9, 6000)
    size = ShardSize(samples=3)

    def pack(name: str, pixels: int) -> int:
        return _most_memory(
            lambda: build(dataset, tmp_path / name, workers=3, size=size, pixels_at_once=pixels)
        )

    pack("free", 200 * MEGA)
    # A picture of 36 megapixels is 144 MB decoded. How many of three workers' pictures meet without
    # a bound is chance (350 to 500 MB); with it there is never a second one.
    assert pack("bound", 40 * MEGA) < 2 * 144 * MEGA
    for path in sorted((tmp_path / "free").iterdir()):
        assert path.read_bytes() == (tmp_path / "bound" / path.name).read_bytes()


def test_a_picture_larger_than_the_budget_is_packed(tmp_path: Path) -> None:
    dataset = _flat_jpegs(tmp_path / "source", 2, 1500)
    manifest = build(dataset, tmp_path / "out", workers=1, pixels_at_once=MEGA)
    assert manifest.num_samples == 2


def test_a_build_leaves_no_lock_file_behind_and_its_name_cannot_be_guessed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    names = []
    for number in range(2):
        build(
            _flat_jpegs(tmp_path / f"source{number}", 2, 20),
            tmp_path / "out" / str(number),
            workers=1,
            progress=lambda images, total: names.extend(os.listdir(tmp_path / "tmp")),
        )
    assert os.listdir(tmp_path / "tmp") == []
    assert len(set(names)) == 2
    assert all(re.fullmatch("lmcl-decode-[0-9a-f]{32}", name) for name in names)


def test_a_lock_file_that_cannot_be_opened_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    budget = PixelBudget(tmp_path / "missing" / "lock", pixels=MEGA)
    with pytest.raises(ShardError, match="set TMPDIR"), budget.hold(1):
        pass
