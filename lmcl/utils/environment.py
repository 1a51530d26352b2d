"""Environment: machine, versions and git state that a figure depends on."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.processes import usable_cores

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "numpy", "torchvision", "pillow")


def describe_device(device: "torch.device") -> str:
    """Device for people: `cuda:0 NVIDIA H200`, `cpu AMD EPYC (2 cores)`."""
    # Benchmarks of packing need no torch, and count the memory of this process.
    import torch

    if device.type == "cuda" and torch.cuda.is_available():
        return f"{device} {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu {processor_name()} ({usable_cores()} cores)"
    return str(device)


def engines_line(device: "torch.device", *parts: str) -> str:
    """The line every command begins with: `device cuda:0 ..., decode dali-gpu-2.4, loss triton`.

    Args:
        device: Of the networks.
        parts: What decodes (`DecodeChoice.line`) and what computes the loss (`LossPlan`), with the
            reason where one fell back.
    """
    return ", ".join((f"device {describe_device(device)}", *parts))


def describe_environment(
    device: "torch.device",
    *,
    world_size: int,
    decode: str,
    decode_reason: str,
    precision: str,
    loss: str,
) -> dict[str, Any]:
    """What a reader must know about where a run happened; becomes environment.json."""
    import torch

    commit, is_dirty = git_state()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "device": str(device),
        "device_name": describe_device(device),
        "cores": os.cpu_count(),
        "world_size": world_size,
        "threads": torch.get_num_threads(),
        "decode": decode,
        "decode_reason": decode_reason,
        "precision": precision,
        "loss": loss,
        "git_commit": commit,
        "git_dirty": is_dirty,
        "versions": installed_versions(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of the packages that figures depend on; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """Name of the processor, as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> tuple[str, bool]:
    """Commit of the checkout the package lies in, empty outside one, and whether files differ."""
    commit = _git("rev-parse", "HEAD")
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _git(*arguments: str) -> str:
    place = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=place
        )
    except FileNotFoundError:
        return ""  # a machine without git: the commit is simply not known
    return done.stdout.strip() if done.returncode == 0 else ""
