"""Processes that end when the one that started them does, whatever ended that one.

A parent killed with `kill -9` cleans nothing up: its workers would go on writing, or sleep for
ever. `end_with_parent` is called first thing in a worker (as the initializer of a pool);
`command_ending_with_parent` wraps a command line, so that no code runs between fork and exec.

This file is also run by itself, with no more than the standard library (`main`).
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.5


def end_with_parent(signal_number: int = signal.SIGKILL) -> None:
    """Let the system end this process as soon as its parent has ended.

    On Linux the kernel does it, at once; elsewhere a thread looks twice a second. The kernel takes
    the end of the *thread* that started this process for its parent's end, so a pool is to be made
    by a thread that outlives it (a function that makes a pool and shuts it down does).

    Args:
        signal_number: How this process is ended on Linux; it may catch all but SIGKILL, to finish
            a file.
    """
    parent = os.getppid()
    asked = sys.platform == "linux" and _ask_kernel(signal_number)
    # It may have died before the kernel was asked.
    if _is_orphan(parent):
        os.kill(os.getpid(), signal_number)
    asked_by = multiprocessing.parent_process()
    by_server = asked_by is not None and asked_by.pid != parent
    # A fork server lives as long as any of its children.
    if by_server or not asked:
        threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()


def command_ending_with_parent(
    command: Sequence[str], signal_number: int = signal.SIGTERM
) -> list[str]:
    """A command line that runs `command` so that it gets a signal when this process has ended.

    The process stays the same one (exec), so its id, its exit status and its standard streams are
    those of `command`. What `command` starts itself is its own affair.

    Args:
        command: Program, found as usual, and arguments.
        signal_number: What it gets; SIGTERM lets a training write its checkpoint.
    """
    return [
        *(sys.executable, "-I", "-S", os.path.abspath(__file__)),
        *(str(os.getpid()), str(int(signal_number)), *command),
    ]


def main(arguments: Sequence[str]) -> None:
    """`PARENT SIGNAL PROGRAM ARGUMENTS...`: become PROGRAM, and end when PARENT does."""
    parent, signal_number, command = int(arguments[0]), int(arguments[1]), list(arguments[2:])
    if sys.platform == "linux":
        _ask_kernel(signal_number)
    if os.getppid() != parent:
        sys.exit(128 + signal_number)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"error: {command[0]!r} cannot be started: {error.strerror}\n")
        sys.exit(127 if isinstance(error, FileNotFoundError) else 126)


def _ask_kernel(signal_number: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_PDEATHSIG, int(signal_number), 0, 0, 0) == 0)


def _is_orphan(parent: int) -> bool:
    """Whether the parent has ended; a fork server stands between a process and who asked for it."""
    asked_by = multiprocessing.parent_process()
    return os.getppid() != parent or (asked_by is not None and not asked_by.is_alive())


def _watch(parent: int) -> None:
    while not _is_orphan(parent):
        time.sleep(_POLL_S)
    os._exit(128 + signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])


def usable_cores() -> int:
    """Cores this process may run on: fewer than the machine has in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
