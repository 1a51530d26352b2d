"""The whole state of a run in one file: written atomically, read without unpickling code."""

import hashlib
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmcl.errors import LmclError
from lmcl.utils.files import write_atomic

logger = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d{4})-step-(\d{6})\.pt$")


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: the next step to take."""

    epoch: int
    """Epoch of the next step, from 0."""
    step: int
    """Next step within the epoch, from 0."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What a run needs to go on as if it had never stopped.

    Randomness is a function of the position, so no generator state is kept
    (docs/decisions/0003-randomness.md); order, boxes and schedule follow from it too.
    """

    position: Position
    config: str
    """The effective configuration as TOML."""
    student: dict[str, Any]
    teacher: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any]
    saliency_ids: torch.Tensor
    """[n] int64; the table in force in the position's epoch."""
    saliency_boxes: torch.Tensor
    """[n, 4] int32."""
    best_srcc: float
    """Highest validation SRCC so far; NaN before the first."""
    best_epoch: int
    """Its epoch; -1 before the first."""
    seconds: float
    """Time spent training so far."""
    data: str = ""
    """Hash of the split: the set's names and the ids of each part."""
    collapsed_steps: int = 0
    """Steps in a row, up to here, whose crops of one image looked alike."""


def write_checkpoint(folder: Path, state: State, *, keep_last: int) -> Path:
    """Write `state` under its position's name and drop all but the newest `keep_last`."""
    at = state.position
    path = folder / f"epoch-{at.epoch:04d}-step-{at.step:06d}.pt"
    save_tensors(path, {**vars(state), "position": [at.epoch, at.step]})
    for old in list_checkpoints(folder)[keep_last:]:
        old.unlink()
        digest_path(old).unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest position first."""
    found = [path for path in folder.glob("epoch-*.pt") if _NAME.search(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def drop_checkpoints_after(folder: Path, position: Position) -> None:
    """Remove what a run that goes on from `position` will write again.

    Left there, a later file of the abandoned steps, whole or damaged, would count as the newest:
    it would outlive the new ones, and the next resume would take it.
    """
    for path in list_checkpoints(folder):
        if _position_of(path) > (position.epoch, position.step):
            logger.warning("%s: removed, the run goes on from an earlier checkpoint", path)
            path.unlink()
            digest_path(path).unlink(missing_ok=True)
    for path in list_bests(folder):
        # Epochs that are not behind the position; later names would count as the newer bests.
        if path.name >= best_name(position.epoch):
            logger.warning("%s: removed, the run goes on from an earlier checkpoint", path)
            path.unlink()
            digest_path(path).unlink(missing_ok=True)


def best_name(epoch: int) -> str:
    """What the weights of the best epoch, counted from 0, are called."""
    return f"best-{epoch:04d}.pt"


def best_path(folder: Path, epoch: int) -> Path:
    """Where the weights of the best epoch, counted from 0, stand in a checkpoints folder."""
    return folder / best_name(epoch)


def save_best(path: Path, weights: dict[str, Any], *, keep_last: int) -> None:
    """Write the weights of the best epoch so far and drop all but the latest `keep_last`.

    An older checkpoint, should the run fall back to it, names an older best: as many are kept.
    """
    save_tensors(path, {"model": weights})
    for old in list_bests(path.parent)[keep_last:]:
        old.unlink()
        digest_path(old).unlink(missing_ok=True)


def list_bests(folder: Path) -> list[Path]:
    """Weights of best epochs, the latest first."""
    return sorted(folder.glob("best-*.pt"), reverse=True)


def _position_of(path: Path) -> tuple[int, int]:
    found = _NAME.search(path.name)
    if found is None:
        raise ValueError(f"{path}: not the name of a checkpoint")
    return int(found[1]), int(found[2])


def read_newest(folder: Path) -> State | None:
    """The newest checkpoint that is whole; damaged ones are named in the log and passed over.

    Raises:
        LmclError: If there are checkpoints but none is whole.
    """
    paths = list_checkpoints(folder)
    for path in paths:
        try:
            return read_checkpoint(path)
        except LmclError as error:
            logger.warning("%s; falling back to the checkpoint before it", error)
    if paths:
        raise LmclError(
            f"{folder}: none of its {len(paths)} checkpoints can be read; start again in another "
            "--output",
            exit_code=5,
        )
    return None


def read_checkpoint(path: Path) -> State:
    """One checkpoint, after comparing it with the digest written beside it.

    Raises:
        LmclError: If the file is missing (exit code 4) or damaged (exit code 5).
    """
    content = load_tensors(path)
    try:
        epoch, step = content.pop("position")
        return State(position=Position(epoch=epoch, step=step), **content)
    except (KeyError, TypeError, ValueError) as error:
        raise LmclError(
            f"{path}: not a checkpoint of this version ({error}); start a new run", exit_code=5
        ) from error


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """torch.save under a temporary name, digest first, then rename: never half a file.

    Raises:
        LmclError: If the file cannot be written; the ones before it stand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(".*.pt.*.tmp"):
        left.unlink()  # of a run that was killed while it wrote
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            torch.save(content, out)
            out.flush()
            os.fsync(out.fileno())
        # Without the old file a crash between the next two renames leaves nothing, not a mismatch.
        path.unlink(missing_ok=True)
        write_atomic(digest_path(path), _sha256(temporary) + "\n")
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its own.
        temporary.unlink(missing_ok=True)
        raise LmclError(
            f"{path}: the checkpoint could not be written ({str(error).splitlines()[0]}); the ones "
            "before it stand. Make room, then go on with --resume auto"
        ) from error


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save_tensors` wrote, verified against its digest.

    Raises:
        LmclError: If the file is missing (exit code 4), disagrees with its digest, or is no file of
            tensors (exit code 5).
    """
    if not path.is_file():
        raise LmclError(
            f"{path}: there is no such checkpoint; --resume auto takes the newest of the run",
            exit_code=4,
        )
    digest = digest_path(path)
    if not digest.is_file() or digest.read_text(encoding="ascii").strip() != _sha256(path):
        raise LmclError(
            f"{path}: does not match the digest in {digest.name}: it was damaged or copied "
            "incompletely; copy it again or resume from an older checkpoint",
            exit_code=5,
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's readers meet a foreign file with any error: struct.error, KeyError, EOFError ...
        said = (str(error).splitlines() or ["nothing more is known"])[0]
        raise LmclError(
            f"{path}: matches its digest, and yet is no file of tensors ({type(error).__name__}: "
            f"{said}); it was written by something else: name another checkpoint",
            exit_code=5,
        ) from error
    if not isinstance(loaded, dict):
        raise LmclError(
            f"{path}: holds a {type(loaded).__name__} where a checkpoint was expected; name "
            "another one",
            exit_code=5,
        )
    return loaded


def digest_path(path: Path) -> Path:
    """Where the sha256 of a checkpoint stands."""
    return path.with_name(path.name + ".sha256")


def _sync_folder(folder: Path) -> None:
    """Make renames last: older checkpoints are deleted next."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
