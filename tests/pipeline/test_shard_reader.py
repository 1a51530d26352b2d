"""Shards that are missing, cut off or replaced, before and while they are in use."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import PipelineError
from pipeline.shard_reader import ShardReader
from shards.read import ShardSet, open_set

Pack = Callable[..., ShardSet]


@pytest.fixture
def packed(pack: Pack, mixed_images: list[tuple[str, bytes]]) -> ShardSet:
    return pack(mixed_images[:12], samples_per_shard=4)


def _tar(shard_set: ShardSet, index: int) -> Path:
    return Path(shard_set.root) / shard_set.manifest.shards[index].name


def test_bytes_are_those_that_were_packed(
    packed: ShardSet, mixed_images: list[tuple[str, bytes]]
) -> None:
    with ShardReader(packed) as reader:
        read = reader.read(np.array([11, 0, 5, 5]))
    assert [data.tobytes() for data in read] == [mixed_images[id][1] for id in (11, 0, 5, 5)]


def test_several_threads_read_what_one_reads(packed: ShardSet) -> None:
    ids = np.arange(12)
    with ShardReader(packed) as reader:
        expected = [data.tobytes() for data in reader.read(ids)]
        wrong: list[int] = []

        def read_often(seed: int) -> None:
            for id in np.random.default_rng(seed).integers(0, 12, 200).tolist():
                if reader.read(np.array([id]))[0].tobytes() != expected[id]:
                    wrong.append(id)

        threads = [threading.Thread(target=read_often, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_shard_cut_off_before_use_is_named(packed: ShardSet) -> None:
    os.truncate(_tar(packed, 1), _tar(packed, 1).stat().st_size - 1000)
    with (
        ShardReader(packed) as reader,
        pytest.raises(PipelineError, match=r"toy-000001.tar") as caught,
    ):
        reader.read(np.array([4]))
    assert caught.value.exit_code == 3


def test_a_shard_cut_off_while_in_use_is_an_error_and_no_crash(packed: ShardSet) -> None:
    with ShardReader(packed) as reader:
        reader.read(np.array([4]))
        os.truncate(_tar(packed, 1), int(packed.samples.offset[7]) + 10)
        with pytest.raises(
            PipelineError, match=r"toy: sample 7 \(image 7.webp\).*10 of its \d+ bytes"
        ):
            reader.read(np.array([7]))


def test_a_vanished_shard_is_missing_input(packed: ShardSet) -> None:
    _tar(packed, 2).unlink()
    with (
        ShardReader(packed) as reader,
        pytest.raises(PipelineError, match=r"toy-000002.tar") as caught,
    ):
        reader.read(np.array([8]))
    assert caught.value.exit_code == 4


def test_a_shard_that_vanishes_in_use_serves_its_epoch_and_is_missed_in_the_next(
    packed: ShardSet,
) -> None:
    with ShardReader(packed) as reader:
        expected = reader.read(np.array([8]))[0].tobytes()
        _tar(packed, 2).unlink()
        assert reader.read(np.array([8]))[0].tobytes() == expected
        reader.recheck()
        with pytest.raises(PipelineError, match=r"toy-000002\.tar"):
            reader.read(np.array([8]))


def test_a_shard_of_other_layout_is_recognised_by_its_headers(packed: ShardSet) -> None:
    first, second = _tar(packed, 0), _tar(packed, 1)
    data = second.read_bytes()[: first.stat().st_size]
    first.write_bytes(data.ljust(first.stat().st_size, b"\0"))
    with ShardReader(packed) as reader, pytest.raises(PipelineError, match="replaced by another"):
        reader.read(np.arange(4))


def test_a_shard_replaced_in_use_is_refused_at_the_next_epoch(packed: ShardSet) -> None:
    path = _tar(packed, 0)
    with ShardReader(packed) as reader:
        reader.read(np.array([0]))
        data = bytearray(path.read_bytes())
        data[int(packed.samples.offset[0]) + 40] ^= 1
        path.with_suffix(".new").write_bytes(data)
        path.with_suffix(".new").replace(path)
        with pytest.raises(PipelineError, match="replaced while in use") as caught:
            reader.recheck()
    assert caught.value.exit_code == 3


def test_a_shard_rewritten_with_the_same_bytes_goes_on(packed: ShardSet) -> None:
    path = _tar(packed, 0)
    with ShardReader(packed) as reader:
        expected = reader.read(np.array([0]))[0].tobytes()
        path.write_bytes(path.read_bytes())
        reader.recheck()
        assert reader.read(np.array([0]))[0].tobytes() == expected


def test_damaged_bytes_are_found_by_their_checksum(packed: ShardSet) -> None:
    path = _tar(packed, 1)
    data = bytearray(path.read_bytes())
    data[int(packed.samples.offset[6]) + int(packed.samples.size[6]) // 2] ^= 1
    path.write_bytes(data)
    with ShardReader(packed) as reader:
        assert np.flatnonzero(~reader.intact(np.arange(12))).tolist() == [6]


def test_few_files_stay_open(
    pack: Pack, mixed_images: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.shard_reader._MAX_OPEN", 3)
    shard_set = pack(mixed_images, samples_per_shard=2)
    before = len(os.listdir("/proc/self/fd"))
    with ShardReader(shard_set) as reader:
        reader.read(np.arange(37))
        assert len(os.listdir("/proc/self/fd")) - before <= 3
    assert len(os.listdir("/proc/self/fd")) <= before


def test_remote_shards_are_fetched_ahead_and_read_through_the_cache(
    packed: ShardSet, tmp_path: Path, mixed_images: list[tuple[str, bytes]]
) -> None:
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(packed.root, "/pipeline-set", recursive=True)
    remote = open_set("memory://pipeline-set", cache=tmp_path / "cache")
    with ShardReader(remote) as reader:
        reader.prefetch(np.arange(12))
        read = reader.read(np.arange(12))
        assert [data.tobytes() for data in read] == [data for _, data in mixed_images[:12]]
        for copy in (tmp_path / "cache").rglob("*.tar"):
            os.utime(copy)
        reader.recheck()
        assert reader.read(np.array([3]))[0].tobytes() == mixed_images[3][1]
