"""What a run says while it trains: a bar, lines in log.jsonl, trackers, a warning of collapse.

Rank 0 enabled; on other ranks a logger only counts. docs/training.md explains every figure.
"""

import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from tqdm import tqdm

from lmcl.training.run_dir import RunDir
from lmcl.utils.trackers import Trackers
from shards.progress import progress_bar

logger = logging.getLogger(__name__)

COLLAPSED = 0.98
"""Mean cosine of two crops of one image above which an image's manifold is a point."""


@dataclass(frozen=True, kw_only=True)
class StepEntry:
    """One optimiser step, over all ranks."""

    epoch: int
    step: int
    images: int
    """Images that counted; padding does not."""
    loss: float
    l1: float
    """Mean absolute error of the random crops, in [0, 1] units."""
    plcc_loss: float | None
    """(1 - PLCC) / 2 over the step's images; None when switched off, as is the next."""
    rank_loss: float | None
    distribution_loss: float | None
    """Nats; None without `decoder.bins`."""
    contrastive: float | None
    """Nats; None when switched off, as are the three after it: not taken is not 0."""
    intra_share: float | None
    """None with one random crop an image, as is the next."""
    intra_similarity: float | None
    positive_similarity: float | None
    grad_norm: float | None
    """Before clipping; None when `train.clip` is 0."""
    lr: float
    images_per_s: float
    """Mean of the epoch so far, in this process's life."""
    data_wait: float
    """Share of that time in which the step stood waiting for crops."""
    time_s: float
    """Time spent in training steps since the run began, resumed parts included."""


@dataclass(frozen=True, kw_only=True)
class EpochEntry:
    """The end of an epoch; correlations are None without a val part, or where undefined."""

    epoch: int
    time_s: float
    val_srcc: float | None
    val_plcc: float | None
    val_reason: str = ""
    """Why the val part has no correlation; empty if it has one, or there is no such part."""
    val_sets: dict[str, float] | None = None
    """SRCC of each set's val part, where there are several; `val_srcc` is their mean."""


class CollapseWatch:
    """Counts steps in a row whose crops of one image all look alike.

    Args:
        limit: Steps in a row after which `saw` answers True, once; 0 = never.
        streak: Steps in a row so far.
    """

    def __init__(self, *, limit: int, streak: int = 0) -> None:
        self.limit = limit
        self.streak = streak

    def saw(self, similarity: float | None) -> bool:
        """Count one step; whether it is the one to warn at."""
        has_collapsed = similarity is not None and similarity > COLLAPSED
        self.streak = self.streak + 1 if has_collapsed else 0
        return 0 < self.limit == self.streak


class MetricsLogger:
    """The voice of one run.

    Args:
        folder: Where log.jsonl lies.
        trackers: Open ones; none on ranks other than 0.
        watch: Warns of collapse.
        enabled: Whether this is rank 0.
        progress: Whether it shows bars on a terminal.
    """

    def __init__(
        self,
        folder: RunDir,
        trackers: Trackers,
        watch: CollapseWatch,
        *,
        enabled: bool,
        progress: bool,
    ) -> None:
        self.watch = watch
        self._folder = folder
        self._trackers = trackers
        self._enabled = enabled
        self._progress = progress
        self._bar: tqdm | None = None
        self._began = time.monotonic()
        self._first_done = 0

    @contextmanager
    def epoch(
        self, epoch: int, *, epochs: int, images: int, seen: int, steps_done: int
    ) -> Iterator[None]:
        """Show an epoch's bar.

        Args:
            epoch: From 0.
            epochs: Length of the run.
            images: Images of the epoch.
            seen: Those a resumed epoch saw before.
            steps_done: Optimiser steps of the run so far.
        """
        self._began, self._first_done = time.monotonic(), steps_done
        self._bar = progress_bar(
            total=images,
            initial=seen,
            desc=f"epoch {epoch + 1}/{epochs}",
            unit="img",
            off=not self._progress,
        )
        with self._bar:
            yield

    def step(self, entry: StepEntry, *, done: int, steps: int) -> None:
        """Tell of one step: `done` of the run's `steps` are behind it."""
        collapsed = self.watch.saw(entry.intra_similarity)
        if not self._enabled:
            return
        self._folder.append_log({"event": "step", **vars(entry)})
        self._trackers.log(_figures(entry), step=done)
        if self._bar is not None:
            self._bar.set_postfix_str(self._postfix(entry, done=done, steps=steps), refresh=False)
            self._bar.update(entry.images)
        if collapsed:
            self._warn_of_collapse(entry)

    def epoch_end(self, entry: EpochEntry, last: StepEntry | None, *, done: int) -> None:
        """Tell of an epoch's end; `last` is its last step, None if all were taken before."""
        if not self._enabled:
            return
        self._folder.append_log({"event": "epoch", **vars(entry)})
        self._trackers.log(_figures(entry), step=done)
        words = [f"epoch {entry.epoch + 1}"]
        if entry.val_srcc is not None:
            words.append(f"validation SRCC {entry.val_srcc:.4f}, PLCC {entry.val_plcc:.4f}")
            words += [f"{name} {value:.4f}" for name, value in (entry.val_sets or {}).items()]
        elif entry.val_reason:
            words.append(f"validation SRCC is not defined ({entry.val_reason})")
        if last is not None:
            words.append(f"l1 {last.l1:.4f}")
            if last.contrastive is not None:
                words.append(f"contrastive {last.contrastive:.3f}")
            words += [
                f"lr {last.lr:.2g}",
                f"{last.images_per_s:.1f} images/s",
                f"data wait {last.data_wait:.0%}",
            ]
        logger.info("%s", ", ".join(words))

    def close(self) -> None:
        """End the trackers."""
        self._trackers.close()

    def _postfix(self, entry: StepEntry, *, done: int, steps: int) -> str:
        each = (time.monotonic() - self._began) / max(done - self._first_done, 1)
        left = timedelta(seconds=round(each * (steps - done)))
        terms = f"loss {entry.loss:.3f} = l1 {entry.l1:.3f}"
        if entry.contrastive is not None:
            terms += f" & contrastive {entry.contrastive:.2f}"
        return f"{terms}, lr {entry.lr:.1e}, data wait {entry.data_wait:.0%}, run ends in {left}"

    def _warn_of_collapse(self, entry: StepEntry) -> None:
        at = f"epoch {entry.epoch + 1}, step {entry.step + 1}"
        self._folder.append_log(
            {"event": "collapse", "epoch": entry.epoch, "step": entry.step}
            | {"steps": self.watch.limit, "intra_similarity": entry.intra_similarity}
        )
        logger.warning(
            "%s: crops of one image have looked alike for %d steps (mean cosine %.3f, above %s): "
            "the manifold the method learns has collapsed. A randomly initialised encoder shows "
            "this at first; if it lasts beyond the warm-up, lower objective.temperature, raise "
            "objective.intra_weight (or 'balanced'), or warn later with runtime.collapse_steps",
            *(at, self.watch.limit, entry.intra_similarity, COLLAPSED),
        )


def _figures(entry: StepEntry | EpochEntry) -> dict[str, int | float]:
    """What a tracker draws: finite numbers under `train/` and `val/`."""
    found = {}
    for name, value in vars(entry).items():
        if not isinstance(value, int | float):
            continue
        if name.startswith("val_"):
            found[f"val/{name.removeprefix('val_')}"] = value
        elif name != "step":
            found[f"train/{name}"] = value
    return {name: value for name, value in found.items() if math.isfinite(value)}
