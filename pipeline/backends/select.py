"""Choice of backend and number of decoding threads: what depends on the machine."""

import importlib.util
import os
from typing import Literal

from pipeline.backends.dali import dali_version
from pipeline.errors import PipelineError

BackendName = Literal["auto", "dali", "torch"]


def choose_backend(name: BackendName) -> tuple[Literal["dali", "torch"], str]:
    """The backend to use and why.

    Raises:
        PipelineError: If DALI was asked for by name and is not installed.
    """
    if name == "torch":
        return "torch", "asked for"
    installed = _has_dali()
    if name == "dali":
        if not installed:
            raise PipelineError(
                "backend 'dali' was asked for, but DALI is not installed; "
                '`pip install nvidia-dali-cuda130`, or choose backend = "torch"',
                exit_code=4,
            )
        return "dali", "asked for"
    if installed:
        return "dali", f"DALI {dali_version()} is installed"
    return "torch", "DALI is not installed"


def _has_dali() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None and dali_version() is not None
    except ModuleNotFoundError:
        return False


def default_threads() -> int:
    """This process's share of the cores it may use, at most 8."""
    cores = len(os.sched_getaffinity(0))
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(max(cores // max(processes, 1), 1), 8)
