"""Memory that is freed stays with the process: activations of one size come and go every step.

glibc gives blocks beyond a threshold back to the kernel at once, and the next step pays a page
fault for every 4 KB of them again: on a CPU a quarter of the time of a convolutional stem's
forward pass (docs/experiments.md, 2026-11-25).
"""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # malloc.h
_LARGEST = 32 << 20
"""Greatest threshold glibc takes. Larger blocks still go back, so one huge image leaves nothing."""
_KEPT = 1 << 30
_STEP = 64 << 20


def keep_freed_memory() -> bool:
    """Raise malloc's thresholds; returns whether it was done.

    Left alone are other C libraries and a process whose environment already says how malloc
    behaves (`MALLOC_*`, `GLIBC_TUNABLES`) or replaces it (`LD_PRELOAD`).
    """
    names = ("GLIBC_TUNABLES", "LD_PRELOAD")
    if any(name in names or name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    settings = ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _STEP))
    return all(mallopt(name, value) == 1 for name, value in settings)
