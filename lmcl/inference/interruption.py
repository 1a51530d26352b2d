"""Stop on signals: Ctrl-C, a scheduler's SIGTERM and a closed terminal's SIGHUP become one error.

What is done stays: rows are journalled and moves recorded as they happen, so it is enough to leave.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from lmcl.errors import LmclError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class InterruptedScoringError(LmclError):
    """The process was asked to stop; the exit code is 128 and the signal's number."""


@contextmanager
def stop_on_signals(way_on: str) -> Iterator[None]:
    """Raise `InterruptedScoringError` where the block is when a signal comes.

    Args:
        way_on: What was kept and how to go on, for the message.
    """
    terminals = [fd for fd in (1, 2) if os.isatty(fd)]

    def stop(signum: int, _frame: FrameType | None) -> None:
        # Leaving takes a moment; schedulers repeat themselves. A second Ctrl-C is a person's.
        for repeated in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(repeated, signal.SIG_IGN)
        if signum == signal.SIGHUP:
            _detach(terminals)
        raise InterruptedScoringError(
            f"stopped by {signal.Signals(signum).name}; {way_on}", exit_code=128 + signum
        )

    before = {}
    try:
        for signum in SIGNALS:
            # Under nohup SIGHUP is ignored, and shall be.
            if signal.getsignal(signum) != signal.SIG_IGN:
                before[signum] = signal.signal(signum, stop)
    except ValueError:
        # Not the main thread (a notebook, a server): signals are the owner's business.
        pass
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _detach(terminals: list[int]) -> None:
    """A terminal that is gone answers every write with an error: write nowhere instead."""
    gone = [fd for fd in terminals if not os.isatty(fd)]
    if not gone:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for fd in gone:
        os.dup2(nowhere, fd)
    os.close(nowhere)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
