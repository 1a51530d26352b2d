"""`lmcl eval`: predictions and figures of a run on a part or on another set."""

from pathlib import Path
from typing import Any

import click


@click.command(
    epilog="EXAMPLES: lmcl eval runs/livec --part val · lmcl eval runs/livec --set koniq10k · "
    "lmcl eval runs/livec --data data/koniq10k --protocol 70-10-20 · "
    "lmcl eval runs/livec --fit-on val · "
    "lmcl eval starter --table labels.csv --images photos --score-range 1 5"
)
@click.argument("run", metavar="RUN|MODEL", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "--set",
    "data",
    metavar="SET",
    help="Another packed set: folder, URL, or name of a folder beside the run's own set.",
)
@click.option(
    "--table",
    metavar="FILE",
    help="Images and scores in a table, as of `lmcl-shard build table`, in place of a packed set; "
    "of any model: a run, a model folder, an exported file, starter.",
)
@click.option("--images", metavar="FOLDER", help="--table: folder its paths are relative to.")
@click.option("--score-range", type=(float, float), help="--table: ends of the scores' scale.")
@click.option("--lower-is-better", is_flag=True, help="--table: scores are differences.")
@click.option(
    "--extra-files",
    type=click.Choice(["error", "ignore"]),
    help="--table: images of the folder without a row.  [default: error]",
)
@click.option("--path-column", metavar="NAME", help="--table: column of the images' paths.")
@click.option("--score-column", metavar="NAME", help="--table: column of the scores.")
@click.option("--std-column", metavar="NAME", help="--table: column of deviations, or none.")
@click.option("--group-column", metavar="NAME", help="--table: column of groups, or none.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="--table: folder of the files  [the run; runs/eval-<table> of a model without one].",
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
@click.option("--batch-size", type=click.IntRange(1), help="Images at once.  [default: 32]")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(**options: Any) -> None:
    """Evaluate a model; predictions and figures are written into the run folder."""
    from lmcl.cli.run.eval import run, run_on_table

    names = ("images", "score_range", "lower_is_better", "extra_files", "output")
    columns = ("path_column", "score_column", "std_column", "group_column")
    of_table = {name: options.pop(name) for name in (*names, *columns)}
    table, model, no_progress = (options.pop(name) for name in ("table", "run", "no_progress"))
    others = of_table if table is None else options
    for name, value in others.items():
        if value not in (None, False, "whole"):
            where = "needs --table FILE" if table is None else "is for packed sets, not for --table"
            raise click.UsageError(f"--{name.replace('_', '-')} {where}")
    if table is None:
        options["batch_size"] = options["batch_size"] or 32
        run(run=model, no_progress=no_progress, **options)
    else:
        run_on_table(model, table, no_progress=no_progress, **of_table)
