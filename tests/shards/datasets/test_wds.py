import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shards.build.build import build
from shards.datasets.wds import open_wds
from shards.errors import ShardError
from shards.read import open_set


def write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.fixture
def foreign(tmp_path: Path, picture: Callable[..., bytes]) -> Path:
    for shard in range(2):
        members = []
        for k in range(3):
            key = f"./part/Sample {3 * shard + k}"
            described = {"labels": {"mos": 10.0 * shard + k}, "content": f"c{k}"}
            members += [
                (f"{key}.PNG", picture(3 * shard + k)),
                (f"{key}.json", json.dumps(described).encode()),
                (f"{key}.cls", f"{k}\n".encode()),
            ]
        write(tmp_path / f"set-{shard:03d}.tar", members)
    return tmp_path


def test_scores_and_groups_come_from_named_members(foreign: Path) -> None:
    dataset = open_wds(foreign, score_member="json:labels.mos", group_member="json:content")
    samples = list(dataset.samples())
    assert [sample.mos for sample in samples] == [0.0, 1.0, 2.0, 10.0, 11.0, 12.0]
    assert [sample.group for sample in samples] == ["c0", "c1", "c2"] * 2
    assert dataset.score is not None
    assert (dataset.score.low, dataset.score.high) == (0.0, 12.0)


def test_a_number_as_text_is_a_score(foreign: Path) -> None:
    assert [s.mos for s in open_wds(foreign, score_member="cls").samples()] == [0.0, 1.0, 2.0] * 2


def test_images_are_packed_from_inside_the_tars(
    foreign: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    build(open_wds(foreign, score_member="cls"), tmp_path / "out", workers=1)
    shard_set = open_set(tmp_path / "out")
    assert [data for _, data, _ in shard_set] == [picture(k) for k in range(6)]
    assert shard_set.samples.codec.tolist() == ["png"] * 6


@pytest.mark.parametrize("pattern", ["set-{000..001}.tar", "set-*.tar", "set-001.tar"])
def test_patterns_and_single_tars(foreign: Path, pattern: str) -> None:
    samples = list(open_wds(foreign / pattern, score_member=None).samples())
    assert len(samples) == (3 if pattern == "set-001.tar" else 6)
    assert all(sample.mos is None for sample in samples)


def test_a_missing_tar_of_a_range_is_named(foreign: Path) -> None:
    with pytest.raises(ShardError, match=r"set-002\.tar: there is no such file; give a folder"):
        open_wds(foreign / "set-{000..002}.tar")


def test_a_sample_without_the_score_says_what_there_is(foreign: Path) -> None:
    by_text = next(open_wds(foreign, score_member="txt").samples())
    assert "has no member .txt (there are cls, json, png)" in by_text.problem
    by_field = next(open_wds(foreign, score_member="json:mos").samples())
    assert "has no field 'mos' in .json" in by_field.problem


def test_names_cut_at_the_first_dot_are_not_merged_silently(
    tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    write(tmp_path / "a.tar", [("1600.AWGN.1.png", picture(1)), ("1600.AWGN.2.png", picture(2))])
    (sample,) = open_wds(tmp_path, score_member=None).samples()
    assert "1600 has 2 images among awgn.1.png, awgn.2.png" in sample.problem
