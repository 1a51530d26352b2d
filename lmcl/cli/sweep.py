"""`lmcl sweep`: the same configuration over splits or seeds, or several of them side by side."""

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


@click.command(
    epilog="EXAMPLES: lmcl sweep configs/paper/livec.toml --over splits · "
    "lmcl sweep configs/ablations/ladder --over seeds --count 5 · "
    "lmcl sweep configs/paper/tid2013.toml --over splits --launcher slurm "
    "--sbatch '--gres=gpu:1 --time=12:00:00' --submit"
)
@click.argument(
    "configs", nargs=-1, required=True, metavar="CONFIG...", type=click.Path(path_type=Path)
)
@click.option(
    "--over",
    type=click.Choice(["splits", "seeds"]),
    default="splits",
    show_default=True,
    help="What the runs of a configuration differ in.",
)
@click.option("--count", type=click.IntRange(1), help="How many [all splits; 5 seeds].")
@click.option("--output", type=click.Path(path_type=Path), help="Folder [runs/<name>-<over>].")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="In every run.")
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm", "ray"]),
    default="local",
    show_default=True,
    help="One after the other here; a batch job each; a Ray task each.",
)
@click.option("--submit", "is_submitted", is_flag=True, help="slurm: hand the jobs to sbatch.")
@click.option("--sbatch", default="", metavar="OPTIONS", help="slurm: further #SBATCH options.")
@click.option("--cpus", default=1.0, show_default=True, help="ray: cores a run takes.")
@click.option("--gpus", default=0.0, show_default=True, help="ray: GPUs a run takes.")
@click.option(
    "--with",
    "trainer",
    default="",
    metavar="COMMAND",
    help="In place of `lmcl train`, e.g. 'accelerate launch --num_processes 4 train.py'.",
)
@click.option("--collect", is_flag=True, help="Start nothing; sum up what is finished.")
@click.option("--dry-run", is_flag=True, help="List the runs and stop.")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(
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
    """Run configurations over splits or seeds, and sum up: median, mean, intervals, paired tests.

    CONFIG is a file, or a folder of files that are compared in the order of their names. Finished
    runs are kept, others go on where they stopped; a failing one is named and hides no other.
    """
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
