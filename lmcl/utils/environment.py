"""Environment: machine, versions and git state that a figure depends on."""

import os
import platform
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "triton", "nvidia-dali-cuda130", "numpy", "torchvision", "pillow")


def describe_environment(*, device: str, world_size: int, decode: str) -> dict[str, Any]:
    """What a reader must know about where a run happened; becomes environment.json."""
    commit, is_dirty = git_state()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "platform": platform.platform(),
        "device": device,
        "cores": os.cpu_count(),
        "world_size": world_size,
        "decode": decode,
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
