"""The work of `lmcl score`: open, list, score, report, filter."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click

from lmcl.evaluation.threshold import find_rule
from lmcl.inference.batch_job import (
    ScoringOptions,
    Summary,
    hold_output,
    list_on_all_ranks,
    score_held,
)
from lmcl.inference.calibration import Reading
from lmcl.inference.describe import describe as describe_scores
from lmcl.inference.engines import EngineName
from lmcl.inference.filter import SHEET_MARK, is_below, plan_moves
from lmcl.inference.inputs import Item, TableOptions, list_items
from lmcl.inference.interruption import stop_on_signals
from lmcl.inference.moves import (
    Move,
    MoveOutcome,
    carry_out,
    check_record,
    remember_moves,
    undo_moves,
)
from lmcl.inference.onnx_engine import SUFFIX
from lmcl.inference.scorer import Precision, Scorer, open_scorer
from lmcl.inference.scores_file import Row, check_output, note_path, read_rows, sources_path
from lmcl.models.named import STARTER, find_model, pin_model
from lmcl.training.launcher import end_with_launcher
from pipeline.decode_config import DecodeConfig, DecodeName
from shards.files import check_own
from shards.lock import lock_path
from shards.processes import usable_cores
from shards.side_files import LeftOut, PathFilter
from shards.text import printable

_FAILED = 3
_MANY = 200
"""Images from which on the time an export takes comes back."""
_LONGEST_LINE = 1 << 16


def run(*, output: Path, resume: bool, **options: Any) -> None:
    """`score_files`, for whom `--output -` is the terminal or a pipe: CSV, when all is scored."""
    if str(output) != "-":
        score_files(output=output, resume=resume, **options)
        return
    if resume or options["move_to"] is not None or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise click.UsageError(
            "--output - keeps nothing that --resume or --move-to could go on with, and several "
            "processes share no pipe; name a file"
        )
    with tempfile.TemporaryDirectory(prefix="lmcl-score-") as place:
        file = Path(place) / "scores.csv"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                score_files(output=file, resume=False, shown="standard output", **options)
        finally:
            if file.is_file():
                with file.open(encoding="utf-8", newline="") as lines:
                    for line in lines:
                        click.echo(line, nl=False)


def score_files(
    *,
    paths: tuple[str, ...],
    model: str,
    output: Path,
    scale: str,
    path_column: str | None,
    images: Path | None,
    resume: bool,
    min_side: int,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    boxes: bool,
    crop_scores: bool,
    confidence: float | None,
    population: Path | None,
    crops: Literal["all", "adaptive"],
    describe: bool,
    keep: str | None,
    below: float | None,
    move_to: Path | None,
    dry_run: bool,
    undo: Path | None,
    sheet: Path | None,
    engine: EngineName,
    device: str,
    precision: Precision,
    decode: DecodeName,
    threads: int | None,
    no_progress: bool,
    shown: str = "",
) -> None:
    """Score what `lmcl score` was asked to; ends the process with 3 if an image failed.

    `shown` is what the output is called, where its name tells nobody anything.
    """
    if undo is not None:
        _undo(undo, others=bool(paths or move_to or model != STARTER))
        return
    if not paths:
        raise click.UsageError("Missing argument 'PATH...'.")
    model = pin_model(model)
    if keep is not None:
        below = _cut(model, keep, below)
    if (move_to is None) != (below is None) and (move_to is not None or dry_run):
        raise click.UsageError(
            "--move-to and --dry-run need --below, the quality to sort out by, or --keep"
        )
    # Before the model is opened, which takes a second or more.
    check_output(output)
    if sheet is not None:
        check_own(sheet, SHEET_MARK)
    end_with_launcher()
    options = ScoringOptions(
        output=output,
        box=boxes,
        crops=crop_scores,
        resume=resume,
        threads=threads or min(4, usable_cores()),
        min_side=min_side,
        progress=not no_progress,
    )
    way_on = (
        "nothing was written; name a file by --output, and --resume can go on"
        if shown
        else f"what is done stays, beside {printable(output)}; the same command with --resume goes "
        "on"
    )
    with stop_on_signals(way_on):
        scorer = open_scorer(
            model,
            device=_device(device, engine, model),
            engine=engine,
            boxes=boxes,
            precision=precision,
            decode=DecodeConfig(decode=decode, threads=threads),
            reading=Reading(confidence=confidence, population=population, crops=crops),
            scale=scale,
        )
        after = _Filter(
            below=below, move_to=move_to, dry_run=dry_run, sheet=sheet, describe=describe
        )
        tables = TableOptions(path_column=path_column, images=images, tell=_note)
        files = PathFilter(include=include, exclude=exclude)
        listing = _Listing(
            tables=tables,
            files=files,
            model=printable(model),
            engine=engine,
            shown=shown or printable(output),
        )
        failed = _score(scorer, paths, options, after, listing)
    if failed:
        sys.exit(_FAILED)


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """How paths become images, and what was passed over."""

    tables: TableOptions
    files: PathFilter
    model: str
    """As it was asked for, for messages."""
    engine: EngineName
    shown: str
    """What the output is called, for messages."""
    others: LeftOut = field(default_factory=LeftOut)

    def is_slow(self, scorer: Scorer) -> bool:
        """Whether PyTorch scores on a processor although nobody asked for it."""
        by_torch = scorer.engine.name == "torch" and scorer.device.type == "cpu"
        return by_torch and self.engine == "auto" and scorer.precision == "float32"


@dataclass(frozen=True, kw_only=True)
class _Filter:
    """What is done with the scores at once."""

    below: float | None
    move_to: Path | None
    dry_run: bool
    sheet: Path | None
    describe: bool

    @property
    def needs_rows(self) -> bool:
        """Whether the scores file is read again for it."""
        return self.sheet is not None or self.below is not None or self.describe


def _cut(model: str | Path, rule: str, below: float | None) -> float:
    """The cut of a rule of the model folder."""
    if below is not None:
        raise click.UsageError("--keep and --below both name a cut; give one of them")
    return find_rule(find_model(model), rule).cut


def _note(line: str) -> None:
    click.echo(line, err=True)


def _score(
    scorer: Scorer,
    paths: Sequence[str],
    options: ScoringOptions,
    after: _Filter,
    listing: _Listing,
) -> int:
    """Score, report and filter; how many images could not be scored."""
    output = options.output
    written = [output, note_path(output), sources_path(output)]
    written += [place for place in (after.sheet, after.move_to) if place]
    items = list_on_all_ranks(
        scorer,
        lambda: list_items(
            paths,
            stdin=_stdin_lines(),
            left_out=written,
            tables=listing.tables,
            files=listing.files,
            others=listing.others,
        ),
    )
    if listing.is_slow(scorer) and len(items) >= _MANY:
        _note(
            f"{len(items):,} images by PyTorch on a processor; `lmcl export {listing.model} "
            "--format onnx` writes a file once by which this command takes a fraction of the time"
        )
    with hold_output(scorer, output):
        summary = score_held(scorer, items, options)
        if int(os.environ.get("RANK", "0")) == 0:
            _report(scorer, listing.shown, summary)
            for sentence in listing.others.sentences():
                click.echo(sentence)
            if after.needs_rows:
                _filter(scorer, items, _rows_of(output, summary), output, after)
    return summary.failed


def _filter(
    scorer: Scorer,
    items: Sequence[Item],
    rows: Sequence[Row | None],
    output: Path,
    after: _Filter,
) -> None:
    for line in describe_scores(rows) if after.describe else ():
        click.echo(line)
    if after.sheet is not None:
        from lmcl.inference.sheet import write_sheet

        # First: it needs the images where they are.
        count = write_sheet(rows, items, after.sheet, scale=scorer.scale_label)
        click.echo(f"{printable(after.sheet)}: {count} images, worst first")
    if after.below is None:
        return
    if after.move_to is None:
        _name_below(rows, after.below)
        return
    moves = plan_moves(rows, items, below=after.below, folder=after.move_to)
    if after.dry_run:
        _name_moves(moves)
        done, verb = len(moves), "would move"
    else:
        done, verb = _move(moves, after.move_to, output), "moved"
    click.echo(
        f"{verb} {done} of {len(rows)} images below {after.below:g} to {printable(after.move_to)}"
    )


def _report(scorer: Scorer, shown: str, summary: Summary) -> None:
    better = "higher" if scorer.scale.higher_is_better else "lower"
    others = f", {summary.others} of other images" if summary.others else ""
    others += f", {summary.noted} with a note" if summary.noted else ""
    click.echo(
        f"{shown}: {summary.rows} rows ({summary.failed} failed, "
        f"{summary.reused} kept{others}), "
        f"scale {printable(scorer.scale_label)}, {better} is better"
    )
    if summary.failed and summary.first_failure:
        click.echo(f"not scored, the first: {summary.first_failure}", err=True)
    if scorer.adaptive is not None:
        click.echo(f"looked at {summary.crop_share:.0%} of the crops")
    if summary.rows > summary.failed:
        click.echo(scorer.what_scores_mean)


def _rows_of(output: Path, summary: Summary) -> list[Row | None]:
    """The row of each item; None where the file holds none of the image as it is now."""
    by_name = {row.path: row for row in read_rows(output)}
    return [by_name.get(name) for name in summary.names]


def _stdin_lines() -> Iterator[str]:
    """Names as the system has them: they need not be UTF-8."""
    # There is no stdin at all where a scheduler has closed it.
    if not sys.stdin:
        return
    source = sys.stdin.buffer
    line = source.readline(_LONGEST_LINE)
    # No name holds a NUL, and one may hold a line break.
    if b"\0" in line:
        yield from _ended_by_nul(line, source)
        return
    while line:
        yield os.fsdecode(line)
        line = source.readline(_LONGEST_LINE)


def _ended_by_nul(begin: bytes, source: Any) -> Iterator[str]:
    """Names as `find -print0` and `git ls-files -z` write them."""
    *names, rest = begin.split(b"\0")
    while names or rest:
        yield from map(os.fsdecode, names)
        chunk = source.read(_LONGEST_LINE)
        if not chunk or len(rest) > _LONGEST_LINE:
            if rest:
                yield os.fsdecode(rest)
            rest = b""
        *names, rest = (rest + chunk).split(b"\0")


def _name_below(rows: Sequence[Row | None], below: float) -> None:
    bad = [row for row in rows if row is not None and is_below(row, below)]
    for row in bad:
        click.echo(f"{row.quality:.3f} {printable(row.path)}")
    click.echo(f"{len(bad)} of {len(rows)} images are below {below:g}")


def _name_moves(moves: Sequence[Move]) -> None:
    for move in moves:
        click.echo(
            f"{move.quality:.3f} {printable(move.source)} would go to {printable(move.target)}"
        )


def _move(moves: Sequence[Move], folder: Path, output: Path) -> int:
    """Move, and say so file by file; how many were moved."""
    if not moves:
        return 0
    remember_moves(output, folder)
    outcomes = []
    for outcome in carry_out(moves, folder):
        outcomes.append(outcome)
        _tell(outcome, f"{outcome.move.quality:.3f} ")
    return len(outcomes) - _count_left(outcomes)


def _undo(file: Path, *, others: bool) -> None:
    if others:
        raise click.UsageError("--undo stands alone: it scores and moves nothing else")
    check_record(file)
    outcomes = []
    with (
        stop_on_signals("what was put back stays; the same command goes on"),
        lock_path(file, "lmcl score --undo"),
    ):
        for outcome in undo_moves(file):
            outcomes.append(outcome)
            _tell(outcome)
    left = _count_left(outcomes)
    click.echo(f"put back {len(outcomes) - left} images")
    if left:
        sys.exit(_FAILED)


def _tell(outcome: MoveOutcome, quality: str = "") -> None:
    move = outcome.move
    if outcome.problem:
        click.echo(
            f"{printable(move.source)} stays: {printable(outcome.problem)}",
            err=True,
        )
    else:
        click.echo(f"{quality}{printable(move.source)} to {printable(move.target)}")


def _count_left(outcomes: Sequence[MoveOutcome]) -> int:
    count = sum(bool(outcome.problem) for outcome in outcomes)
    if count:
        click.echo(f"{count} images were left where they are", err=True)
    return count


def _device(asked: str, engine: EngineName, model: str) -> str:
    """Each process of a launch takes the GPU of its own number."""
    local = os.environ.get("LOCAL_RANK")
    if asked != "auto" or local is None or engine == "onnx" or model.endswith(SUFFIX):
        return asked
    import torch

    return f"cuda:{local}" if torch.cuda.is_available() else "cpu"
