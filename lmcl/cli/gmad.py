"""`lmcl gmad`: pairs of images on which two models contradict each other."""

from pathlib import Path

import click

from shards.number_range import NumberRange


@click.command(
    epilog="EXAMPLES: lmcl gmad a.csv b.csv --images photos · "
    "lmcl gmad runs/a/predictions/test.csv runs/b/predictions/test.csv --images data/images --top 5"
)
@click.argument("first", metavar="A.csv", type=click.Path(path_type=Path))
@click.argument("second", metavar="B.csv", type=click.Path(path_type=Path))
@click.option(
    "--images", type=click.Path(path_type=Path), default=Path(), help="Folder the paths lie in [.]."
)
@click.option(
    "--levels", type=click.IntRange(1), default=5, show_default=True, help="Quality levels."
)
@click.option(
    "--top", type=click.IntRange(1), default=3, show_default=True, help="Pairs per level."
)
@click.option(
    "--tolerance",
    type=NumberRange(0.0),
    default=0.1,
    show_default=True,
    help="Most the defender may tell a pair apart, in standard deviations.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("gmad"),
    show_default=True,
    help="Folder of gmad.html and gmad.csv, or the page itself, NAME.html.",
)
def command(
    first: Path, second: Path, images: Path, levels: int, top: int, tolerance: float, output: Path
) -> None:
    """Find the pairs of images on which two models contradict each other most."""
    from lmcl.report.gmad import compare_models

    page = compare_models(
        first, second, images=images, levels=levels, top=top, tolerance=tolerance, output=output
    )
    click.echo(page)
