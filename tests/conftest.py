"""Shared fixtures, and the one place that touches the environment before torch and Triton load."""

import dataclasses
import importlib.util
import json
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import warm

# Toy tensors are fastest on one thread, and two test workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Kernels run interpreted where there is no GPU; Triton reads this once, when a kernel is defined.
if not os.path.exists("/dev/nvidia0"):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real photographs and label files beside the project; tests that want them skip without."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the folder of real data (../shared/data) is not beside the project")
    return folder


@pytest.fixture(scope="session")
def hostile_sets() -> list[Any]:
    """Ways to spoil a packed set (`tests/hostile_sets.py`), for every test that opens one."""
    path = Path(__file__).with_name("hostile_sets.py")
    spec = importlib.util.spec_from_file_location("hostile_sets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_sets"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    cases: list[Any] = module.cases()
    return cases


@dataclasses.dataclass
class SafetyTally:
    """What hostile inputs did; summed over a session into one line at its end."""

    inputs: int = 0
    tracebacks: int = 0
    hangs: int = 0
    outside_bytes: int = 0
    """Of files that are not the command's, added, changed or gone."""


@pytest.fixture
def tally(record_property: Any) -> Iterator[SafetyTally]:
    """Counts of one test, for `pytest_terminal_summary`; a worker of xdist hands them over."""
    found = SafetyTally()
    yield found
    record_property("safety", [*dataclasses.astuple(found), _peak_bytes()])


def _peak_bytes() -> int:
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(who).ru_maxrss for who in whose) * 1024


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for stat in terminalreporter.stats.values() for report in stat]
    found = [
        value
        for report in reports
        if getattr(report, "when", "") == "teardown"
        for name, value in report.user_properties
        if name == "safety"
    ]
    if not found:
        return
    columns = list(zip(*found, strict=True))
    inputs, tracebacks, hangs, outside = map(sum, columns[:4])
    terminalreporter.write_line(
        f"hostile inputs: {inputs:,} tried, {tracebacks} tracebacks, {hangs} hangs, {outside:,} "
        f"bytes outside, peak memory of a process {max(columns[4]) / 1e9:.2f} GB"
    )


@pytest.fixture
def killed() -> Callable[..., dict[str, Any]]:
    """Run `tests/killed.py`: a command killed at random touches of the disk, and run again."""

    def run(kind: str, root: Path, tries: int, *more: object) -> dict[str, Any]:
        done = warm.run(
            [sys.executable, Path(__file__).with_name("killed.py"), kind, root, tries, *more],
            capture_output=True,
            timeout=1700,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}: killed at {tries} of {found['touches']} touches of the disk")
        print(done.stderr[-2000:])
        return found

    return run
