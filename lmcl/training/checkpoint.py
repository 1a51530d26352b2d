"""The whole state of a run in one file: written atomically, read without unpickling code."""

import hashlib
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch

from lmcl.errors import LmclError
from lmcl.training.signals import way_on
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.files import atomic_path, remove_stale_temporaries
from shards.source_files import read_text
from shards.text import looked_at

logger = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d{4,})-step-(\d{6,})\.pt$")
SET_ASIDE = "set-aside"
"""Folder of checkpoints that a run which went on from an earlier one left behind."""


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
    images: str = ""
    """Hash over the bytes of the images of each part; empty in files of earlier versions."""
    collapsed_steps: int = 0
    """Steps in a row, up to here, whose crops of one image looked alike."""


def write_checkpoint(
    folder: Path, state: State, *, keep_last: int, keep: Position | None = None
) -> Path:
    """Write `state` under its position's name and drop all but the newest `keep_last`.

    Args:
        folder: Of the run's checkpoints.
        state: Of the run.
        keep_last: How many stay.
        keep: One more that stays: where `wsd` begins to fall, and the run can be made longer.
    """
    at = state.position
    path = folder / f"epoch-{at.epoch:04d}-step-{at.step:06d}.pt"
    save_tensors(path, {**vars(state), "position": [at.epoch, at.step]})
    for old in list_checkpoints(folder)[keep_last:]:
        if keep is not None and _position_of(old) == (keep.epoch, keep.step):
            continue
        old.unlink()
        digest_path(old).unlink(missing_ok=True)
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest position first."""
    found = [path for path in folder.glob("epoch-*.pt") if _NAME.search(path.name)]
    return sorted(found, key=lambda path: path.name, reverse=True)


def set_checkpoints_aside_after(folder: Path, position: Position) -> None:
    """Move away what a run that goes on from `position` will write again.

    Left there, a later file of the abandoned steps, whole or damaged, would count as the newest:
    it would outlive the new ones, and the next resume would take it.
    """
    at = (position.epoch, position.step)
    later = [path for path in list_checkpoints(folder) if _position_of(path) > at]
    # Epochs that are not behind the position; later names would count as the newer bests.
    later += [path for path in list_bests(folder) if path.name >= best_name(position.epoch)]
    for path in later:
        _set_aside(path)


def _set_aside(path: Path) -> None:
    """Move a checkpoint and its digest out of the run's way; nothing is deleted or replaced."""
    aside = path.parent / SET_ASIDE
    aside.mkdir(exist_ok=True)
    number = 0
    while (target := aside / f"{path.name}.{number}").exists():
        number += 1
    path.rename(target)
    digest = digest_path(path)
    if digest.exists():
        digest.rename(digest_path(target))
    logger.warning(
        "%s: set aside as %s, the run goes on from an earlier checkpoint; delete it when it is no "
        "longer wanted",
        path,
        target.relative_to(path.parent),
    )


def best_name(epoch: int) -> str:
    """What the weights of the best epoch, counted from 0, are called."""
    return f"best-{epoch:04d}.pt"


def best_path(folder: Path, epoch: int) -> Path:
    """Where the weights of the best epoch, counted from 0, stand in a checkpoints folder."""
    return folder / best_name(epoch)


