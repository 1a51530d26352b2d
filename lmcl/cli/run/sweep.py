"""The work of `lmcl sweep`: plan, start, sum up."""

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import click

from lmcl.errors import LmclError
from lmcl.sweep.launch import (
    WAY_ON,
    Failure,
    Job,
    make_jobs,
    run_here,
    run_on_ray,
    submit,
    write_slurm_scripts,
)
from lmcl.sweep.plan import Over, plan_tasks
from lmcl.sweep.summary import Summary, summarise, table
from lmcl.training.signals import stop_on_signals
from lmcl.utils.files import make_output_folder, write_atomic


def run(
    *,
    configs: tuple[Path, ...],
    over: str,
    count: int | None,
    output: Path | None,
    overrides: tuple[str, ...],
    launcher: str,
    is_submitted: bool,
    sbatch: str,
    cpus: float,
    gpus: float,
    trainer: str,
    collect: bool,
    dry_run: bool,
    no_progress: bool,
) -> None:
    """Run what is left of a sweep and sum it up."""
    kind = cast(Over, over)
    folder = output or Path("runs") / f"{'-'.join(path.stem for path in configs)[:80]}-{over}"
    tasks = plan_tasks(configs, kind, count=count, overrides=overrides, output=folder)
    if dry_run:
        for task in tasks:
            click.echo(f"{task.name}: {'finished' if task.is_finished else 'to run'}")
        return
    make_output_folder(folder)
    left = [task for task in tasks if not task.is_finished and not collect]
    jobs = make_jobs(left, folder / "jobs", trainer, progress=not no_progress)
    if launcher == "slurm" and jobs:
        scripts = write_slurm_scripts(jobs, folder / "jobs", shlex.split(sbatch))
        click.echo("\n".join(submit(scripts) if is_submitted else [f"sbatch {s}" for s in scripts]))
        click.echo("when the jobs are done, the same command with --collect sums up", err=True)
        return
    failures: list[Failure] = []
    with stop_on_signals(WAY_ON) as stop:
        try:
            # One by one: a sweep that is interrupted still names those that failed before.
            for failure in _run(jobs, launcher, cpus=cpus, gpus=gpus):
                failures.append(failure)
        finally:
            # A closed terminal tells a job twice, a scheduler too.
            with stop.deferred():
                summary = summarise(tasks, kind, failures)
                write_atomic(folder / "summary.json", summary.to_json())
                click.echo(table(summary))
    _finish(summary, folder)


def _run(jobs: Sequence[Job], launcher: str, *, cpus: float, gpus: float) -> Iterator[Failure]:
    if launcher == "ray" and jobs:
        return run_on_ray(jobs, cpus=cpus, gpus=gpus)
    return run_here(jobs)


def _finish(summary: Summary, folder: Path) -> None:
    pages = " ".join(f"{folder / model.name}/*" for model in summary.models if model.runs)
    if pages:
        click.echo(f"summary: {folder / 'summary.json'}; pages: lmcl report {pages}")
    if summary.failures:
        names = ", ".join(failure.name for failure in summary.failures)
        raise LmclError(
            f"{len(summary.failures)} runs failed: {names}; the same command tries them again"
        )
    if summary.unfinished:
        raise LmclError(f"{len(summary.unfinished)} runs are not finished; see the list above")
