"""`lmcl demo`: the whole method on a synthetic set."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("runs/demo"),
    show_default=True,
    help="Run folder.",
)
@click.option("--again", is_flag=True, help="Remove what an earlier demo made and start over.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(output: Path, again: bool, overrides: tuple[str, ...], no_progress: bool) -> None:
    """Make a synthetic set, train the full method on it, and leave a report: some minutes."""
    from lmcl.demo import run_demo

    click.echo(run_demo(output, again=again, overrides=overrides, progress=not no_progress))
