import hashlib
import logging
import math
from pathlib import Path

import pytest
import torch

from lmcl.errors import LmclError
from lmcl.training.checkpoint import (
    Position,
    State,
    best_name,
    digest_path,
    drop_checkpoints_after,
    list_bests,
    list_checkpoints,
    read_checkpoint,
    read_newest,
    save_tensors,
    write_checkpoint,
)


def state(epoch: int, step: int = 0) -> State:
    weights = {"w": torch.full((3,), float(epoch))}
    return State(
        position=Position(epoch=epoch, step=step),
        config="[data]\n",
        student=weights,
        teacher=weights,
        optimizer={"state": {}, "param_groups": [{"lr": 0.1}]},
        scaler={},
        saliency_ids=torch.arange(2),
        saliency_boxes=torch.zeros(2, 4, dtype=torch.int32),
        best_srcc=math.nan,
        best_epoch=-1,
        seconds=1.5,
    )


def test_a_state_reads_back_as_it_was(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state(2, 7), keep_last=2)
    found = read_checkpoint(path)
    assert found.position == Position(epoch=2, step=7)
    assert torch.equal(found.student["w"], torch.full((3,), 2.0))
    assert math.isnan(found.best_srcc)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for epoch in range(5):
        write_checkpoint(tmp_path, state(epoch), keep_last=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "epoch-0004-step-000000.pt",
        "epoch-0003-step-000000.pt",
    ]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["truncate", "flip", "no-digest"])
def test_a_damaged_newest_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    write_checkpoint(tmp_path, state(1), keep_last=2)
    newest = write_checkpoint(tmp_path, state(2), keep_last=2)
    data = bytearray(newest.read_bytes())
    if damage == "truncate":
        newest.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        newest.write_bytes(data)
    else:
        digest_path(newest).unlink()
    with caplog.at_level(logging.WARNING):
        found = read_newest(tmp_path)
    assert found is not None
    assert found.position.epoch == 1
    assert newest.name in caplog.text


@pytest.mark.parametrize("junk", [b"junk" * 40, b"", b"PK\x03\x04" + b"junk" * 40])
def test_a_foreign_file_with_its_digest_is_passed_over_by_auto_and_refused_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, junk: bytes
) -> None:
    write_checkpoint(tmp_path, state(1), keep_last=2)
    newest = write_checkpoint(tmp_path, state(2), keep_last=2)
    newest.write_bytes(junk)
    digest_path(newest).write_text(hashlib.sha256(junk).hexdigest() + "\n")
    with pytest.raises(LmclError, match="no file of tensors") as error:
        read_checkpoint(newest)
    assert error.value.exit_code == 5
    with caplog.at_level(logging.WARNING):
        found = read_newest(tmp_path)
    assert found is not None
    assert found.position.epoch == 1
    assert newest.name in caplog.text


def test_nothing_but_damage_is_an_error_and_nothing_at_all_is_a_new_run(tmp_path: Path) -> None:
    assert read_newest(tmp_path) is None
    write_checkpoint(tmp_path, state(1), keep_last=2).write_bytes(b"")
    with pytest.raises(LmclError, match="none of its 1 checkpoints") as error:
        read_newest(tmp_path)
    assert error.value.exit_code == 5


def test_half_a_file_under_its_temporary_name_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / ".epoch-0009-step-000000.pt.123.tmp").write_bytes(b"half")
    assert list_checkpoints(tmp_path) == []


def test_a_checkpoint_runs_no_code_when_it_is_read(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state(1), keep_last=2)
    torch.save({"position": [0, 0], "x": Path("/")}, path)
    digest_path(path).unlink()
    with pytest.raises(LmclError):
        read_checkpoint(path)


def test_a_run_that_goes_on_from_an_older_checkpoint_keeps_what_it_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for epoch in (3, 4, 5):
        write_checkpoint(tmp_path, state(epoch), keep_last=3)
    with caplog.at_level(logging.WARNING):
        drop_checkpoints_after(tmp_path, Position(epoch=3, step=0))
    assert caplog.text.count("removed") == 2
    write_checkpoint(tmp_path, state(3, 7), keep_last=1)
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position == Position(epoch=3, step=7)


def test_bests_of_epochs_that_are_trained_again_are_dropped_with_their_digests(
    tmp_path: Path,
) -> None:
    for epoch in (1, 2, 4):
        save_tensors(tmp_path / best_name(epoch), {"model": {}})
    drop_checkpoints_after(tmp_path, Position(epoch=2, step=0))
    assert [path.name for path in list_bests(tmp_path)] == ["best-0001.pt"]
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".epoch-0009-step-000000.pt.123.tmp").write_bytes(b"half")
    write_checkpoint(tmp_path, state(1), keep_last=2)
    assert not list(tmp_path.glob(".*"))


def test_a_digest_without_its_file_is_no_checkpoint(tmp_path: Path) -> None:
    """Where a machine that dies between the two renames leaves a folder."""
    write_checkpoint(tmp_path, state(1), keep_last=2)
    write_checkpoint(tmp_path, state(2), keep_last=2).unlink()
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position.epoch == 1


def test_a_full_disk_is_one_sentence_and_leaves_the_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, state(1), keep_last=2)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LmclError, match=r"No space left.*--resume auto"):
        write_checkpoint(tmp_path, state(2), keep_last=2)
    monkeypatch.undo()
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position.epoch == 1
    assert not list(tmp_path.glob(".*"))
