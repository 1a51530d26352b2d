"""`lmcl eval`: predictions and figures of a run on a part or on another set."""

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="EXAMPLES: lmcl eval runs/livec --part val · lmcl eval runs/livec --set koniq10k · "
    "lmcl eval runs/livec --data data/koniq10k --protocol 70-10-20 · "
    "lmcl eval runs/livec --fit-on val"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "--set",
    "data",
    metavar="SET",
    help="Another packed set: folder, URL, or name of a folder beside the run's own set.",
)
@click.option(
    "--part",
    type=click.Choice(["test", "val", "train", "all"]),
    help="Part of the run's split, or all images of the set.  [default: test]",
)
@click.option("--split", metavar="NAME", help="The test part of another split of SET.")
@click.option(
    "--protocol",
    type=click.Choice(["whole", "70-10-20", "80-20", "official", "k-fold"]),
    default="whole",
    show_default=True,
    help="On another set: all its images at once, or the test parts of its splits, the mapping "
    "fitted on their train parts, medians over the splits.",
)
@click.option(
    "--fit-on",
    type=click.Choice(["test", "val", "train"]),
    help="Part of the split that PLCC's and RMSE's mapping is fitted on [the evaluated images "
    "themselves; with a --protocol of splits: train].",
)
@click.option(
    "--decode",
    type=click.Choice(["auto", "cpu", "gpu", "both"]),
    help="Decoder [the run's runtime.decode]; `both` shows what the GPU's changes in the scores.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(**options: Any) -> None:
    """Evaluate a run's model; predictions and figures are written into the run folder."""
    from lmcl.cli.run.eval import run

    run(**options)
