"""`lmcl report`: pages from finished runs."""

from pathlib import Path

import click


@click.command(
    epilog="EXAMPLES: lmcl report runs/demo · lmcl report runs/a runs/b --output reports/a-and-b"
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the files [the run itself; reports/<names> for several runs].",
)
@click.option(
    "--ratings",
    type=click.IntRange(1),
    help="Ratings each score is the mean of, for the pairs people can tell apart [what is known "
    "of the set].",
)
def command(runs: tuple[Path, ...], output: Path | None, ratings: int | None) -> None:
    """Write the report of a run, or compare several runs side by side."""
    from lmcl.report.write import write_report

    names = "-".join(run.resolve().name for run in runs)
    folder = output or (runs[0] if len(runs) == 1 else Path("reports") / names[:120])
    click.echo(write_report(runs, folder, ratings=ratings))
