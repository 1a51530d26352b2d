"""The wheel in an environment of its own, used from a folder that is no clone."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
OFFLINE = ("No matching distribution", "Connection", "Temporary failure", "Could not fetch")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", REPO, "-w", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and any(sign in done.stderr for sign in OFFLINE):
        pytest.skip(f"the build backend is not at hand: {done.stderr[-300:]}")
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its commands; other packages are those of the environment that runs the tests."""
    place = tmp_path_factory.mktemp("env")
    venv.create(place, symlinks=True)
    python = place / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, wheel], check=True)
    (site,) = place.glob("lib/python*/site-packages")
    # A line of a .pth is a path; the .pth files there, which name the clone, are not read.
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place / "bin"


def call(installed: Path, folder: Path, *words: object) -> str:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [installed / str(words[0]), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}: {done.stderr[-2000:]}"
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_the_configurations(wheel: Path) -> None:
    rooms = ("lmcl", "shards", "pipeline", "kernels", "configs")
    asked = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *rooms]
    done = subprocess.run(asked, cwd=REPO, capture_output=True, text=True, check=True)
    listed = done.stdout.split()
    wanted = {f"lmcl/{name}" if name.startswith("configs/") else name for name in listed}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert wanted == held


def test_the_installed_package_is_the_one_that_runs(installed: Path, tmp_path: Path) -> None:
    code = "import lmcl, shards; print(lmcl.__file__, shards.__file__)"
    assert str(REPO) not in call(installed, tmp_path, "python", "-c", code)


def test_build_train_report_and_score_from_another_folder(installed: Path, tmp_path: Path) -> None:
    def run(*words: object) -> str:
        return call(installed, tmp_path, *words)

    assert "paper/livec" in run("lmcl", "show-config", "--list")
    run("lmcl-shard", "build", "demo", "--contents", 6, "--output", "data/smoke", "--no-progress")
    run("lmcl-shard", "split", "data/smoke", "--no-progress")
    changes = ("--set", "train.epochs=1", "--output", "runs/x", "--no-progress")
    launch = ("-m", "accelerate.commands.launch", "--num_processes", 1, "-m", "lmcl")
    run("python", *launch, "train", "--config", "smoke", *changes)
    run("lmcl", "report", "runs/x", "--output", "page")
    assert "<style" in (tmp_path / "page" / "report.html").read_text()
    images = next((tmp_path / "data" / "smoke" / "source").rglob("*.png")).parent
    run("lmcl", "score", images, "--model", "runs/x", "--output", "s.csv", "--no-progress")
    assert (tmp_path / "s.csv").read_text().count("\n") > 6


def test_the_demo_runs_from_another_folder(installed: Path, tmp_path: Path) -> None:
    tiny = ["train.epochs=1", "crops.random=1", "crops.evaluation=1"]
    changes = [word for change in tiny for word in ("--set", change)]
    said = call(installed, tmp_path, "lmcl", "demo", "--no-progress", *changes)
    assert "SRCC" in said
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
