"""Blocks of one size that come and go cost page faults once, not every time."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from lmcl.utils.malloc import keep_freed_memory
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def come_and_go():
    for _ in range(20):
        torch.ones(20 << 20, dtype=torch.uint8)
come_and_go()
before = faults()
come_and_go()
print(faults() - before)
"""


def _faults(call: str, **environment: str) -> int:
    program = FAULTS.format(call=call)
    kept = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-c", program], env=kept, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    assert _faults("assert keep_freed_memory()") < 100
    # 20 blocks of 5,120 pages: without the call most of them are faulted in again.
    assert _faults("", MALLOC_MMAP_THRESHOLD_="1000000") > 10_000


@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_a_user_who_has_set_malloc_keeps_that(name: str) -> None:
    value = {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}.get(name, "2")
    assert _faults("assert not keep_freed_memory()", **{name: value}) >= 0
