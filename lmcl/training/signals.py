"""Being asked to stop: by Ctrl-C, by a scheduler's SIGTERM, by SLURM's warning signal.

While steps are taken a signal only leaves a note, which the loop reads at the end of the step: it
writes a checkpoint and leaves with exit code 130. Outside the loop nothing is lost by leaving at
once, since the last checkpoint stands.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lmcl.errors import LmclError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C; schedulers and `kill`; what `sbatch --signal=USR1@60` sends ahead of a time limit."""


class InterruptedRunError(LmclError):
    """The run was asked to stop; what it had to save is saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=130)


class StopSignal:
    """Whether this process was asked to stop, and whether it answers at once."""

    def __init__(self) -> None:
        self.requested = False
        self._is_deferred = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal sets `requested` and nothing else; a second Ctrl-C leaves at once."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False

    def request(self, signum: int, _frame: FrameType | None) -> None:
        """The signal handler.

        Raises:
            InterruptedRunError: Outside `deferred`, and on a second Ctrl-C.
        """
        # A scheduler repeats itself (SIGUSR1, then SIGTERM) and must not cut the checkpoint short;
        # a person who presses Ctrl-C twice means it.
        again = self.requested and signum == signal.SIGINT
        self.requested = True
        if again or not self._is_deferred:
            raise InterruptedRunError(
                f"stopped at once by {signal.Signals(signum).name}; checkpoints written so far "
                "stand, and --resume auto goes on from the newest"
            )


@contextmanager
def stop_on_signals() -> Iterator[StopSignal]:
    """Answer the signals of `SIGNALS` within, and give them back to their owners after."""
    stop = StopSignal()
    try:
        before = {signum: signal.signal(signum, stop.request) for signum in SIGNALS}
    except ValueError:
        # Not the main thread (a notebook, a server): signals are the owner's business.
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
