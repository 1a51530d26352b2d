"""`lmcl sweep`: the same configuration over splits or seeds, or several of them side by side."""

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="EXAMPLES: lmcl sweep paper/livec --over splits · "
    "lmcl sweep ablations/ladder --over seeds --count 5 · "
    "lmcl sweep paper/tid2013 --over splits --launcher slurm "
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
def command(**options: Any) -> None:
    """Run configurations over splits or seeds, and sum up: median, mean, intervals, paired tests.

    CONFIG is a file, or a folder of files that are compared in the order of their names. Finished
    runs are kept, others go on where they stopped; a failing one is named and hides no other.
    """
    from lmcl.cli.run.sweep import run

    run(**options)
