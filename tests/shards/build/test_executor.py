import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.errors import ShardError
from shards.sample import DataSet
from tests.processes import is_running

FIVE = ShardSize(samples=5)


@pytest.fixture
def ray_cluster() -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_ray_gives_the_bytes_of_one_process(
    tmp_path: Path, table: Callable[..., DataSet], ray_cluster: None
) -> None:
    dataset = table()
    build(dataset, tmp_path / "local", workers=1, size=FIVE)
    build(dataset, tmp_path / "ray", workers=2, engine="ray", size=FIVE)
    for path in sorted((tmp_path / "local").iterdir()):
        other = (tmp_path / "ray" / path.name).read_bytes()
        assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(other).digest()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_error_in_a_ray_task_keeps_its_name_and_exit_code(
    tmp_path: Path, table: Callable[..., DataSet], ray_cluster: None
) -> None:
    dataset = table()
    files = [sample.file for sample in dataset.samples()]
    files[7].write_bytes(b"no image")
    with pytest.raises(ShardError, match=r"Photo 7\.v1\.jpg") as caught:
        build(dataset, tmp_path / "ray", workers=2, engine="ray", size=FIVE)
    assert caught.value.exit_code == 3


def test_an_error_in_a_worker_keeps_its_name_and_exit_code(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    files = [sample.file for sample in dataset.samples()]
    files[7].write_bytes(b"no image")
    with pytest.raises(ShardError, match=r"Photo 7\.v1\.jpg") as caught:
        build(dataset, tmp_path / "out", workers=2, size=FIVE)
    assert caught.value.exit_code == 3


def test_progress_adds_up_to_the_number_of_images(
    tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    seen: list[int] = []
    dataset = table()
    build(dataset, tmp_path / "out", workers=2, size=FIVE, progress=lambda n, total: seen.append(n))
    assert sum(seen) == 12


BUILD = """
import sys
from pathlib import Path
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.datasets.table import open_table

if __name__ == "__main__":
    source = open_table(Path(sys.argv[1]) / "labels.csv", images=Path(sys.argv[1]) / "photos")
    build(source, Path(sys.argv[1]) / "set", workers=2, size=ShardSize(samples=20))
"""


def _workers(parent: int) -> list[int]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            status = (place / "stat").read_text().rpartition(")")[2].split()
            command = (place / "cmdline").read_bytes()
            if int(status[1]) == parent and b"spawn_main" in command:
                found.append(int(place.name))
    return found


def test_workers_of_a_killed_build_are_gone_and_the_same_command_goes_on(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "photos").mkdir()
    for k in range(200):
        (tmp_path / "photos" / f"{k}.png").write_bytes(picture(k, height=300, width=400))
    lines = ["path,score", *(f"{k}.png,{k}" for k in range(200))]
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    (tmp_path / "run.py").write_text(BUILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    with subprocess.Popen(command, env=environment) as parent:
        end = time.monotonic() + 60
        while not list((tmp_path / "set").glob("*.tar*")) and time.monotonic() < end:
            time.sleep(0.02)
        workers = _workers(parent.pid)
        parent.kill()
    assert workers
    end = time.monotonic() + 60
    while any(map(is_running, workers)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
    names = sorted(path.name for path in (tmp_path / "set").rglob("*"))
    time.sleep(0.3)
    assert sorted(path.name for path in (tmp_path / "set").rglob("*")) == names
    subprocess.run(command, env=environment, check=True)
    assert (tmp_path / "set" / "manifest.json").is_file()
