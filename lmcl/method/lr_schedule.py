"""Step -> learning rate and teacher momentum: pure functions, so resuming needs no state.

A step counts optimiser steps from the start of the run; warm-up steps are part of the schedule, not
added to it (method.md, trap 6: two versions of a well-known library disagree on that).
"""

import math
from dataclasses import dataclass
from typing import Literal

from lmcl.utils.validators import check_bounds


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate moves over a run."""

    lr: float = 2e-4
    """Peak learning rate [paper]. Lower it for pretrained encoders that forget."""
    shape: Literal["step", "cosine"] = "step"
    """`step` divides every `decay_epochs` [paper]; `cosine` falls to `final_fraction`."""
    decay: float = 10.0
    """What `step` divides by [paper]."""
    decay_epochs: int = 3
    """How many epochs between two divisions [paper]."""
    final_fraction: float = 0.01
    """Where `cosine` ends, as a fraction of `lr`."""
    warmup_epochs: float = 0.5
    """Epochs (fractions allowed) over which the rate rises linearly from zero. The paper is silent;
    the family warms up over 3 of 9 epochs."""

    def __post_init__(self) -> None:
        least = {"decay": 1, "decay_epochs": 1, "warmup_epochs": 0, "final_fraction": 0}
        most = {"lr": 10**3, "decay": 10**9, "decay_epochs": 10**6, "warmup_epochs": 10**6}
        check_bounds("schedule", self, least=least, above={"lr": 0}, most=most)


def learning_rate(
    schedule: ScheduleConfig, *, step: int, steps_per_epoch: int, epochs: int
) -> float:
    """Learning rate of one optimiser step.

    Args:
        schedule: Shape and constants.
        step: Optimiser step since the start of the run, in [0, epochs * steps_per_epoch).
        steps_per_epoch: Optimiser steps of one epoch.
        epochs: Length of the run.

    Source: [Local Manifold Learning, 2024], section on training; shapes and warm-up are ours.
    """
    progress = step / steps_per_epoch
    warmup = schedule.warmup_epochs
    rise = min(1.0, (step + 1) / (warmup * steps_per_epoch)) if warmup > 0 else 1.0
    if schedule.shape == "step":
        return schedule.lr * rise / schedule.decay ** int(progress // schedule.decay_epochs)
    fall = min(1.0, max(0.0, progress - warmup) / max(epochs - warmup, 1e-9))
    low = schedule.final_fraction
    return schedule.lr * rise * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall)))


def step_momentum(beta: float, *, steps_per_epoch: int) -> float:
    """The per-step momentum whose effect over one epoch is `beta`, in [0, 1).

    Source: [ours] docs/decisions/0004-teacher.md; the paper updates once an epoch.
    """
    return float(beta ** (1.0 / steps_per_epoch))
