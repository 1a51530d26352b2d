import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
RUN = REPO / "tests" / "data" / "before_move" / "finished"


def compare(one: Path, other: Path) -> subprocess.CompletedProcess[str]:
    script = REPO / "scripts" / "compare_runs.py"
    return subprocess.run(
        [sys.executable, script, one, other], capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    return Path(shutil.copytree(RUN, tmp_path / "other"))


def test_times_may_differ_between_two_runs_of_the_same_bits(other: Path) -> None:
    lines = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    later = [{**line, "time_s": 9.0, "images_per_s": 1.0} for line in lines]
    (other / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in later))
    done = compare(RUN, other)
    assert done.returncode == 0, done.stdout
    assert "DIFFERS" not in done.stdout


@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "predictions/test.csv", "metrics.json", "log.jsonl"]
)
def test_one_digit_that_differs_is_named(other: Path, name: str) -> None:
    data = bytearray((other / name).read_bytes())
    place = data.rindex(b'val_srcc": 0.') + 13 if name == "log.jsonl" else None
    if name == "metrics.json":
        place = data.index(b'srcc": 0.') + 9
    if place is None:
        place = len(data) - 2
    data[place] = ord("1") if data[place] != ord("1") else ord("2")
    (other / name).write_bytes(data)
    done = compare(RUN, other)
    assert done.returncode == 1
    assert f"DIFFERS {name}" in done.stdout


def test_a_missing_file_differs(other: Path) -> None:
    (other / "predictions" / "test.csv").unlink()
    assert "DIFFERS predictions/test.csv" in compare(RUN, other).stdout
