"""Signals end a scoring with what is done kept, and a message that says how to go on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lmcl.inference.interruption import InterruptedScoringError, stop_on_signals
from tests import warm

REPO = Path(__file__).resolve().parents[3]
# The signal comes when three rows are on disk.
CHILD = """
import os, sys
from lmcl.cli.main import main
from lmcl.inference.scores_file import RowJournal
append, rows = RowJournal.append, []
def count(self, row):
    append(self, row)
    rows.append(row)
    if len(rows) == 3:
        os.kill(os.getpid(), int(sys.argv[1]))
RowJournal.append = count
main(["score", *sys.argv[2:]])
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_is_done_stays_and_the_message_says_how_to_go_on(
    model_folder: Path, photos: Path, tmp_path: Path, name: str
) -> None:
    number, output = signal.Signals[name], tmp_path / "s.csv"
    line = [photos, "--model", model_folder, "--output", output, "--device", "cpu"]
    done = warm.run(
        [sys.executable, "-c", CHILD, int(number), *line, "--no-progress"],
        capture_output=True,
        timeout=600,
    )
    assert done.returncode == 128 + number
    assert f"error: stopped by {name}; what is done stays" in done.stderr
    assert "--resume goes on" in done.stderr
    assert "Traceback" not in done.stderr
    (journal,) = tmp_path.glob(".s.csv.rows-0000-*")
    assert len(journal.read_text().splitlines()) == 3
    assert not output.exists()
    assert not list(tmp_path.glob("*.lock"))


def _signal_twice() -> None:
    with stop_on_signals("go on"):
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGTERM)


def test_handlers_are_given_back_and_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with pytest.raises(InterruptedScoringError) as caught:
            _signal_twice()
        assert caught.value.exit_code == 128 + signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_scoring_of_one_output_says_who_holds_it(
    model_folder: Path, photos: Path, tmp_path: Path
) -> None:
    holder = (
        "import sys, time; from shards.lock import lock_path\n"
        "with lock_path(sys.argv[1], 'lmcl score'): print('held', flush=True); time.sleep(600)"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", holder, tmp_path / "s.csv"], cwd=REPO, stdout=subprocess.PIPE
    )
    try:
        assert first.stdout is not None
        first.stdout.readline()
        line = [photos, "--model", model_folder, "--output", tmp_path / "s.csv", "--resume"]
        done = warm.run(
            [sys.executable, "-m", "lmcl", "score", *line, "--device", "cpu"],
            capture_output=True,
            timeout=600,
        )
    finally:
        first.kill()
        first.communicate()
    assert done.returncode == 2
    assert str(first.pid) in done.stderr
    assert not (tmp_path / "s.csv").exists()
