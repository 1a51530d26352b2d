"""`kernels` is ours and somebody else's: who gets the wrong one is told, and the way out works."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]

FOREIGN = """
def get_kernel(name):
    return f"a kernel of the hub: {name}"
"""
BROKEN = "import a_package_that_is_not_installed_here\n"
LMCL = "import lmcl.utils.kernels as k; print(k.plan_loss.__module__)"
THEIRS = "from kernels import get_kernel; print(get_kernel('x'))"


def python(code: str, *path: Path, executable: str = sys.executable) -> tuple[str, str]:
    """What a fresh interpreter prints, and the last line of what it complains about."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, path)))
    done = subprocess.run(
        [executable, "-P", "-c", code], capture_output=True, text=True, env=environment, cwd="/"
    )
    return done.stdout.strip(), done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize("content", [FOREIGN, BROKEN], ids=["works", "lacks-its-own-needs"])
def test_lmcl_says_that_it_found_anothers_kernels_and_the_way_out_works(
    content: str, tmp_path: Path
) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(content)
    said, error = python(LMCL, tmp_path, REPO)
    assert said == ""
    assert "lmcl needs its own package `kernels`" in error
    assert f"in {tmp_path / 'kernels'};" in error
    (first,) = [word[11:-1] for word in error.split() if word.startswith("PYTHONPATH=")]
    assert python(LMCL, Path(first), tmp_path) == ("kernels.precision", "")


def test_one_installed_over_the_other_is_told_to_install_the_other_again(tmp_path: Path) -> None:
    python_only = shutil.ignore_patterns("__pycache__", "*.js", "*.css", "*.npz")
    for name in ("lmcl", "kernels"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=python_only)
    ours = tmp_path / "kernels" / "__init__.py"
    assert python(LMCL, tmp_path) == ("kernels.precision", "")
    ours.write_text(FOREIGN)
    said, error = python(LMCL, tmp_path)
    assert said == ""
    assert f"in {tmp_path / 'kernels'}; `pip uninstall kernels` and install lmcl again" in error
    shutil.copy(REPO / "kernels" / "__init__.py", ours)
    (ours.parent / "layer").mkdir()
    (ours.parent / "layer" / "__init__.py").write_text(BROKEN)
    assert python(LMCL, tmp_path) == ("kernels.precision", "")
    said, error = python(THEIRS, tmp_path)
    assert said == ""
    assert "use an environment without lmcl" in error


def test_whoever_wants_anothers_kernels_is_told_that_these_are_lmcls(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FOREIGN)
    said, error = python(THEIRS, REPO, tmp_path)
    assert said == ""
    assert "get_kernel is of Hugging Face's distribution `kernels`" in error
    assert f"found lmcl's package of the same name in {REPO}" in error
    import kernels

    assert not hasattr(kernels, "anything_else")


def test_lmcl_imports_kernels_in_one_place() -> None:
    def names(path: Path) -> set[str]:
        tree = ast.walk(ast.parse(path.read_text()))
        found = [n.module or "" if isinstance(n, ast.ImportFrom) else n for n in tree]
        return {
            name.split(".")[0]
            for n in found
            for name in (
                [n] if isinstance(n, str)
                else [a.name for a in n.names] if isinstance(n, ast.Import) else []
            )
        }  # fmt: skip

    importers = {path for path in (REPO / "lmcl").rglob("*.py") if "kernels" in names(path)}
    assert importers == {REPO / "lmcl" / "utils" / "kernels.py"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_real_distribution_in_a_fresh_environment_in_both_orders(tmp_path: Path) -> None:
    venv.create(tmp_path / "env", symlinks=True)
    executable = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "install", "--quiet"]
    done = subprocess.run([*pip, "--no-deps", "kernels"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index is not at hand: {done.stderr[-300:]}")
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    shared = Path(importlib.util.find_spec("torch").origin).parents[1]
    said, error = python(LMCL, site, REPO, shared, executable=str(executable))
    assert said == ""
    assert "lmcl needs its own package `kernels`" in error
    said, error = python(THEIRS, REPO, site, shared, executable=str(executable))
    assert said == ""
    assert "get_kernel is of Hugging Face's distribution `kernels`" in error
