"""Shared fixtures, and the one place that touches the environment before torch and Triton load."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest

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
