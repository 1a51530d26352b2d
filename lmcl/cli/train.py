"""`lmcl train`: one run from a configuration, on one or several processes."""

from collections.abc import Callable
from pathlib import Path

import click


def config_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options by which a run is named: a file and changes to it."""
    file = click.option(
        "--config",
        "config_file",
        required=True,
        type=click.Path(path_type=Path),
        help="TOML file of the run, or a name of `lmcl show-config --list`.",
    )
    change = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one field; repeatable.",
    )
    return file(change(function))


@click.command()
@config_options
@click.option("--output", type=click.Path(path_type=Path), help="Run folder [runs/<config name>].")
@click.option("--resume", default="", metavar="auto|PATH", help="Go on from a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop.")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(
    config_file: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: str,
    dry_run: bool,
    no_progress: bool,
) -> None:
    """Train a student and its teacher, evaluate, and write the report.

    Several processes: accelerate launch --num_processes 2 -m lmcl train --config FILE
    """
    from lmcl.config import load_config
    from lmcl.training.launcher import end_with_launcher
    from lmcl.training.setup import fit, plan

    config = load_config(config_file, overrides)
    folder = output or Path("runs") / config_file.stem
    if dry_run:
        click.echo(plan(config, folder))
        return
    end_with_launcher()
    outcome = fit(config, folder, resume=resume, progress=not no_progress)
    if outcome.is_main:
        click.echo(outcome.summary())
