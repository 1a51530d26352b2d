"""How a sweep's runs are started: one after the other here, or one job each on SLURM or Ray.

Every way starts the same command line, so a run does not know that it belongs to a sweep, and one
that dies takes no other with it.
"""

import logging
import os
import re
import shlex
import shutil
import subprocess
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcl.config import dump_config
from lmcl.errors import LmclError
from lmcl.sweep.plan import Task
from lmcl.training.launcher import LAUNCHER_ENVIRONMENT
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import WAY_ON as RUN_WAY_ON
from lmcl.training.signals import InterruptedRunError, StopSignal, stop_on_signals
from lmcl.utils.files import write_atomic
from shards.processes import command_ending_with_parent
from shards.text import printable

logger = logging.getLogger(__name__)

_INTERRUPTED = 130
WAY_ON = "finished runs and checkpoints stand, and the same command goes on from here"
"""For whoever stops a sweep."""
_SAME_COMMAND = "the same `lmcl sweep` command"
_SBATCH_WORD = re.compile(r"[^\s%\\\"'#]+", re.ASCII)
"""What stands in a line of `#SBATCH` as it is: sbatch splits at spaces and fills in after %."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A run that did not come to its end."""

    name: str
    exit_code: int
    last_words: str
    """Last line it wrote to stderr; empty where its output went to the terminal."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A task and the command line that runs it."""

    task: Task
    command: tuple[str, ...]


def make_jobs(tasks: Sequence[Task], folder: Path, trainer: str, *, progress: bool) -> list[Job]:
    """Write each task's whole configuration into `folder` and say which command runs it.

    A sweep takes hours, and a queued job starts days later: were the files read then, somebody's
    change to one of them would make half of the runs another experiment.
    """
    jobs = []
    for task in tasks:
        path = folder / f"{task.name.replace('/', '-')}.toml"
        write_atomic(path, dump_config(task.config))
        jobs.append(Job(task=task, command=tuple(task.command(trainer, path, progress=progress))))
    return jobs


def run_here(jobs: Sequence[Job]) -> Iterator[Failure]:
    """Run one job after the other in processes of their own; failures as they happen.

    Raises:
        InterruptedRunError: If this process or a run was asked to stop; the run's checkpoint is
            written, and the same sweep goes on from there.
        LmclError: If there is no such program.
    """
    with stop_on_signals(WAY_ON) as stop:
        for number, job in enumerate(jobs):
            logger.info("run %d of %d: %s", number + 1, len(jobs), job.task.name)
            mark = RunDir(job.task.folder).interrupted
            mark.unlink(missing_ok=True)
            code = _run(job.command, stop)
            # A launcher of several processes has an exit code of its own.
            if code == _INTERRUPTED or (code and mark.exists()):
                raise InterruptedRunError(
                    f"{job.task.name}: stopped as asked, with {len(jobs) - number - 1} runs to "
                    "come; the same command goes on from here"
                )
            if code:
                logger.error("%s failed with exit code %d; going on", job.task.name, code)
                yield Failure(name=job.task.name, exit_code=code, last_words="")


def write_slurm_scripts(jobs: Sequence[Job], folder: Path, options: Sequence[str]) -> list[Path]:
    """One batch script a job.

    A job is warned two minutes before its time is over, writes a checkpoint and puts itself back
    into the queue; it does the same when it is pre-empted. It knows by exit code 130, or, as a
    launcher of several processes has an exit code of its own, by the mark in the run's folder.

    Args:
        jobs: What to run.
        folder: Where scripts and logs go.
        options: Further `#SBATCH` options, e.g. `--time=12:00:00`.

    Raises:
        LmclError: If the folder or an option would be read as something else in a `#SBATCH` line.
    """
    _check_sbatch(folder.absolute(), options)
    folder.mkdir(parents=True, exist_ok=True)
    scripts = []
    for job in jobs:
        name = job.task.name.replace("/", "-")
        path = folder / f"{name}.sbatch"
        mark = shlex.quote(str(RunDir(job.task.folder).interrupted))
        lines = [
            "#!/bin/bash",
            f"#SBATCH --job-name=lmcl-{name}",
            f"#SBATCH --output={folder.absolute()}/{name}-%j.log",
            "#SBATCH --open-mode=append",
            "#SBATCH --requeue",
            "#SBATCH --signal=USR1@120",
            *(f"#SBATCH {_quoted(option)}" for option in options),
            f"cd {shlex.quote(str(Path.cwd()))} || exit 1",
            *(f"export {name}={value}" for name, value in LAUNCHER_ENVIRONMENT.items()),
            f"export {RUN_WAY_ON}={shlex.quote(_SAME_COMMAND)}",
            # One of an earlier start would put a job that fails back into the queue for ever.
            f"rm -f {mark}",
            # Signals go to job steps, not to this script: without srun nobody would hear them.
            f"srun {shlex.join(job.command)}",
            "code=$?",
            f'if [ "$code" -eq {_INTERRUPTED} ] || {{ [ "$code" -ne 0 ] && [ -e {mark} ]; }}; then',
            '    scontrol requeue "$SLURM_JOB_ID"',
            "fi",
            'exit "$code"',
        ]
        write_atomic(path, "\n".join(lines) + "\n")
        scripts.append(path)
    return scripts


