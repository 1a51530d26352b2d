"""Learning rate schedule and teacher momentum: pure functions of the step.

Resuming therefore needs no state.

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
    shape: Literal["step", "cosine", "wsd"] = "step"
    """`step` divides every `decay_epochs` [paper]; `cosine` falls to `final_fraction`; `wsd`
    (warm-up, stable, decay) keeps `lr` until the last `decay_epochs` and falls to `final_fraction`
    in these: a run of it can be made longer exactly (docs/training.md)."""
    decay: float = 10.0
    """What `step` divides by [paper]; 1 keeps the rate constant."""
    decay_epochs: int = 3
    """How many epochs between two divisions of `step` [paper]; how many the fall of `wsd` takes."""
    final_fraction: float = 0.01
    """Where `cosine` and `wsd` end, as a fraction of `lr`."""
    warmup_epochs: float = 0.5
    """Epochs (fractions allowed) over which the rate rises linearly from zero. The paper is silent;
    the family warms up over 3 of 9 epochs."""

    def __post_init__(self) -> None:
        least = {"decay": 1, "decay_epochs": 1, "warmup_epochs": 0, "final_fraction": 0}
        most = {"lr": 10**3, "decay": 10**9, "decay_epochs": 10**6, "warmup_epochs": 10**6}
        most |= {"final_fraction": 1}
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

    Source: [Local Manifold Learning, 2024], section on training; warm-up and `cosine` are ours;
    `wsd`: [Hu et al., 2024], MiniCPM, section 4, with a linear fall [Hägele et al., 2024].
    """
    progress = step / steps_per_epoch
    warmup = schedule.warmup_epochs
    rise = min(1.0, (step + 1) / (warmup * steps_per_epoch)) if warmup > 0 else 1.0
    if schedule.shape == "step":
        try:
            divisor = schedule.decay ** int(progress // schedule.decay_epochs)
        except OverflowError:  # beyond the largest float the rate is 0
            return 0.0
        return schedule.lr * rise / divisor
    low = schedule.final_fraction
    if schedule.shape == "wsd":
        # The step after the last one would be at `final_fraction`, as with `cosine`.
        stable = stable_epochs(schedule, epochs)
        fall = min(1.0, max(0.0, progress - stable) / (epochs - stable))
        return schedule.lr * rise * (1 - (1 - low) * fall)
    fall = min(1.0, max(0.0, progress - warmup) / max(epochs - warmup, 1e-9))
    return schedule.lr * rise * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * fall)))


def stable_epochs(schedule: ScheduleConfig, epochs: int) -> int:
    """Epochs before the fall of `wsd` begins, warm-up included; at least 0."""
    return max(epochs - schedule.decay_epochs, 0)


def same_until(schedule: ScheduleConfig, done: float, *, epochs: int, before: int) -> bool:
    """Whether a run of `epochs` had the very rates up to here of a run of `before` epochs.

    Args:
        schedule: Of both.
        done: Epochs behind the run's position, with fractions.
        epochs: The length asked for.
        before: The length the steps were taken with.
    """
    if schedule.shape == "step" or epochs == before or done == 0:
        return True
    if schedule.shape == "wsd":
        return done <= stable_epochs(schedule, min(epochs, before))
    return done <= schedule.warmup_epochs


@dataclass(frozen=True, kw_only=True)
class LrCurve:
    """The learning rates of a whole run, for people."""

    first: float
    peak: float
    peak_epoch: float
    """Epochs before the first step at the peak."""
    last: float
    bars: str
    """The curve from left to right, a block a part of the run; a block less is half a decade."""
    tiny_epochs: float
    """Epochs at the end whose rates lie below `TINY` of the peak."""


TINY = 1e-4
"""Share of the peak rate below which steps change next to nothing."""
_TINY = TINY * (1 - 1e-9)
"""The same, less what dividing by ten four times may be off by."""
_BLOCKS = "▁▂▃▄▅▆▇█"
_POINTS = 4096


