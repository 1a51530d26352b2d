"""Several processes on a machine without a GPU, as `accelerate launch --num_processes N` asks.

Accelerate's launcher starts its workers for GPUs and MPI only: on a plain CPU it sets an address
for several processes and starts one, which would then train alone without a word. That process
turns itself into torch's launcher here (docs/decisions/0005-processes-on-a-cpu.md).
"""

import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lmcl.errors import ConfigError
from shards.processes import end_with_parent

_PATIENCE_S = 3600
"""How long ranks that were asked to stop may take to end their step or their look and to write the
checkpoint; torch's launcher kills them after 30 seconds."""
_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""What the launcher passes on; it would die of SLURM's warning and leave its workers behind."""

LAUNCHER_ENVIRONMENT = {
    "PET_SIGNALS_TO_HANDLE": _SIGNALS,
    "PET_SHUTDOWN_TIMEOUT": str(_PATIENCE_S),
}
"""The same for a launcher of torch's or Accelerate's that is started otherwise."""


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
    sys.stdout.flush()
    launcher = launcher_command(words, os.environ)
    # Asked before it is replaced, as the system remembers: torch's launcher is to end with
    # Accelerate's, which may be killed, and its ranks with it.
    end_with_parent(signal.SIGTERM)
    os.execv(sys.executable, [*launcher, *target, *arguments])


def end_with_launcher() -> None:
    """Let a rank end when the launcher that started it has, whatever ended that one.

    It gets SIGTERM, which lets a training write its checkpoint and a scoring keep its rows. A
    process that no launcher started stays as it is.
    """
    if "LOCAL_RANK" in os.environ:
        end_with_parent(signal.SIGTERM)


def launcher_command(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Torch's launcher with the processes and the machines that `accelerate launch` was asked for.

    Args:
        words: The command line of `accelerate launch`.
        environment: Holds the address that it prepared.

    Raises:
        ConfigError: If a number does not stand there, or the machines cannot share the processes.
    """
    processes, machines = asked(words, "num_processes"), asked(words, "num_machines") or 1
    rank = asked(words, "machine_rank") if machines > 1 else 0
    if processes is None or rank is None:
        missing = "--num_processes" if processes is None else "--machine_rank"
        example = (
            "--num_processes 2"
            if machines == 1
            else (f"--num_processes {2 * machines} --num_machines {machines} --machine_rank 0")
        )
        raise ConfigError(
            "accelerate launch was asked for several processes and started one, as it does "
            f"without GPUs; name {missing} on the command line: "
            f"accelerate launch {example} train.py ..., or call torchrun yourself"
        )
    if processes % machines:
        raise ConfigError(
            f"accelerate launch was asked for {processes} processes on {machines} machines, which "
            "cannot share them evenly; --num_processes counts those of all machines"
        )
    return [
        *[sys.executable, "-m", "torch.distributed.run"],
        *["--nproc_per_node", str(processes // machines)],
        *["--nnodes", str(machines), "--node_rank", str(rank)],
        *["--signals_to_handle", _SIGNALS, "--shutdown_timeout", str(_PATIENCE_S)],
        *["--master_addr", environment["MASTER_ADDR"]],
        *["--master_port", environment["MASTER_PORT"]],
    ]


def started_alone(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate prepared for several processes, but no launcher gave this one a rank."""
    prepared = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return prepared and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(environment)


def asked(words: Sequence[str], option: str) -> int | None:
    """The number after an option, spelled with `_` or `-`, in a command line, if it is there."""
    spelled = re.compile(f"--{option.replace('_', '[_-]')}(?:=(\\d+))?$")
    for word, following in zip(words, [*words[1:], ""], strict=True):
        found = spelled.match(word)
        if found and (found[1] or following.isdigit()):
            return int(found[1] or following)
    return None
