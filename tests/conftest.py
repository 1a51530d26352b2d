"""Shared fixtures, and the one place that touches the environment before torch and Triton load."""

import os
from pathlib import Path

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