def trace_schedule(
    schedule: ScheduleConfig, *, steps_per_epoch: int, epochs: int, width: int = 32
) -> LrCurve:
    """First, highest and last learning rate of a run, and its curve in one line of text.

    Runs of more than some thousand steps are looked at in as many places, spread evenly.
    """
    steps = steps_per_epoch * epochs
    points = sorted({round(i * (steps - 1) / _POINTS) for i in range(_POINTS + 1)})
    # A warm-up shorter than the distance of two places ends between them.
    top = math.ceil(schedule.warmup_epochs * steps_per_epoch) - 1
    points = sorted({*points, min(max(top, 0), steps - 1)})
    rates = [
        learning_rate(schedule, step=step, steps_per_epoch=steps_per_epoch, epochs=epochs)
        for step in points
    ]
    peak = max(rates)
    at = points[next(i for i, rate in enumerate(rates) if rate >= peak * (1 - 1e-9))]
    tiny = next((i for i in range(len(rates), 0, -1) if rates[i - 1] >= _TINY * peak), 0)
    end = points[tiny - 1] + 1 if tiny else 0
    shown = [rates[i * (len(rates) - 1) // (width - 1)] for i in range(width)]
    return LrCurve(
        first=rates[0],
        peak=peak,
        peak_epoch=at / steps_per_epoch,
        last=rates[-1],
        bars="".join(_block(rate / peak) for rate in shown),
        tiny_epochs=(steps - end) / steps_per_epoch,
    )


def schedule_line(schedule: ScheduleConfig, curve: LrCurve) -> str:
    """The rates of a run in one line."""
    return (
        f"learning rate {schedule.shape}: first {curve.first:.2g}, peak {curve.peak:.2g} (epoch "
        f"{int(curve.peak_epoch) + 1}), last {curve.last:.2g}  {curve.bars} (log scale)"
    )


def schedule_warnings(schedule: ScheduleConfig, curve: LrCurve, *, epochs: int) -> list[str]:
    """What is odd about the rates of a run, each with the change that mends it."""
    found = []
    if curve.peak < schedule.lr * (1 - 1e-6):
        found.append(
            f"schedule.lr = {schedule.lr:g} is never reached: the rate is highest at "
            f"{curve.peak:.2g}, as the warm-up takes {schedule.warmup_epochs:g} epochs; "
            f"{_earlier_peak(schedule, epochs)}"
        )
    if curve.last < _TINY * curve.peak:
        found.append(
            f"the last {_short(curve.tiny_epochs)} of {epochs} epochs have learning rates below "
            f"{TINY:g} of the peak (the last {curve.last:.2g}) and change next to nothing; "
            f"{_higher_end(schedule, epochs)}"
        )
    return found


def _short(epochs: float) -> str:
    return f"{epochs:.3g}" if epochs < 100 else f"{epochs:.0f}"


def _earlier_peak(schedule: ScheduleConfig, epochs: int) -> str:
    """Values with which the warm-up ends before anything falls."""
    room, fall = float(epochs), ""
    if schedule.shape == "step" and schedule.decay > 1:
        room = min(epochs, schedule.decay_epochs)
    elif schedule.shape == "wsd":
        decay = max(1, min(schedule.decay_epochs, epochs // 3))
        room, fall = epochs - decay, f" and schedule.decay_epochs to {decay}"
    return f"set schedule.warmup_epochs to at most {room / 2:g}{fall}"


def _higher_end(schedule: ScheduleConfig, epochs: int) -> str:
    if schedule.shape != "step":
        return "set schedule.final_fraction to 0.001 or more"
    # Three stages as in the paper, or as many as stay above the bound.
    divisions = min(2, int(-math.log(TINY * 1.01) / math.log(schedule.decay)))
    return (
        f"set schedule.decay_epochs to {math.ceil(epochs / (divisions + 1))} or more, or "
        "schedule.shape = 'cosine'"
    )


def _block(share: float) -> str:
    if share <= 0:
        return _BLOCKS[0]
    return _BLOCKS[max(0, min(7, round(7 + 2 * math.log10(share))))]


def step_momentum(beta: float, *, steps_per_epoch: int) -> float:
    """The per-step momentum whose effect over one epoch is `beta`, in [0, 1).

    Source: [ours] docs/decisions/0004-teacher.md; the paper updates once an epoch.
    """
    return float(beta ** (1.0 / steps_per_epoch))