def save_best(
    path: Path, weights: dict[str, Any], *, keep_last: int, before: int | None = None
) -> None:
    """Write the weights of the best epoch so far and drop all but the latest `keep_last` + 1.

    Each checkpoint that is there names a best epoch of its time, and the one that names this epoch
    is written after it: a run that is killed in between, or falls back, needs one best a checkpoint
    and this one. The last one of the epochs below `before` stays for the checkpoint kept there.
    """
    save_tensors(path, {"model": weights})
    earlier = [old for old in list_bests(path.parent) if before and old.name < best_name(before)]
    for old in list_bests(path.parent)[keep_last + 1 :]:
        if earlier[:1] == [old]:
            continue
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
        state = State(position=Position(epoch=epoch, step=step), **content)
        _check_state(state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LmclError(
            f"{path}: not a checkpoint of this version ({error}); resume from another one, or "
            "start a new run in another --output",
            exit_code=5,
        ) from error
    return state


def _check_state(state: State) -> None:
    """Refuse a checkpoint whose fields could not come from a run.

    Raises:
        TypeError: If a field is of another kind.
        ValueError: If a number lies outside what a run counts.
    """
    counts = (state.position.epoch, state.position.step, state.collapsed_steps)
    if not all(type(count) is int and 0 <= count < 2**40 for count in counts):
        raise ValueError(f"it stands at epoch {counts[0]!r}, step {counts[1]!r}")
    if type(state.best_epoch) is not int or not -1 <= state.best_epoch <= state.position.epoch:
        raise ValueError(f"its best epoch is {state.best_epoch!r}")
    for name in ("best_srcc", "seconds"):
        float(getattr(state, name))
    for name in ("student", "teacher", "optimizer", "scaler"):
        if not isinstance(getattr(state, name), dict):
            raise TypeError(f"{name} is no table of tensors")
    if not all(isinstance(text, str) for text in (state.config, state.data, state.images)):
        raise TypeError("its configuration is no text")
    ids, boxes = state.saliency_ids, state.saliency_boxes
    if ids.ndim != 1 or boxes.shape != (len(ids), 4) or ids.dtype != torch.int64:
        raise ValueError("its salient boxes do not fit their images")


def save_tensors(path: Path, content: dict[str, Any]) -> None:
    """Write tensors whole, their digest first: never half a file, never a file without its digest.

    Raises:
        LmclError: If the file cannot be written; the ones before it stand.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale_temporaries(path.parent)
        with atomic_path(path) as temporary:
            _write_tensors(temporary, content)
            # Without the old file a crash between two renames leaves nothing, not a mismatch.
            path.unlink(missing_ok=True)
            write_atomic(digest_path(path), _sha256(temporary) + "\n")
    except (OSError, RuntimeError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LmclError(
            f"{path}: the checkpoint could not be written ({said}); the ones "
            f"before it stand. Make room, then {way_on()} goes on from there"
        ) from error


def _write_tensors(path: Path, content: dict[str, Any]) -> None:
    """torch.save, whose own words for a full disk ("enforce fail") are the system's here."""
    with path.open("wb") as out:
        kept = _ErrorKeeper(out)
        try:
            torch.save(content, cast(IO[bytes], kept))
        except RuntimeError as error:
            raise (kept.error or error) from error
        out.flush()


class _ErrorKeeper:
    """A file that remembers why it could not be written."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write on, and keep the error for whoever asks later."""
        try:
            return self._out.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Flush the file."""
        self._out.flush()


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save_tensors` wrote, verified against its digest.

    Raises:
        LmclError: If the file is missing (exit code 4), disagrees with its digest, or is no file of
            tensors (exit code 5).
    """
    if not path.is_file():
        raise LmclError(
            f"{path}: there is no such checkpoint{looked_at(path)}; --resume auto takes the "
            "newest of the run",
            exit_code=4,
        )
    digest = digest_path(path)
    if not digest.exists():
        raise LmclError(
            f"{path}: {digest.name}, which stands beside every checkpoint, is missing; copy it "
            "too, or name a checkpoint of a run (<run>/checkpoints/epoch-*.pt)",
            exit_code=5,
        )
    if _read_digest(digest) != _sha256(path):
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


def _read_digest(path: Path) -> str:
    """The hexadecimal digits in a digest file, however `sha256sum` or an editor spelled them."""
    try:
        words = read_text(path, limit_bytes=4096).removeprefix("\ufeff").split()
    except (OSError, ShardError):
        return ""
    return words[0].lower() if words else ""


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
