"""The four rooms: who may import whom."""

import ast
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
ROOMS = ("shards", "pipeline", "kernels", "lmcl")
FORBIDDEN = {
    "shards": {"torch", "nvidia", "pipeline", "kernels", "lmcl"},
    "kernels": {"shards", "pipeline", "lmcl"},
    "pipeline": {"kernels", "lmcl"},
    "lmcl": {"tests", "benchmarks"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("room", ROOMS)
def test_data_flows_one_way(room: str) -> None:
    for path in (REPO / room).rglob("*.py"):
        assert not imported(path) & FORBIDDEN[room], path


def test_no_package_below_tests() -> None:
    assert not list((REPO / "tests").rglob("__init__.py"))


def test_importing_the_rooms_prints_nothing_and_loads_no_heavy_package() -> None:
    import subprocess

    code = "import shards, lmcl, lmcl.cli.main, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == done.stderr == ""
