import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shards.build.build import build
from shards.build.plan import ShardSize
from shards.errors import ShardError
from shards.sample import DataSet

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
