"""Packages that are not installed: which one a module is of, and the command that brings it."""

import importlib.metadata
import re
import shlex

_OF_MODULE = {"PIL": "pillow", "nvidia": "nvidia-dali-cuda130", "tomli_w": "tomli-w"}
"""Packages that are called otherwise than their module."""
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_THIS = "lmcl"


def missing_package(error: ModuleNotFoundError) -> str | None:
    """The sentence about a package that lmcl wants and that is not here; None for any other module.

    `pip install --no-deps lmcl` leaves an environment for scoring by an exported file
    (docs/scoring.md); every command but that one needs more of what lmcl lists.
    """
    module = (error.name or "").partition(".")[0]
    package = _OF_MODULE.get(module, module)
    wanted = _requirements()
    if package not in wanted:
        return None
    absent = [name for name in wanted if name == package or _is_absent(name, wanted[name])]
    command = " ".join(shlex.quote(wanted[name].partition(";")[0].strip()) for name in absent)
    return (
        f"this needs the package {package}, which is not installed; `pip install {command}` brings "
        "all that is missing"
    )


def _requirements() -> dict[str, str]:
    """What lmcl lists, by the names of packages; extras after what everybody gets."""
    try:
        listed = importlib.metadata.requires(_THIS) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found: dict[str, str] = {}
    for line in listed:
        name = _NAME.match(line)
        if name:
            found.setdefault(name[0], line)
    return found


def _is_absent(name: str, requirement: str) -> bool:
    if "extra ==" in requirement:
        return False
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False
