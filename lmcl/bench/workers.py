"""Worker processes of a DataLoader that stand still between rounds and whose work is counted."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader


class Workers:
    """Batches of an endless loader with worker processes; paused when made.

    Workers go on for a while after a round; they are stopped between rounds, so that other cases
    have the machine to themselves and no batch is made outside of the clock.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._iterator: Any = iter(loader)
        self._signal(signal.SIGSTOP)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterator)

    def resume(self) -> None:
        """Let the workers work."""
        self._signal(signal.SIGCONT)

    def pause(self) -> None:
        """Stop the workers where they stand."""
        self._signal(signal.SIGSTOP)

    def cpu_seconds(self) -> float:
        """Processor seconds of all workers so far."""
        ticks = 0
        for pid in self._pids():
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
            ticks += sum(int(field) for field in fields.split()[11:13])
        return ticks / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Let the workers end."""
        if self._pids():
            self.resume()
            self._iterator._shutdown_workers()

    def _pids(self) -> list[int]:
        # Without worker processes the loader works in this one, and there is nothing to stop.
        return [worker.pid for worker in getattr(self._iterator, "_workers", [])]

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids():
            os.kill(pid, number)
