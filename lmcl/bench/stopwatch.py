"""Where the time of a training step goes: every moment belongs to exactly one part.

On a GPU the marks are events in its queue: nothing waits for them, and a part's time is the time
the GPU spent between two of them. On a CPU they are clock readings.
"""

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch


class Part(StrEnum):
    """What a training loop can be busy with."""

    WAIT = "data_wait"
    """Waiting for a batch."""
    PREPARE = "prepare"
    """From uint8 crops to normalised pixels; seeding, counting, learning rate."""
    FORWARD = "forward"
    """The networks' forward pass."""
    OBJECTIVE = "objective"
    """The loss, forward and backward down to the networks' outputs."""
    BACKWARD = "backward"
    """The networks' backward pass."""
    OPTIMISER = "optimiser"
    """Clipping, the update, and forgetting gradients."""
    TEACHER = "teacher_follows"
    """The moving average."""
    LOGGING = "logging"
    """Log line, progress bar, bookkeeping."""
    SALIENCY = "saliency"
    """The teacher's look at the images of a step: an epoch's pass over its steps."""


NETWORKS = (Part.FORWARD, Part.BACKWARD)
AROUND = (Part.OBJECTIVE, Part.TEACHER, Part.SALIENCY, Part.LOGGING)
"""What the method adds around the networks, and must not cost."""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Seconds of one round."""

    wall: float
    """From start to end, by the host's clock, whatever the parts say."""
    parts: Mapping[Part, float]

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def gap(self) -> float:
        """Share of the round, at least 0, that the parts leave out or count twice."""
        return abs(self.total - self.wall) / self.wall


class Stopwatch:
    """Attributes time to the part that was entered last.

    Args:
        device: Whose time is measured.
        clock: Seconds from any moment on; another one in tests.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._on_gpu = device.type == "cuda"
        self._clock = clock
        self._began = 0.0
        self._entered: list[Part] = []
        self._moments: list[float | torch.cuda.Event] = []

    def start(self, part: Part) -> None:
        """Begin a round in `part`; whatever was measured before is forgotten."""
        self._entered, self._moments = [], []
        synchronize(self._on_gpu)
        self._began = self._clock()
        self.enter(part)

    def enter(self, part: Part) -> None:
        """From here on time belongs to `part`."""
        self._entered.append(part)
        self._moments.append(self._now())

    def stop(self) -> Spent:
        """End the round and add up."""
        self._moments.append(self._now())
        synchronize(self._on_gpu)
        wall = self._clock() - self._began
        parts = dict.fromkeys(Part, 0.0)
        for part, begin, end in zip(
            self._entered, self._moments[:-1], self._moments[1:], strict=True
        ):
            parts[part] += _between(begin, end)
        return Spent(wall=wall, parts=parts)

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


class PeakMemory:
    """Memory above what was in use when it was made, in bytes; of the GPU if that is the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
        else:
            # What an earlier case freed must go back to the system, or this one has it for free.
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:
                trim(0)
            # The system's own high-water mark of this process, set back to the present.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._start = _status_bytes("VmRSS")

    def read(self) -> int:
        """The highest so far."""
        if self._on_gpu:
            return int(torch.cuda.max_memory_allocated() - self._start)
        return _status_bytes("VmHWM") - self._start


def synchronize(on_gpu: bool) -> None:
    """Wait until the GPU has done what it was given, if there is one."""
    if on_gpu:
        torch.cuda.synchronize()


def _between(begin: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return float(begin.elapsed_time(end)) / 1e3
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    raise TypeError("one stopwatch reads one clock")


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory needs Linux")
