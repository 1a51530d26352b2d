"""What surrounds a run: its folder, its randomness, and the machine it is on."""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lmcl.config import Config, binding_differences, dump_config, load_run_config
from lmcl.errors import ConfigError, LmclError
from lmcl.training.checkpoint import list_checkpoints
from lmcl.utils.files import write_atomic
from shards.errors import ShardError
from shards.files import remove_stale_temporaries
from shards.source_files import read_regular, read_text

logger = logging.getLogger(__name__)

LENGTH = "train.epochs:"
"""The difference between two configurations that a run may be made longer by."""
_WRITTEN = ("checkpoints", "saliency", "predictions", "thumbs", "attention", "model", "probe")
"""Folders of a run that a start writes files into."""
_OF_A_START = ("started", "device_name", "world_size", "threads", "git_commit", "git_dirty")
"""What environment.json keeps of every start of a run."""


class RunDir:
    """The files of one run (docs/architecture.md lists them)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.log = root / "log.jsonl"
        self.environment = root / "environment.json"
        self.checkpoints = root / "checkpoints"
        self.saliency = root / "saliency"
        self.predictions = root / "predictions"
        self.metrics = root / "metrics.json"
        self.model = root / "model"
        self.interrupted = root / "stopped"

    @property
    def has_begun(self) -> bool:
        """Whether a run took a step here: one that was refused before has nothing to lose."""
        is_logged = self.log.exists() and self.log.stat().st_size > 0
        return is_logged or bool(list_checkpoints(self.checkpoints))

    def check(self, config: Config, *, resume: bool) -> None:
        """Say why the folder cannot be taken for this configuration, if it cannot.

        Raises:
            ConfigError: If the folder holds a run of another configuration (exit code 5).
            LmclError: If it holds a run and resuming was not asked for.
        """
        if self.has_begun:
            if self.config.exists():
                self._check_same(config, resume=resume)
            if not resume:
                raise LmclError(
                    f"{self.root}: already holds a run of this configuration; go on with it by "
                    "--resume auto, or choose another --output"
                )

    def create(self, config: Config) -> None:
        """Take the folder for this configuration.

        Raises:
            LmclError: If it cannot be written.
        """
        try:
            for folder in (self.checkpoints, self.saliency, self.predictions):
                folder.mkdir(parents=True, exist_ok=True)
            # Of a start that was killed while it wrote; each place is written by one start alone.
            for name in ("", *_WRITTEN):
                remove_stale_temporaries(self.root / name)
            write_atomic(self.config, dump_config(config))
            self.interrupted.unlink(missing_ok=True)
        except OSError as error:
            raise LmclError(f"{self.root}: cannot be used as a run folder: {error}") from error

    def mark_interrupted(self) -> None:
        """Say that the run was asked to stop: the exit code of a launcher does not."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self.interrupted.touch()
        except OSError as error:
            # The run ends as it was asked to; what started it may take that for a failure.
            logger.warning("%s: cannot be written: %s", self.interrupted, error)

    def write_environment(self, found: Mapping[str, Any]) -> None:
        """Write environment.json: this start, and under `starts` a line for each one so far."""
        mine = {name: found[name] for name in _OF_A_START}
        tree = {**found, "starts": [*self._starts(), mine]}
        text = msgspec.json.format(msgspec.json.encode(tree), indent=2)
        write_atomic(self.environment, text + b"\n")

    def _starts(self) -> list[object]:
        """Earlier starts; of a version that kept the last one only, that."""
        try:
            tree = msgspec.json.decode(read_text(self.environment, limit_bytes=1 << 20))
        except (OSError, ShardError, msgspec.DecodeError):
            return []
        if not isinstance(tree, dict):
            return []
        starts = tree.get("starts")
        return starts if isinstance(starts, list) else [{k: tree.get(k) for k in _OF_A_START}]

    def append_log(self, entry: Mapping[str, object]) -> None:
        """Add one line to the log."""
        with self.log.open("a", encoding="utf-8") as out:
            out.write(json.dumps(entry, allow_nan=True) + "\n")

    def rewind_log(self, *, epoch: int, step: int) -> None:
        """Drop log lines at or after a position: they will be written again.

        Lines that are torn or damaged are left out and counted in a warning.

        Raises:
            ShardError: If the log is no regular file.
        """
        if not self.log.exists():
            return
        lines = read_regular(self.log).splitlines()
        places = [_position_of(line) for line in lines]
        pairs = zip(lines, places, strict=True)
        kept = [line + b"\n" for line, at in pairs if at is not None and at < (epoch, step)]
        if None in places:
            logger.warning(
                "%s: %d torn or damaged lines are left out", self.log, places.count(None)
            )
        write_atomic(self.log, b"".join(kept))

    def _check_same(self, config: Config, *, resume: bool) -> None:
        theirs = load_run_config(self.config)
        changed = binding_differences(config, theirs)
        if resume:
            # Its length may change where the checkpoint allows it (`checks.check_state`).
            changed = [line for line in changed if not line.startswith(LENGTH)]
        if changed:
            raise ConfigError(
                f"{self.root}: holds a run of another configuration (asked / found there): "
                f"{'; '.join(changed[:5])}; choose another --output, or resume with the run's own "
                f"{self.config}",
                exit_code=5,
            )


def _position_of(line: bytes) -> tuple[int, int | float] | None:
    """Epoch and step of a line of the log; the end of the epoch if it names no step."""
    try:
        entry = json.loads(line)
        epoch, step = entry["epoch"], entry.get("step", math.inf)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    is_place = isinstance(epoch, int) and isinstance(step, int | float)
    return (epoch, step) if is_place else None
