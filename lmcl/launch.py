"""Several processes on a machine without a GPU, as `accelerate launch --num_processes N` asks.

Accelerate's launcher starts its workers for GPUs and MPI only: on a plain CPU it sets an address
for several processes and starts one, which would then train alone without a word. That process
turns itself into torch's launcher here (docs/decisions/0005-processes-on-a-cpu.md).
"""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmcl.errors import ConfigError

_COUNT = re.compile(r"--num[_-]processes(?:=(\d+))?$")


def join_launcher(target: Sequence[str], arguments: Sequence[str]) -> None:
    """Replace this process by as many as were asked for; returns if it is not alone by mistake.

    Args:
        target: What each process runs: a script, or `--module` and its name.
        arguments: What it is given.

    Raises:
        ConfigError: If several were asked for and the number cannot be found out.
    """
    if not started_alone(os.environ):
        return
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    words = parent.read_bytes().decode().split("\0") if parent.exists() else []
    count = asked_processes(words)
    if count is None:
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does "
            "without GPUs; name the number on the command line: "
            "accelerate launch --num_processes 2 train.py ..."
        )
    sys.stdout.flush()
    # torch's launcher would die of SLURM's warning and leave its workers behind.
    signals = ["--signals_to_handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
    address = ["--master_addr", os.environ["MASTER_ADDR"], "--master_port"]
    os.execv(
        sys.executable,
        [
            *[sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)],
            *[*signals, *address, os.environ["MASTER_PORT"], *target, *arguments],
        ],
    )


def started_alone(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate prepared for several processes, but no launcher gave this one a rank."""
    prepared = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return prepared and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(environment)


def asked_processes(words: Sequence[str]) -> int | None:
    """The number after `--num_processes` in a command line, if it is there."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        found = _COUNT.match(word)
        if found and (found[1] or following.isdigit()):
            return int(found[1] or following)
    return None
