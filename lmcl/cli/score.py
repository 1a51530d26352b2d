"""`lmcl score`: score images and collections, and filter them by quality."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from lmcl.inference.batch_job import ScoringOptions, list_on_all_ranks, score_items
from lmcl.inference.filter import Move, carry_out, plan_moves, write_sheet
from lmcl.inference.inputs import Item, list_items, text_of_name
from lmcl.inference.scorer import Precision, Scorer, open_scorer
from lmcl.inference.scores_file import Row, note_path, read_rows

_FAILED = 3


def _unit(_context: click.Context, _option: click.Parameter, below: float | None) -> float | None:
    # click's own range lets NaN through, and does not say that the model's scale is not meant.
    if below is None or 0 <= below <= 1:
        return below
    raise click.BadParameter(
        f"{below:g} is not in 0..1: it is a quality, higher = better, whatever the model's scale "
        "(3 on a scale from 1 to 5 is 0.5)"
    )


@click.command(
    epilog="EXAMPLES: lmcl score photos --model runs/x/model --output scores.csv · "
    "lmcl score photos --model runs/x --below 0.3 --move-to rejected --dry-run · "
    "accelerate launch -m lmcl score shards --model runs/x --output scores.parquet"
)
@click.argument("paths", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--model",
    "model_folder",
    required=True,
    type=click.Path(path_type=Path),
    help="Model folder, or a run that holds one.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("scores.csv"),
    show_default=True,
    help="Scores file: .csv, .jsonl or .parquet.",
)
@click.option("--resume", is_flag=True, help="Keep rows that are there; try failed ones again.")
@click.option("--boxes", is_flag=True, help="Add the salient crop as y, x, h, w.")
@click.option("--crop-scores", is_flag=True, help="Add the score of every crop.")
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
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet (.html).")
@click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, ...")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="bfloat16 is faster and moves scores by some thousandths of the range.",
)
@click.option("--threads", type=click.IntRange(1), help="Decoding threads [cores, at most 4].")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(
    paths: tuple[str, ...],
    model_folder: Path,
    output: Path,
    resume: bool,
    boxes: bool,
    crop_scores: bool,
    below: float | None,
    move_to: Path | None,
    dry_run: bool,
    sheet: Path | None,
    device: str,
    precision: Precision,
    threads: int | None,
    no_progress: bool,
) -> None:
    """Score images: files, folders, patterns, tables, tars, shard sets, or - for paths on stdin.

    Exit code 3 if any image could not be scored; its row says why.
    """
    if (move_to is None) != (below is None) and (move_to is not None or dry_run):
        raise click.UsageError("--move-to and --dry-run need --below, the quality to sort out by")
    scorer = open_scorer(model_folder, device=_device(device), precision=precision)
    written = [output, note_path(output), *(place for place in (sheet, move_to) if place)]
    items = list_on_all_ranks(
        scorer, lambda: list_items(paths, stdin=_stdin_lines(), left_out=written)
    )
    options = ScoringOptions(
        output=output,
        box=boxes,
        crops=crop_scores,
        resume=resume,
        threads=threads or min(4, len(os.sched_getaffinity(0))),
        progress=not no_progress,
    )
    summary = score_items(scorer, items, options)
    if int(os.environ.get("RANK", "0")) == 0:
        better = "higher" if scorer.scale.higher_is_better else "lower"
        click.echo(
            f"{output}: {summary.rows} rows ({summary.failed} failed, {summary.reused} kept), "
            f"scale {scorer.scale_label}, {better} is better"
        )
        _after(items, scorer, output, below=below, move_to=move_to, dry_run=dry_run, sheet=sheet)
    if summary.failed:
        sys.exit(_FAILED)


def _stdin_lines() -> Iterator[str]:
    """Names as the system has them: they need not be UTF-8."""
    # There is no stdin at all where a scheduler has closed it.
    for line in sys.stdin.buffer if sys.stdin else ():
        yield os.fsdecode(line)


def _after(
    items: list[Item],
    scorer: Scorer,
    output: Path,
    *,
    below: float | None,
    move_to: Path | None,
    dry_run: bool,
    sheet: Path | None,
) -> None:
    """Contact sheet first: it needs the images where they are."""
    if sheet is None and below is None:
        return
    rows = list(read_rows(output))
    if sheet is not None:
        count = write_sheet(rows, items, sheet, scale=scorer.scale_label)
        click.echo(f"{sheet}: {count} images, worst first")
    if below is None:
        return
    if move_to is None:
        _name_below(rows, below)
        return
    moves = plan_moves(rows, items, below=below, folder=move_to)
    for move in moves:
        click.echo(_line(move, dry_run))
    if not dry_run:
        carry_out(moves)
    verb = "would move" if dry_run else "moved"
    click.echo(f"{verb} {len(moves)} of {len(rows)} images below {below:g} to {move_to}")


def _name_below(rows: list[Row], below: float) -> None:
    bad = [row for row in rows if row.quality is not None and row.quality < below]
    for row in bad:
        click.echo(f"{row.quality:.3f} {row.path}")
    click.echo(f"{len(bad)} of {len(rows)} images are below {below:g}")


def _line(move: Move, dry_run: bool) -> str:
    arrow = "would go to" if dry_run else "to"
    return text_of_name(f"{move.quality:.3f} {move.source} {arrow} {move.target}")


def _device(asked: str) -> str:
    """Each process of a launch takes the GPU of its own number."""
    local = os.environ.get("LOCAL_RANK")
    if asked != "auto" or local is None:
        return asked
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
