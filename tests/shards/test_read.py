import pickle
import shutil
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.read import ShardSet, open_set


def test_iteration_gives_every_sample_once_in_order(packed: ShardSet) -> None:
    assert [id for id, _, _ in packed] == list(range(12))
    assert all(packed.read_bytes(id) == data for id, data, _ in packed)


def test_a_missing_folder_is_exit_code_4(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="there is no such folder") as caught:
        open_set(tmp_path / "nothing")
    assert caught.value.exit_code == 4


def test_a_folder_that_holds_no_set_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="lmcl-shard build NAME SOURCE") as caught:
        open_set(tmp_path)
    assert caught.value.exit_code == 4


def test_shards_without_a_manifest_are_an_unfinished_build(
    packed: ShardSet, tmp_path: Path
) -> None:
    (tmp_path / "packed/manifest.json").unlink()
    with pytest.raises(ShardError, match=r"unfinished build .* goes on where it stopped"):
        open_set(tmp_path / "packed")


def test_a_shard_of_another_length_is_not_read(packed: ShardSet, tmp_path: Path) -> None:
    tar = tmp_path / "packed/mine-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(ShardError, match=r"mine-000001\.tar: .* the manifest says"):
        packed.read_bytes(7)


def test_a_missing_shard_is_exit_code_4(packed: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "packed/mine-000001.tar").unlink()
    with pytest.raises(ShardError, match="the manifest names this shard") as caught:
        packed.shard_path(1)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("id", [-1, 12])
def test_an_unknown_id_is_an_index_error(packed: ShardSet, id: int) -> None:
    with pytest.raises(IndexError):
        packed.read_bytes(id)


def test_a_file_url_is_a_folder(packed: ShardSet, tmp_path: Path) -> None:
    again = open_set(f"file://{tmp_path / 'packed'}")
    assert again.read_bytes(3) == packed.read_bytes(3)


def test_a_moved_set_is_the_same_set(packed: ShardSet, tmp_path: Path) -> None:
    before = [data for _, data, _ in packed]
    packed.close()
    shutil.move(tmp_path / "packed", tmp_path / "elsewhere")
    assert [data for _, data, _ in open_set(tmp_path / "elsewhere")] == before


def test_open_files_stay_behind_when_their_holder_goes_to_another_process(packed: ShardSet) -> None:
    packed.read_bytes(0)
    again = pickle.loads(pickle.dumps(packed._files))
    assert again.read(0, 0, 4, packed.shard_path) == b"mine"
    again.close()
