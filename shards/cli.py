"""`lmcl-shard`: pack, check, look at and split data sets.

A command imports its work when it is called, so that `--help` answers at once.
"""

import math
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from shards.command_group import CommandGroup
from shards.errors import ShardError
from shards.exit_codes import end, report_errors
from shards.limits import MAX_PIXELS, PIXELS_AT_ONCE
from shards.number_range import NumberRange
from shards.text import is_url, printable, redact_url

if TYPE_CHECKING:
    from shards.build.plan import Plan, ShardSize
    from shards.build.update import Updated
    from shards.datasets.registry import Reader
    from shards.read import ShardSet
    from shards.sample import DataSet
    from shards.score_scale import ScoreScale
    from shards.splits.split import Split

_SHOWN = 5
_LONGEST_LINE = 1 << 16
_STOPS = (signal.SIGTERM, signal.SIGHUP)
_GOES_ON = "what is finished is kept, the same command goes on where it stopped"
_SHARD_SAMPLES = "Images in a shard. [a sixteenth of the set, at least 100 and at most 2,000]"
_EXAMPLES = """\b
Examples:
  lmcl-shard build biq2021 ~/data/biq2021 --output data/biq2021
  lmcl-shard build table my.csv --images photos --output data/mine
  lmcl-shard build demo --output data/demo
"""


