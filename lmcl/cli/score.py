"""`lmcl score`: score images and collections, and filter them by quality."""

from pathlib import Path
from typing import Any

import click


def _unit(_context: click.Context, _option: click.Parameter, below: float | None) -> float | None:
    # click's own range lets NaN through, and does not say that the model's scale is not meant.
    if below is None or 0 <= below <= 1:
        return below
    raise click.BadParameter(
        f"{below:g} is not in 0..1: it is a quality, higher = better, whatever the model's scale "
        "(3 on a scale from 1 to 5 is 0.5)"
    )


@click.command(
    epilog="EXAMPLES: lmcl score photos --output scores.csv · "
    "lmcl score photos --model runs/x/model --resume · "
    "lmcl score photos --model runs/x --below 0.3 --move-to rejected --dry-run · "
    "lmcl score photos --model runs/x --crops adaptive --describe · "
    "accelerate launch -m lmcl score shards --model runs/x --output scores.parquet"
)
@click.argument("paths", nargs=-1, metavar="PATH...")
@click.option(
    "--model",
    "model",
    default="starter",
    show_default=True,
    metavar="MODEL",
    help="Model folder, a run that holds one, a file of `lmcl export --format onnx`, or "
    "hf://USER/NAME[@REVISION] on a hub; starter comes with the project.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("scores.csv"),
    show_default=True,
    help="Scores file: .csv, .jsonl or .parquet; - writes CSV to the standard output.",
)
@click.option(
    "--scale",
    default="",
    metavar="SET",
    help="Answer in the scale of SET, one of several sets the model learned from [the shared one].",
)
@click.option("--path-column", metavar="NAME", help="Column of a table's paths. [usual names]")
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Folder a table's paths are relative to. [the table's own]",
)
@click.option("--resume", is_flag=True, help="Keep rows that are there; try failed ones again.")
@click.option(
    "--min-side",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Score no image with a shorter side, in pixels; its row says so.",
)
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Score these files only: '*.jpg'."
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave these files or folders out."
)
@click.option("--boxes", is_flag=True, help="Add the salient crop as y, x, h, w.")
@click.option("--crop-scores", is_flag=True, help="Add the score of every crop.")
@click.option(
    "--confidence",
    type=float,
    help="Of the interval in the columns lower and upper [0.9, where the model is calibrated].",
)
@click.option(
    "--population",
    type=click.Path(path_type=Path),
    help="Scores file of this model to take percentiles in [the model's training images].",
)
@click.option(
    "--crops",
    type=click.Choice(["all", "adaptive"]),
    default="all",
    show_default=True,
    help="adaptive: as few crops of each image as keep the order.",
)
@click.option("--describe", is_flag=True, help="Print tenths of the scores with sample images.")
@click.option(
    "--keep",
    metavar="RULE",
    help="Name what a rule of `lmcl threshold` rejects, as --below with its cut.",
)
@click.option(
    "--below",
    type=float,
    callback=_unit,
    help="Quality in 0..1, higher = better, not the model's scale: name what is below.",
)
@click.option(
    "--move-to",
    type=click.Path(path_type=Path),
    help="Move what is below there; what lies there is not scored.",
)
@click.option("--dry-run", is_flag=True, help="With --move-to: say what would move, move nothing.")
@click.option(
    "--undo",
    type=click.Path(path_type=Path),
    metavar="MOVES.CSV",
    help="Put back what --move-to has moved; scores nothing.",
)
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet (.html).")
@click.option(
    "--engine",
    type=click.Choice(["auto", "onnx", "torch"]),
    default="auto",
    show_default=True,
    help="auto: onnxruntime where --model is, or has beside it, a file of `lmcl export` and the "
    "device is a processor; else PyTorch.",
)
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16", "auto", "int8"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--decode",
    type=click.Choice(["auto", "cpu", "gpu"]),
    default="auto",
    show_default=True,
    help="Who decodes; auto: the GPU where --device is one. Its pixels differ a little.",
)
@click.option("--threads", type=click.IntRange(1), help="Decoding threads [cores, at most 4].")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(**options: Any) -> None:
    """Score images: files, folders, patterns, tables, tars, shard sets, or - for paths on stdin.

    Exit code 3 if any image could not be scored; its row says why.
    """
    from lmcl.cli.run.score import run

    run(**options)