def submit(scripts: Sequence[Path]) -> list[str]:
    """Hand batch scripts to SLURM; what sbatch said of each.

    Raises:
        LmclError: If there is no sbatch here (exit code 4), or it refuses a script; those before
            it are submitted.
    """
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise LmclError(
            "--submit: there is no `sbatch` on this machine; call the command on a login node, or "
            f"submit the scripts in {scripts[0].parent} from there",
            exit_code=4,
        )
    said: list[str] = []
    for path in scripts:
        done = subprocess.run([sbatch, str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LmclError(
                f"sbatch refused {path} ({done.stderr.strip()}); {len(said)} jobs before it are "
                "submitted. Correct --sbatch and call the same command again: queued runs wait for "
                "each other's folder, so cancel them first"
            )
        said.append(done.stdout.strip())
    return said


def run_on_ray(jobs: Sequence[Job], *, cpus: float, gpus: float) -> Iterator[Failure]:
    """One Ray task a job, as many at a time as the cluster has room for; failures as they happen.

    Data, configurations and the sweep's folder must lie where every node sees them.

    Args:
        jobs: What to run.
        cpus: Cores a run takes.
        gpus: GPUs a run takes; may be a fraction.

    Raises:
        LmclError: If Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise LmclError(
            "--launcher ray needs the package ray; install it with `pip install lmcl[ray]`, or "
            "leave --launcher out"
        ) from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    # A run that was lost with its node is started again, and resumes.
    remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_run_and_listen)
    waiting: dict[Any, Job] = {remote.remote(job.command, os.getcwd()): job for job in jobs}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            job = waiting.pop(done)
            code, last_words = _answer(ray, done)
            if code:
                logger.error("%s failed with exit code %d: %s", job.task.name, code, last_words)
                yield Failure(name=job.task.name, exit_code=code, last_words=last_words)
            else:
                logger.info("%s is finished, %d to go", job.task.name, len(waiting))
    finally:
        for left in waiting:
            ray.cancel(left)


def _check_sbatch(folder: Path, options: Sequence[str]) -> None:
    if not _SBATCH_WORD.fullmatch(str(folder)):
        raise LmclError(
            f"{printable(folder)}: a line of #SBATCH ends a path at a space, and % and quotes mean "
            "something there; choose an --output without them",
            exit_code=2,
        )
    for option in options:
        if not option.isprintable():
            raise LmclError(
                f"--sbatch: {printable(option)!r} has a line break or another sign that cannot "
                "stand in a line of #SBATCH; leave it out",
                exit_code=2,
            )


def _quoted(option: str) -> str:
    # sbatch takes quotes as a shell does; what worked without them stays without them.
    return shlex.quote(option) if " " in option else option


def _run(command: Sequence[str], stop: StopSignal) -> int:
    """Exit code of a command that shares this terminal; it is ended if this process is."""
    if shutil.which(command[0]) is None:
        raise LmclError(
            f"{printable(command[0])}: cannot be started: there is no such program; name another "
            "--with"
        )
    # Asked to stop like this process, should this one be killed.
    process = subprocess.Popen(command_ending_with_parent(command), env=_environment())
    try:
        return process.wait()
    except BaseException:
        # Its own checkpoint is worth waiting for, whatever a scheduler repeats meanwhile.
        with stop.deferred():
            process.terminate()
            process.wait()
        raise


def _run_and_listen(command: Sequence[str], folder: str) -> tuple[int, str]:
    """Exit code and last words of a command; runs on a node of a cluster."""
    with subprocess.Popen(
        command_ending_with_parent(command),
        cwd=folder,
        env=_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        lines: deque[str] = deque(maxlen=1)
        for line in process.stderr or ():
            if line.strip():
                lines.append(line.strip())
        return process.wait(), "".join(lines)


def _environment() -> dict[str, str]:
    """This process's, with what a run that is stopped is to advise."""
    return {**os.environ, RUN_WAY_ON: _SAME_COMMAND}


def _answer(ray: Any, reference: Any) -> tuple[int, str]:
    try:
        code, words = ray.get(reference)
    except ray.exceptions.RayError as error:
        return 1, str(error).splitlines()[0]
    return int(code), str(words)