class _Stopped(BaseException):
    """The process was asked to end; not an error, so that nothing on the way catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main() -> None:
    """Entry point: errors, a stop and an interrupt become one sentence and an exit code."""
    with report_errors(way_on=_GOES_ON):
        try:
            _catch_stops()
            cli.main(standalone_mode=False)
        except _Stopped as stop:
            end(f"stopped by {signal.Signals(stop.number).name}; {_GOES_ON}", 128 + stop.number)


def _catch_stops() -> None:
    """End as by Ctrl-C when a terminal is closed or a scheduler asks, not in the middle."""

    def stop(number: int, frame: object) -> None:
        for name in _STOPS:
            signal.signal(name, signal.SIG_IGN)  # once is enough; what is half done is removed
        raise _Stopped(number)

    for name in _STOPS:
        if signal.getsignal(name) is signal.SIG_DFL:  # `nohup` ignores one, and means it
            signal.signal(name, stop)


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lmcl")
def cli() -> None:
    """Data sets become shards, a manifest and splits."""


@cli.command(epilog=_EXAMPLES)
@click.argument("name")
@click.argument("source", required=False)
@click.option("--output", required=True, help="Folder or fsspec URL of the packed set.")
@click.option("--images", help="Folder or fsspec URL of the images.")
@click.option(
    "--name",
    "set_name",
    metavar="NAME",
    help="Short name of the set (table, unlabelled, wds: the output folder's; pyiqa: the file's).",
)
@click.option("--score-range", type=(float, float), help="Ends of the score's scale.")
@click.option("--lower-is-better", is_flag=True, help="Scores are differences to a reference.")
@click.option(
    "--extra-files",
    type=click.Choice(["error", "ignore"]),
    default="error",
    show_default=True,
    help="Images that the table does not name.",
)
@click.option("--path-column", metavar="NAME", help="table: column of the images' paths.")
@click.option("--score-column", metavar="NAME", help="table: column of the scores.")
@click.option("--std-column", metavar="NAME", help="table: column of deviations, or none.")
@click.option("--group-column", metavar="NAME", help="table: column of groups, or none.")
@click.option("--split-column", metavar="NAME", help="table: column of parts, or none.")
@click.option("--patches", is_flag=True, help="flive: pack the patches too.")
@click.option(
    "--score-member",
    default="json:mos",
    show_default=True,
    help="wds: cls, txt, json:field, or none.",
)
@click.option("--group-member", help="wds: where the group is, e.g. json:content.")
@click.option("--image-member", help="wds: the image, where a sample has several: dist.jpg, dist.")
@click.option("--include", multiple=True, metavar="PATTERN", help="Look at these files only.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Leave these files out.")
@click.option("--contents", default=60, show_default=True, help="demo: number of contents.")
@click.option("--seed", default=123, show_default=True, help="demo: seed.")
@click.option("--workers", type=click.IntRange(1), help="Shards packed at a time. [cores]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True)
@click.option("--retry-failed", is_flag=True, help="Try images again that were left out.")
@click.option("--bmp-to-png", is_flag=True, help="Store BMP as PNG, checked pixel for pixel.")
@click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=MAX_PIXELS,
    show_default=True,
    help="Refuse larger images.",
)
@click.option(
    "--min-side",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Refuse images with a shorter side, in pixels.",
)
@click.option(
    "--megapixels-at-once",
    type=click.IntRange(1),
    default=PIXELS_AT_ONCE // 1_000_000,
    show_default=True,
    help="Decoded at once by all workers; bounds memory, a larger image goes alone.",
)
@click.option("--shard-mb", default=256.0, show_default=True, help="Size of a shard.")
@click.option("--shard-samples", type=click.IntRange(1), help=_SHARD_SAMPLES)
@click.option("--overwrite", is_flag=True, help="Replace a finished set of another source.")
@click.option("--dry-run", is_flag=True, help="Print the plan; write nothing.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def build(
    name: str,
    source: str | None,
    output: str,
    images: str | None,
    set_name: str | None,
    score_range: tuple[float, float] | None,
    lower_is_better: bool,
    extra_files: Any,
    path_column: str | None,
    score_column: str | None,
    std_column: str | None,
    group_column: str | None,
    split_column: str | None,
    patches: bool,
    score_member: str,
    group_member: str | None,
    image_member: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    contents: int,
    seed: int,
    workers: int | None,
    engine: Any,
    on_error: Any,
    retry_failed: bool,
    bmp_to_png: bool,
    max_pixels: int,
    min_side: int,
    megapixels_at_once: int,
    shard_mb: float,
    shard_samples: int | None,
    overwrite: bool,
    dry_run: bool,
    no_progress: bool,
) -> None:
    """Pack the data set NAME from SOURCE into shards.

    NAME is one of `lmcl-shard datasets`; SOURCE is the unpacked official folder, or the table.
    """
    from shards.build.build import build as build_set
    from shards.build.build import default_workers, refuse_missing
    from shards.build.pack import PackOptions
    from shards.build.plan import make_plan
    from shards.datasets.registry import SourceOptions, default_name, fetch_source, open_source
    from shards.datasets.roles import ColumnNames
    from shards.side_files import PathFilter

    given = SourceOptions(
        images=None if images is None or is_url(images) else Path(images),
        name=_set_name(set_name) or default_name(name, output),
        score=_score(score_range, lower_is_better),
        extra_files=extra_files,
        columns=ColumnNames(
            path=path_column,
            score=score_column,
            std=std_column,
            group=group_column,
            split=split_column,
        ),
        missing="error" if on_error == "fail" else "later",
        bad_rows="error" if on_error == "fail" else "later",
        patches=patches,
        score_member=None if score_member == "none" else score_member,
        group_member=group_member,
        image_member=image_member,
        files=PathFilter(include=include, exclude=exclude),
        stdin=_stdin_lines(),
        contents=contents,
        seed=seed,
        workers=workers or default_workers(),
    )
    options = PackOptions(
        on_error=on_error, bmp_to_png=bmp_to_png, max_pixels=max_pixels, min_side=min_side
    )
    size = _shard_size(shard_mb, shard_samples)
    here, given = fetch_source(
        name, _source_folder(name, source, output), given, images=images, tell=_note
    )
    dataset = open_source(name, here, given)
    if dry_run:
        plan = make_plan(dataset, options=options, size=size)
        click.echo(_plan_text(plan, output))
        _tell(plan, output)
        _tell_left_out(dataset)
        refuse_missing(plan, options)
        return
    with _bar("packing", "images", off=no_progress) as advance:
        manifest = build_set(
            dataset,
            output,
            workers=workers,
            engine=engine,
            options=options,
            size=size,
            pixels_at_once=megapixels_at_once * 1_000_000,
            retry_failed=retry_failed,
            overwrite=overwrite,
            progress=advance,
            tell=lambda plan: _tell(plan, output),
        )
    click.echo(
        f"{redact_url(output)}: {manifest.num_samples:,} images in {len(manifest.shards)} shards"
    )
    _tell_left_out(dataset)
    _tell_sizes(output)
    _tell_noted(output)
    if manifest.num_rejected:
        click.echo(
            f"{manifest.num_rejected:,} images were left out: {redact_url(output)}/rejected.jsonl"
        )


@cli.command()
@click.argument("root")
@click.option("--deep", is_flag=True, help="Hash and decode everything.")
@click.option("--json", "as_json", is_flag=True, help="Findings as JSON lines.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def verify(root: str, deep: bool, as_json: bool, no_progress: bool) -> None:
    """Check that a packed set is what its manifest says; exit code 3 if it is not."""
    import msgspec

    from shards.verify import verify as verify_set

    with _bar("checking", "samples", off=no_progress) as advance:
        found = verify_set(root, deep=deep, progress=lambda samples: advance(samples, 0))
    for finding in found.findings:
        if as_json:
            click.echo(msgspec.json.encode(finding).decode())
        else:
            weight = "error" if finding.is_error else "note"
            click.echo(f"{weight}: {finding.kind}: {finding.where}: {finding.text}")
    for remark in found.remarks if not as_json else ():
        click.echo(f"look at: {remark}")
    if not found.ok:
        wrong = sum(finding.is_error for finding in found.findings)
        raise ShardError(f"{root}: {wrong} errors; see the lines above", exit_code=3)
    if not as_json:
        how = "every hash, image and label" if deep else "files, sizes, counts and index"
        click.echo(f"{redact_url(root)}: {found.samples:,} samples, {how} as they should be")


@cli.command()
@click.argument("root")
@click.option("--sheet", type=click.Path(path_type=Path), help="Write a contact sheet (PNG).")
@click.option("--json", "as_json", is_flag=True, help="The manifest as JSON.")
def info(root: str, sheet: Path | None, as_json: bool) -> None:
    """Show what a packed set holds."""
    import msgspec

    from shards.files import atomic_write, check_own
    from shards.info import SHEET_MARK, contact_sheet, describe_set
    from shards.read import open_set

    shard_set = open_set(root)
    if as_json:
        click.echo(msgspec.json.encode(shard_set.manifest).decode())
    else:
        click.echo(describe_set(shard_set))
    if sheet is not None:
        check_own(sheet, SHEET_MARK)
        picture = contact_sheet(shard_set)
        with atomic_write(sheet) as out:
            out.write(picture)
        click.echo(f"contact sheet: {sheet}", err=True)


@cli.command()
@click.argument("root")
@click.option(
    "--protocol",
    type=click.Choice(
        [
            "70-10-20",
            "80-20",
            "official",
            "k-fold",
            "leave-one-distortion-out",
            "fraction",
            "official-fraction",
        ]
    ),
    default="70-10-20",
    show_default=True,
)
@click.option("--seed", default=123, show_default=True)
@click.option(
    "--repeats", type=click.IntRange(1), default=10, show_default=True, help="Independent draws."
)
@click.option("--folds", default=5, show_default=True, help="k-fold: how many.")
@click.option(
    "--fraction",
    default=0.2,
    show_default=True,
    help="fraction, official-fraction: share of train kept.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(path_type=Path),
    help="Import published splits: meta csv, pickle, folder of .npy or of lists.",
)
@click.option("--names", type=click.Path(path_type=Path), help="--from: list that numbers mean.")
@click.option("--column", help="--from: one split column of a meta csv. [all]")
@click.option("--path-column", metavar="NAME", help="--from: column of the images' names.")
@click.option("--extend", metavar="OLD", help="Take a split of an earlier version over.")
@click.option("--pyiqa-compat-shift", default=0, help="--from: rows pyiqa's loader shifts by.")
@click.option("--allow-missing", is_flag=True, help="--from: names this set does not hold.")
@click.option(
    "--dedupe",
    type=click.Choice(["report", "drop"]),
    help="Find near twins across parts; drop takes them out of train.",
)
@click.option("--workers", type=click.IntRange(1), help="--dedupe: processes. [cores]")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
@click.option(
    "--val-fraction",
    type=NumberRange(0, 0.5),
    help="official, official-fraction: share of train to select on where there is no val part; 0 = "
    "none. [0.1]",
)
def split(
    root: str,
    protocol: Any,
    seed: int,
    repeats: int,
    folds: int,
    fraction: float,
    source: Path | None,
    names: Path | None,
    column: str | None,
    path_column: str | None,
    extend: str | None,
    pyiqa_compat_shift: int,
    allow_missing: bool,
    dedupe: str | None,
    workers: int | None,
    no_progress: bool,
    val_fraction: float | None,
) -> None:
    """Draw splits into ROOT/splits: lists of ids, disjoint by group, stratified by score."""
    from shards.read import open_set
    from shards.splits.draw import make_splits
    from shards.splits.extend import extend_split
    from shards.splits.import_splits import import_splits
    from shards.splits.split import PARTS, write_split

    shard_set = open_set(root)
    if source is not None:
        splits = import_splits(
            shard_set,
            source,
            names=names,
            column=column,
            shift_rows=pyiqa_compat_shift,
            allow_missing=allow_missing,
            path_column=path_column,
        )
    elif extend is not None:
        splits = [extend_split(shard_set, extend)]
    else:
        splits = make_splits(
            shard_set,
            protocol=protocol,
            seed=seed,
            repeats=repeats,
            folds=folds,
            fraction=fraction,
            val_fraction=val_fraction,
        )
    if dedupe is not None:
        splits = _dedupe(shard_set, splits, dedupe == "drop", workers, off=no_progress)
    for drawn in splits:
        counts = ", ".join(f"{name} {drawn.part(name).size:,}" for name in PARTS)
        click.echo(f"{printable(write_split(root, drawn))}: {counts}")
        if drawn.note:
            click.echo(f"  {printable(drawn.note, 500)}")


def _dedupe(
    shard_set: "ShardSet", splits: "list[Split]", drop: bool, workers: int | None, *, off: bool
) -> "list[Split]":
    from shards.build.build import default_workers
    from shards.splits.dedupe import drop_twins, find_twins, signatures

    ids = shard_set.ids()
    with _bar("looking for twins", "images", off=off) as advance:
        seen = signatures(
            shard_set,
            ids,
            workers=workers or default_workers(),
            progress=lambda images: advance(images, ids.size),
        )
    kept = []
    for drawn in splits:
        twins = find_twins(seen, drawn)
        held_out = len({twin.second for twin in twins if twin.parts[1] == "test"})
        click.echo(
            f"{drawn.name}: {len(twins):,} pairs of near twins across parts; {held_out:,} of "
            f"{drawn.test.size:,} test images have one in train or val"
        )
        for twin in twins[:_SHOWN]:
            first, second = (shard_set.samples.path[id] for id in (twin.first, twin.second))
            click.echo(
                f"  {twin.parts[0]} {printable(first)} ~ {twin.parts[1]} {printable(second)}"
            )
        kept.append(drop_twins(shard_set, drawn, twins) if drop else drawn)
    return kept


@cli.command()
@click.argument("roots", nargs=-1, required=True)
@click.option("--output", required=True, help="Folder or fsspec URL of the new set.")
@click.option("--name", "set_name", help="Short name of the new set.")
@click.option("--shard-mb", default=256.0, show_default=True, help="Size of a shard.")
@click.option("--shard-samples", type=click.IntRange(1), help=_SHARD_SAMPLES)
@click.option("--workers", type=click.IntRange(1), help="Shards packed at a time. [cores]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def reshard(
    roots: tuple[str, ...],
    output: str,
    set_name: str | None,
    shard_mb: float,
    shard_samples: int | None,
    workers: int | None,
    engine: Any,
    no_progress: bool,
) -> None:
    """Change the shard size of one packed set, or merge several into one.

    One set keeps its ids and splits, also under another --name. Merged scores are brought to 0..1,
    each by its own scale.
    """
    from shards.build.reshard import reshard as reshard_sets
    from shards.read import open_set

    with _bar("packing", "images", off=no_progress) as advance:
        manifest = reshard_sets(
            [open_set(root) for root in roots],
            output,
            name=_set_name(set_name),
            size=_shard_size(shard_mb, shard_samples),
            workers=workers,
            engine=engine,
            progress=advance,
            tell=lambda plan: _tell(plan, output),
        )
    click.echo(
        f"{redact_url(output)}: {manifest.num_samples:,} images in {len(manifest.shards)} shards"
    )


@cli.command()
@click.argument("root")
@click.argument("table", required=False)
@click.option("--images", help="Folder or fsspec URL of the images that are added.")
@click.option("--withdraw", type=click.Path(path_type=Path), help="List of images that go.")
@click.option("--score-range", type=(float, float), help="Ends of the score's scale. [the set's]")
@click.option("--lower-is-better", is_flag=True, help="Scores are differences to a reference.")
@click.option("--path-column", metavar="NAME", help="Column of the images' paths.")
@click.option("--score-column", metavar="NAME", help="Column of the scores.")
@click.option("--std-column", metavar="NAME", help="Column of deviations, or none.")
@click.option("--group-column", metavar="NAME", help="Column of groups, or none.")
@click.option("--split-column", metavar="NAME", help="Column of parts, or none.")
@click.option("--on-error", type=click.Choice(["fail", "skip"]), default="fail", show_default=True)
@click.option("--workers", type=click.IntRange(1), help="Shards packed at a time. [cores]")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def update(
    root: str,
    table: str | None,
    images: str | None,
    withdraw: Path | None,
    score_range: tuple[float, float] | None,
    lower_is_better: bool,
    path_column: str | None,
    score_column: str | None,
    std_column: str | None,
    group_column: str | None,
    split_column: str | None,
    on_error: Any,
    workers: int | None,
    no_progress: bool,
) -> None:
    """Make the next version of ROOT: labels of TABLE, images it adds, images that go.

    Shards are not touched. The version before is opened as ROOT@v1; splits of it are taken over by
    `lmcl-shard split ROOT --extend NAME`.
    """
    from shards.build.pack import PackOptions
    from shards.build.update import update_set
    from shards.datasets.registry import SourceOptions, fetch_source, open_source
    from shards.datasets.roles import ColumnNames
    from shards.datasets.table import list_of_paths

    if table is None and withdraw is None:
        raise click.UsageError("give a TABLE of labels, or --withdraw LIST")
    score = _score(score_range, lower_is_better)
    dataset = None
    if table is not None:
        columns = ColumnNames(
            path=path_column,
            score=score_column,
            std=std_column,
            group=group_column,
            split=split_column,
        )
        given = SourceOptions(
            images=None if images is None or is_url(images) else Path(images),
            score=score,
            extra_files="ignore",
            columns=columns,
            missing="ignore",
            bad_rows="refuse",
        )
        here, given = fetch_source("table", table, given, images=images, tell=_note)
        dataset = open_source("table", here, given)
        for note in dataset.notes:
            click.echo(printable(redact_url(note), 600))
    with _bar("packing", "images", off=no_progress) as advance:
        done = update_set(
            root,
            dataset=dataset,
            withdraw=list_of_paths(withdraw) if withdraw is not None else (),
            score=score,
            workers=workers,
            options=PackOptions(on_error=on_error),
            progress=advance,
        )
    _say_update(root, done)


def _say_update(root: str, done: "Updated") -> None:
    shown, version = redact_url(root), done.manifest.version
    if done.out:
        click.echo(
            f"{done.out:,} of the table's images were withdrawn or rejected before and stay out; "
            "give them another name to add them again"
        )
    if not done.is_new:
        click.echo(f"{shown}: version {version} is so already; nothing was changed")
        return
    click.echo(
        f"{shown}: version {version}, {done.manifest.num_samples:,} images: {done.relabelled:,} "
        f"relabelled, {done.added:,} added, {done.withdrawn:,} withdrawn, {done.kept:,} not named "
        f"and kept as they were; the version before is {shown}@v{version - 1}"
    )
    if done.rejected:
        click.echo(f"{done.rejected:,} images were left out: {shown}/rejected.jsonl")
    if done.added or done.withdrawn:
        click.echo(f"splits are taken over by `lmcl-shard split {shown} --extend NAME`")


@cli.command()
@click.argument("name", required=False)
def datasets(name: str | None) -> None:
    """List the data sets that can be packed, or everything known about one."""
    from shards.datasets.registry import readers, suggestion

    known = readers()
    if name is None:
        for reader in known.values():
            click.echo(f"{reader.name:<12} {reader.facts.title}")
        return
    if name not in known:
        raise ShardError(f"no data set {name!r}; {suggestion(name, list(known))}", exit_code=2)
    for line in _reader_lines(known[name]):
        click.echo(line)


def _reader_lines(reader: "Reader") -> Iterator[str]:
    facts, expected = reader.facts, reader.facts.expected
    yield f"{reader.name}: {facts.title}"
    yield f"  source     {reader.source}"
    for label, text in (
        ("labels", facts.source),
        ("page", facts.page),
        ("licence", facts.licence),
        ("citation", facts.citation),
    ):
        if text:
            yield f"  {label:<10} {text}"
    if expected.samples is not None:
        yield f"  samples    {expected.samples:,}"
    if expected.groups is not None:
        yield f"  references {expected.groups:,}"
    if expected.low is not None and expected.high is not None:
        yield f"  scores     {expected.low:g} .. {expected.high:g}"
    if expected.parts:
        yield "  parts      " + ", ".join(f"{part} {count:,}" for part, count in expected.parts)


def _shard_size(shard_mb: float, samples: int | None) -> "ShardSize":
    from shards.build.plan import ShardSize

    if not 0 < shard_mb < math.inf:
        raise click.UsageError(f"--shard-mb needs a size above 0, in megabytes; got {shard_mb:g}")
    return ShardSize(size_bytes=max(1, int(shard_mb * 1e6)), samples=samples)


def _set_name(given: str | None) -> str | None:
    # An empty name would be taken for none given, and the set named by its reader.
    if given == "":
        raise click.UsageError("--name is empty; give a name of a-z, 0-9, - and _, or leave it out")
    return given


def _score(score_range: tuple[float, float] | None, lower_is_better: bool) -> "ScoreScale | None":
    from shards.score_scale import scale_of_range

    if score_range is None:
        if lower_is_better:
            raise click.UsageError("--lower-is-better needs --score-range LOW HIGH as well")
        return None
    try:
        return scale_of_range(*score_range, lower_is_better=lower_is_better)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _tell_sizes(output: str) -> None:
    from shards.picture_counts import size_sentences
    from shards.read import open_set

    shard_set = open_set(output)
    ids, table = shard_set.ids(), shard_set.samples
    for sentence in size_sentences(table.width[ids], table.height[ids]):
        click.echo(f"note: {sentence}")


def _tell_noted(output: str) -> None:
    from shards.build.pack import read_noted
    from shards.store import Store

    noted = read_noted(Store(output))
    for line in noted[:_SHOWN]:
        click.echo(f"note: {printable(line.path)}: {printable(line.note)}")
    if noted:
        plural = "s have" if len(noted) > 1 else " has"
        click.echo(f"{len(noted):,} image{plural} a note: {redact_url(output)}/noted.jsonl")


def _stdin_lines() -> Iterator[str]:
    # There is no stdin at all where a scheduler has closed it.
    while sys.stdin and (line := sys.stdin.buffer.readline(_LONGEST_LINE)):
        yield os.fsdecode(line)


def _tell_left_out(dataset: "DataSet") -> None:
    for sentence in dataset.left_out.sentences() if dataset.left_out else ():
        click.echo(sentence)


def _note(line: str) -> None:
    from tqdm import tqdm

    tqdm.write(printable(line, 400), file=sys.stderr)


def _source_folder(name: str, source: str | None, output: str) -> str:
    if source is not None:
        return source
    if name == "demo" and not is_url(output):
        return str(Path(output) / "source")
    raise click.UsageError(f"{name} needs a SOURCE: see `lmcl-shard datasets {name}`")


def _plan_text(plan: "Plan", output: str) -> str:
    return "\n".join(
        (
            f"{plan.name} -> {redact_url(output)}",
            f"  images   {plan.rows:,}, of them {plan.labelled:,} labelled",
            f"  bytes    {plan.size_bytes:,}",
            f"  groups   {plan.groups:,}",
            f"  shards   {len(plan.starts):,}",
            f"  missing  {plan.num_missing + plan.num_problems:,}",
        )
    )


def _tell(plan: "Plan", output: str) -> None:
    """How the source was read, and what is strange about it; a bar must not stand in its place."""
    from tqdm import tqdm

    for note in plan.notes:
        tqdm.write(printable(redact_url(note), 600))
    if plan.parts:
        parts = ", ".join(f"{part} {count:,}" for part, count in plan.parts)
        command = f"lmcl-shard split {redact_url(output)} --protocol official"
        tqdm.write(f"the set's own parts ({parts}) become a split by `{command}`")


@contextmanager
def _bar(what: str, unit: str, *, off: bool) -> Iterator[Callable[[int, int], None]]:
    from shards.progress import progress_bar

    with progress_bar(desc=what, unit=f" {unit}", off=off) as bar:

        def advance(done: int, total: int) -> None:
            if total and bar.total != total:
                bar.total = total
            bar.update(done)

        yield advance
