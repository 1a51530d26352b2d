"""`lmcl train`: one run from a configuration, on one or several processes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import click


def config_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options by which a run is named: a file and changes to it."""
    file = click.option(
        "--config",
        "config_file",
        default="mine",
        show_default=True,
        type=click.Path(path_type=Path),
        help="TOML file of the run, or a name of `lmcl show-config --list`; mine goes on from the "
        "starter model with your own images.",
    )
    change = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Change one field; repeatable.",
    )
    return file(change(function))


def printed(text: str) -> str:
    """Text as the terminal can show it: one of Latin-1 knows no block characters."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _words(
    config: Path, overrides: tuple[str, ...], output: Path, resume: str, no_progress: bool
) -> list[str]:
    """The command line of one rank of several."""
    words = ["train", "--config", str(config), "--output", str(output)]
    words += [word for change in overrides for word in ("--set", change)]
    words += ["--resume", resume] if resume else []
    return words + ["--no-progress"] * no_progress


@click.command()
@config_options
@click.option("--output", type=click.Path(path_type=Path), help="Run folder [runs/<config name>].")
@click.option("--resume", default="", metavar="auto|PATH", help="Go on from a checkpoint.")
@click.option("--dry-run", is_flag=True, help="Check what a start checks, print the plan, stop.")
@click.option(
    "--processes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks on this machine, which meet on a free port.",
)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(
    config_file: Path,
    overrides: tuple[str, ...],
    output: Path | None,
    resume: str,
    dry_run: bool,
    processes: int,
    no_progress: bool,
) -> None:
    """Train a student and its teacher, evaluate, and write the report.

    Several processes: --processes 2, or a launcher: accelerate launch --num_processes 2 -m lmcl
    train --config FILE, torchrun --standalone --nproc_per_node 2 train.py --config FILE.
    """
    from lmcl.config import load_config
    from lmcl.training.launcher import end_with_launcher, start_ranks
    from lmcl.training.setup import fit, plan

    config = load_config(config_file, overrides)
    folder = output or Path("runs") / config_file.stem
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            click.echo(printed(plan(config, folder, resume=resume, processes=processes)))
        return
    start_ranks(processes, _words(config_file, overrides, folder, resume, no_progress))
    end_with_launcher()
    outcome = fit(config, folder, resume=resume, progress=not no_progress)
    if outcome.is_main:
        click.echo(outcome.summary())
