"""`lmcl export`: write a model for other runtimes, checked against PyTorch."""

from pathlib import Path
from typing import Literal

import click


@click.command(
    epilog="EXAMPLES: lmcl export runs/demo --format onnx · "
    "lmcl export runs/demo --format onnx --images photos · "
    "lmcl export runs/demo --format pt2 --output model.pt2"
)
@click.argument("run", metavar="RUN")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["safetensors", "pt2", "onnx"]),
    required=True,
    help="safetensors: the model folder itself; pt2: torch.export; onnx: opset 18.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "int8"]),
    default="float32",
    show_default=True,
    help="onnx: weights of matrix products in float32, or in eight bits: smaller, less exact.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="File [RUN/export/model.<format>; of starter and hf://: export/model.<format>].",
)
@click.option(
    "--images",
    type=click.Path(path_type=Path),
    help="Compare scores on these images: folder, file or pattern [the run's test part].",
)
@click.option("--most", type=click.IntRange(1), help="Compare at most this many images [all].")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def command(
    run: str,
    format_name: Literal["safetensors", "pt2", "onnx"],
    precision: Literal["float32", "int8"],
    output: Path | None,
    images: Path | None,
    most: int | None,
    no_progress: bool,
) -> None:
    """Export the model of a run, a folder, starter or hf://USER/NAME, and check it by PyTorch."""
    from lmcl.inference.engines import export_name
    from lmcl.inference.export import NO_IMAGES, export, images_named, images_of_run
    from lmcl.inference.scorer import open_scorer
    from lmcl.models.named import find_model, is_read_only

    if precision == "int8" and format_name != "onnx":
        raise click.UsageError("--precision int8 is for --format onnx")
    folder, place = find_model(run), Path(run)
    inside = Path("export") if is_read_only(folder) else place / "export"
    names = {"safetensors": "model", "pt2": "model.pt2", "onnx": export_name(precision)}
    target = output or inside / names[format_name]
    scorer = open_scorer(folder, device="cpu")
    compared = NO_IMAGES
    if format_name != "safetensors":
        compared = images_named(images, most=most) if images else images_of_run(place, most=most)
    parity = export(
        scorer,
        folder,
        target,
        format=format_name,
        compared=compared,
        precision=precision,
        progress=not no_progress,
    )
    if parity.format == "safetensors":
        click.echo(f"{target}: a copy of {folder}")
        return
    click.echo(
        f"{target}: compared with PyTorch by {parity.runtime}; greatest difference in [0, 1] units "
        f"{parity.max_crop_difference:.1e} over {parity.crops} crops"
    )
    if parity.images:
        gap = f"{parity.max_score_difference:.1e}"
        click.echo(f"scores of {parity.images} images, {parity.images_of}: differ by at most {gap}")
    else:
        click.echo(
            f"scores were compared on no image: {parity.images_of}; name some by --images FOLDER",
            err=True,
        )
