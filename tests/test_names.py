"""Who else owns a name of ours: a clash must be found here, not on a user's machine."""

import importlib.util
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["shards", "pipeline", "kernels", "lmcl"])
def test_our_package_is_the_one_that_is_imported(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert Path(str(spec.origin)).is_relative_to(REPO), f"{name} comes from {spec.origin}"


def test_nobody_else_is_installed_under_our_names() -> None:
    ours = {"shards", "pipeline", "kernels", "lmcl"}
    owners = {name: metadata.packages_distributions().get(name, []) for name in ours}
    assert {owner for found in owners.values() for owner in found} <= {"lmcl"}


def test_the_project_cannot_be_uploaded_by_accident() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    assert "Private :: Do Not Upload" in project["classifiers"]
