"""Several processes on a machine without a GPU, as `accelerate launch --num_processes N` asks.

Accelerate's launcher starts its workers for GPUs and MPI only: on a plain CPU it sets an address
for several processes and starts one, which would then train alone without a word. That process
turns itself into torch's launcher here (docs/decisions/0005-processes-on-a-cpu.md).
"""

import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from lmcl.errors import ConfigError
from shards.processes import end_with_parent

_PORTS = 1 << 16
_PATIENCE_S = 3600
"""How long ranks that were asked to stop may take to end their step or their look and to write the
checkpoint; torch's launcher kills them after 30 seconds."""
_LAUNCHER = "lmcl.training.torch_launcher"
_OTHER_ENGINES = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG")
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
    words = parents_command()
    refuse_ignored(words, os.environ)
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
    settings = _config_file(words)
    processes, machines = (
        _asked_or_set(words, settings, "num_processes"),
        _asked_or_set(words, settings, "num_machines") or 1,
    )
    rank = _asked_or_set(words, settings, "machine_rank") if machines > 1 else 0
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
    if machines == 1:
        port = _asked_or_set(words, settings, "main_process_port") or 0
        return ranks_command(processes, port=port)
    return [
        *[sys.executable, "-m", _LAUNCHER],
        *["--nproc_per_node", str(processes // machines)],
        *["--nnodes", str(machines), "--node_rank", str(rank)],
        *["--signals_to_handle", _SIGNALS, "--shutdown_timeout", str(_PATIENCE_S)],
        *["--master_addr", environment["MASTER_ADDR"]],
        *["--master_port", environment["MASTER_PORT"]],
    ]


def ranks_command(processes: int, *, port: int = 0) -> list[str]:
    """Torch's launcher for so many processes of this machine.

    Args:
        processes: How many.
        port: Where they meet; 0: one that is free, so that two runs on a machine do not collide.

    Raises:
        ConfigError: If another program has that port, or there is none of that number.
    """
    meet = ["--standalone"]
    if port:
        _check_free(port)
        meet = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [
        *[sys.executable, "-m", _LAUNCHER, "--nproc_per_node", str(processes), *meet],
        *["--signals_to_handle", _SIGNALS, "--shutdown_timeout", str(_PATIENCE_S)],
    ]


def start_ranks(processes: int, arguments: Sequence[str]) -> None:
    """Replace this process by `processes` of `lmcl ARGUMENTS`; returns in one of these, or for one.

    Args:
        processes: How many, on this machine.
        arguments: Of the command line, the program's name left out.
    """
    if processes < 2 or "RANK" in os.environ:
        return
    sys.stdout.flush()
    os.execv(sys.executable, [*ranks_command(processes), "--module", "lmcl", *arguments])


def _check_free(port: int) -> None:
    if not 0 < port < _PORTS:
        raise ConfigError(
            f"--main_process_port {port} is no port; leave it out and a free one is taken, or name "
            f"one from 1 to {_PORTS - 1}"
        )
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"port {port}, by which the processes of a run find each other, is taken by "
                f"another program ({error.strerror}); leave --main_process_port out and a free "
                "one is taken, or name another"
            ) from error


def parents_command() -> list[str]:
    """The command line of the process that started this one; empty where it cannot be read."""
    try:
        text = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.split("\0")


def refuse_ignored(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Contradict what a launcher was asked for and a run would pass over.

    Args:
        words: Command line of the parent, which may be a launcher.
        environment: Holds what Accelerate's launcher was asked for, or what its file says.

    Raises:
        ConfigError: Names the option and the field that does it here.
    """
    steps = asked(words, "gradient_accumulation_steps") or 1
    said = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "")
    steps = max(steps, int(said) if said.isdigit() else 1)  # DeepSpeed's files may say "auto"
    if steps > 1:
        raise ConfigError(
            f"accelerate launch was asked for gradient_accumulation_steps = {steps}, which would "
            "leave the contrastive term fewer images to compare; raise train.batch_size, and set "
            "runtime.micro_batch to see that batch in parts with the exact gradient"
        )
    engines = [
        name for name in _OTHER_ENGINES if environment.get(f"ACCELERATE_USE_{name}") == "true"
    ]
    if engines:
        raise ConfigError(
            f"accelerate launch was asked for {engines[0]}, which spreads a model over processes; "
            "here every process holds the whole model: leave it out (accelerate config writes it "
            "down), and save memory by runtime.micro_batch or runtime.gradient_checkpointing"
        )


def _config_file(words: Sequence[str]) -> Mapping[str, object]:
    """What the file says that `accelerate config` wrote, where the launcher would read it."""
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file

    named = [after for word, after in pairwise(words) if word == "--config_file"]
    path = named[0] if named else default_config_file
    if not Path(path).is_file():
        return {}
    found: Mapping[str, object] = vars(load_config_from_file(path))
    return found


def _asked_or_set(words: Sequence[str], settings: Mapping[str, object], option: str) -> int | None:
    found, value = asked(words, option), settings.get(option)
    return found if found is not None else value if isinstance(value, int) else None


def started_alone(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate prepared for several processes, but no launcher gave this one a rank."""
    prepared = "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_ADDR" in environment
    return prepared and not {"RANK", "LOCAL_RANK", "WORLD_SIZE"} & set(environment)


def asked(words: Sequence[str], option: str) -> int | None:
    """The number after an option, spelled with `_` or `-`, in a command line, if it is there."""
    spelled = re.compile(f"--{option.replace('_', '[_-]')}(?:=(\\d+))?$")
    for word, following in pairwise([*words, ""]):
        found = spelled.match(word)
        if found and (found[1] or following.isdigit()):
            return int(found[1] or following)
    return None
