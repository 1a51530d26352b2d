"""Figures for TensorBoard, W&B and the others that Accelerate knows, by name.

A tracker is a convenience: one that is not installed, not reachable or breaks down later is named
once in the log and left out, and the run goes on. `log.jsonl` has everything in any case.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

logger = logging.getLogger(__name__)

TRACKERS = tuple(sorted(kind.value for kind in LoggerType if kind.value != "all"))
"""Names that `runtime.trackers` may hold."""


class Trackers:
    """The trackers of one run; rank 0 opens them, and only those that answer."""

    def __init__(
        self, names: Sequence[str], folder: Path, *, settings: Mapping[str, str], done: int = 0
    ) -> None:
        """Open what can be opened.

        Args:
            names: Some of `TRACKERS`.
            folder: The run folder: its name is the project's, and TensorBoard's files lie in its
                `trackers` folder.
            settings: The effective configuration, flat, for trackers that show it.
            done: Optimiser steps behind a run that goes on: TensorBoard drops what an earlier
                start wrote of later ones, as they will be taken again.
        """
        self._open: list[GeneralTracker] = []
        for name in names:
            if (tracker := _start(name, folder, settings, done)) is not None:
                self._open.append(tracker)

    def log(self, values: Mapping[str, int | float], *, step: int) -> None:
        """Hand figures on under their names; `step` counts optimiser steps of the whole run."""
        for tracker in list(self._open):
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # a tracker may raise anything, and none of it is our run's
                logger.warning("%s", _left_out(tracker.name, f"stopped working ({error})"))
                self._open.remove(tracker)

    def close(self) -> None:
        """Flush and end all of them."""
        for tracker in self._open:
            try:
                tracker.finish()
            except Exception as error:
                logger.warning("%s", _left_out(tracker.name, f"did not close ({error})"))
        self._open.clear()


def _start(
    name: str, folder: Path, settings: Mapping[str, str], done: int = 0
) -> GeneralTracker | None:
    kind = LoggerType(name)
    if kind not in get_available_trackers():
        logger.warning("%s", _left_out(name, f"is not installed (pip install {name})"))
        return None
    factory = LOGGER_TYPE_TO_CLASS[name]
    try:
        if factory.requires_logging_directory:
            # Entries are under the number of steps done when they are written.
            more = {"purge_step": done + 1} if name == "tensorboard" else {}
            tracker: GeneralTracker = factory(folder.name, logging_dir=folder / "trackers", **more)
        else:
            tracker = factory(folder.name)
        tracker.start()
        # TensorBoard would file a configuration as a run of its own beside the curves.
        if name != "tensorboard":
            tracker.store_init_configuration(dict(settings))
    except Exception as error:
        logger.warning("%s", _left_out(name, f"could not be opened ({error})"))
        return None
    return tracker


def _left_out(name: str, why: str) -> str:
    return f"runtime.trackers: {name!r} {why}; the run goes on without it, log.jsonl has it all"
