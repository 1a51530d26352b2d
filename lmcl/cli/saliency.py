"""`lmcl saliency`: draw saliency maps over photographs."""

from pathlib import Path

import click


@click.command(
    epilog="EXAMPLES: lmcl saliency photo.jpg --model runs/livec --output looks · "
    "lmcl saliency photos/ --model runs/livec/model --output looks"
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@click.option(
    "--model",
    "model",
    default="starter",
    show_default=True,
    metavar="MODEL",
    help="Model folder, a run that holds one, or hf://USER/NAME[@REVISION] on a hub; starter comes "
    "with the project.",
)
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder of the pictures."
)
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(images: tuple[str, ...], model: str, output: Path, no_progress: bool) -> None:
    """Draw a model's attention, its salient window and crop over images (files, folders, globs)."""
    from lmcl.inference.saliency_overlay import draw_all

    done = draw_all(images, model, output, progress=not no_progress)
    click.echo(f"{done} pictures and saliency.csv in {output}")
