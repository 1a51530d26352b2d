"""Signals that ask a run to stop: Ctrl-C, SIGTERM, SLURM's warning, a terminal that is closed.

While steps are taken a signal only leaves a note, which the loop reads at the end of the step: it
writes a checkpoint and leaves with exit code 130. Outside the loop nothing is lost by leaving at
once, since the last checkpoint stands.
"""

import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lmcl.errors import LmclError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; schedulers and `kill`; what `sbatch --signal=USR1@60` sends ahead of a time limit; a
closed terminal or connection."""


class InterruptedRunError(LmclError):
    """The run was asked to stop; what it had to save is saved."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=130)


WAY_ON = "LMCL_WAY_ON"
"""Environment variable by which who starts runs (`lmcl sweep`) says how they are gone on with."""


def way_on() -> str:
    """What goes on with this run where it stopped: an option, or the command that started it."""
    return os.environ.get(WAY_ON) or "--resume auto"


class StopSignal:
    """Whether this process was asked to stop, and whether it answers at once."""

    def __init__(self, kept: str = "") -> None:
        self.requested = False
        self._way_on = (
            kept or f"checkpoints written so far stand, and {way_on()} goes on from the newest"
        )
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
        if signum == signal.SIGHUP:
            _mute_terminal()
        self.requested = True
        if again or not self._is_deferred:
            raise InterruptedRunError(
                f"stopped at once by {signal.Signals(signum).name}; {self._way_on}"
            )


@contextmanager
def stop_on_signals(kept: str = "") -> Iterator[StopSignal]:
    """Answer the signals of `SIGNALS` within, and give them back to their owners after.

    Args:
        kept: What was kept and how to go on, for the message; empty: a run's checkpoints.
    """
    stop = StopSignal(kept)
    # `nohup` has a closed terminal ignored, and a shell Ctrl-C in its background jobs: so be it.
    heard = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]
    try:
        before = {signum: signal.signal(signum, stop.request) for signum in heard}
    except ValueError:
        # Not the main thread (a notebook, a server): signals are the owner's business.
        yield stop
        return
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _mute_terminal() -> None:
    """Send what would be written to the closed terminal nowhere: writing there is an error now."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        try:
            is_terminal = stat.S_ISCHR(os.fstat(stream).st_mode)
        except OSError:
            continue
        if is_terminal:
            os.dup2(nowhere, stream)
    os.close(nowhere)
