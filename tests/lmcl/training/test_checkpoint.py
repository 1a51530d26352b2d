import hashlib
import logging
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lmcl.errors import LmclError
from lmcl.training.checkpoint import (
    SET_ASIDE,
    Position,
    State,
    best_name,
    digest_path,
    list_bests,
    list_checkpoints,
    read_checkpoint,
    read_newest,
    save_best,
    save_tensors,
    set_checkpoints_aside_after,
    write_checkpoint,
)

REPO = Path(__file__).resolve().parents[3]


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


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "no-digest", "no-text", "empty-digest", "other-digest"]
)
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
    elif damage == "no-digest":
        digest_path(newest).unlink()
    else:
        damaged = {"no-text": b"\xff\xfe\x00\xd8", "empty-digest": b"", "other-digest": b"0" * 64}
        digest_path(newest).write_bytes(damaged[damage])
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
        set_checkpoints_aside_after(tmp_path, Position(epoch=3, step=0))
    assert caplog.text.count("set aside") == 2
    assert len(list((tmp_path / SET_ASIDE).iterdir())) == 4
    write_checkpoint(tmp_path, state(3, 7), keep_last=1)
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position == Position(epoch=3, step=7)


def test_bests_of_epochs_that_are_trained_again_are_set_aside_with_their_digests(
    tmp_path: Path,
) -> None:
    for epoch in (1, 2, 4):
        save_tensors(tmp_path / best_name(epoch), {"model": {}})
    set_checkpoints_aside_after(tmp_path, Position(epoch=2, step=0))
    assert [path.name for path in list_bests(tmp_path)] == ["best-0001.pt"]
    aside = sorted(path.name for path in (tmp_path / SET_ASIDE).iterdir())
    assert aside == [
        f"best-000{epoch}.pt.0{ending}" for epoch in (2, 4) for ending in ("", ".sha256")
    ]


@pytest.mark.parametrize("keep_last", [1, 2, 3])
def test_the_best_weights_that_any_checkpoint_names_are_there_whenever_a_run_is_killed(
    tmp_path: Path, keep_last: int
) -> None:
    best = -1
    for epoch, is_better in enumerate((True, True, False, True, True, True, False, True)):
        if is_better:
            best = epoch
            save_best(tmp_path / best_name(best), {}, keep_last=keep_last)
        # Here the run may be killed: the checkpoints are still those of the epochs before.
        named = [read_checkpoint(path).best_epoch for path in list_checkpoints(tmp_path)]
        assert all((tmp_path / best_name(one)).exists() for one in named)
        position = replace(state(epoch + 1), best_epoch=best)
        write_checkpoint(tmp_path, position, keep_last=keep_last)
    assert len(list_bests(tmp_path)) == keep_last + 1


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shards.files import temporary_beside\n"
        "temporary_beside(Path(sys.argv[1])).write_bytes(b'half')"
    )
    target = tmp_path / "epoch-0009-step-000000.pt"
    subprocess.run([sys.executable, "-c", code, target], check=True, cwd=REPO)
    assert len(list(tmp_path.glob(".*"))) == 1
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


@pytest.mark.parametrize("spelling", ["{}", "{}\n", "{}  name.pt\n", "\ufeff{}\r\n", "{upper}\n"])
def test_a_digest_may_be_spelled_as_other_tools_do(tmp_path: Path, spelling: str) -> None:
    path = write_checkpoint(tmp_path, state(3), keep_last=2)
    digest = digest_path(path).read_text().strip()
    digest_path(path).write_text(spelling.format(digest, upper=digest.upper()))
    assert read_checkpoint(path).position.epoch == 3


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("position", [-1, 0]),
        ("position", [1.5, 0]),
        ("position", [True, 0]),
        ("position", [0]),
        ("position", "ab"),
        ("best_epoch", 7),
        ("best_epoch", -2),
        ("best_srcc", "high"),
        ("student", [1]),
        ("config", 3),
        ("saliency_ids", torch.zeros(3, dtype=torch.int64)),
        ("saliency_boxes", torch.zeros(2, 3)),
        ("collapsed_steps", -4),
        ("unknown", 1),
    ],
)
def test_a_field_that_no_run_writes_is_passed_over_and_nothing_is_deleted(
    tmp_path: Path, field: str, value: object
) -> None:
    write_checkpoint(tmp_path, state(0), keep_last=2)
    newest = tmp_path / "epoch-0001-step-000000.pt"
    save_tensors(newest, {**vars(state(1)), "position": [1, 0], field: value})
    data = newest.read_bytes()
    found = read_newest(tmp_path)
    assert found is not None
    assert found.position == Position(epoch=0, step=0)
    set_checkpoints_aside_after(tmp_path, found.position)
    assert (tmp_path / SET_ASIDE / f"{newest.name}.0").read_bytes() == data


def test_a_second_file_set_aside_does_not_replace_the_first(tmp_path: Path) -> None:
    for seconds in (1.0, 2.0):
        write_checkpoint(tmp_path, replace(state(4), seconds=seconds), keep_last=2)
        set_checkpoints_aside_after(tmp_path, Position(epoch=0, step=0))
    assert len([path for path in (tmp_path / SET_ASIDE).iterdir() if path.suffix != ".sha256"]) == 2


def test_checkpoints_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path, state(1), keep_last=2)
    finally:
        os.umask(before)
    for file in (path, digest_path(path)):
        assert file.stat().st_mode & 0o777 == 0o640
