"""`lmcl bench NAME`: the options; what is measured, and how, stands in `lmcl.bench`."""

from pathlib import Path
from typing import Any

import click

_CODECS = ("jpg", "png", "bmp")
_LOSSES = (
    *("naive_eager", "careful_eager", "careful_compiled", "inf_cl"),
    *("chunked", "chunked_compiled", "fused"),
    *("supcon_dense", "supcon", "info_nce_dense", "info_nce", "clip_dense", "clip"),
)


@click.command("build")
@click.option("--source", type=click.Path(path_type=Path, exists=True), help="Folder of images.")
@click.option(
    "--codec",
    "codecs",
    type=click.Choice(_CODECS),
    multiple=True,
    default=("jpg",),
    show_default=True,
    help="What is drawn without --source; may be given several times.",
)
@click.option("--images", default=10_000, show_default=True, help="Files made without --source.")
@click.option("--side", default=512, show_default=True, help="Their side, pixels.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; medians are over them.")
@click.option("--workers", type=click.IntRange(1), help="Processes of both cases. [cores]")
@click.option("--shard-samples", type=click.IntRange(1), help="Images in a shard. [as build's]")
@click.option("--work", type=click.Path(path_type=Path), help="Where shards are written.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def build(**options: Any) -> None:
    """Pack a folder, and read, hash and decode the same files alone, in turns."""
    from lmcl.bench.build import run

    run(**options)


@click.command("contrastive")
@click.option("--rows", "m", type=int, multiple=True, help="Rows M; several are allowed.")
@click.option("--width", "d", default=256, show_default=True, help="Width D of a row.")
@click.option("--crops", default=10, show_default=True, help="Crops per image.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="fp32 on the CPU, bf16 on a GPU."
)
@click.option("--case", "cases", multiple=True, type=click.Choice(_LOSSES), help="Only these.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; medians are over them.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="cuda where there is one.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--chart", "chart_path", type=click.Path(path_type=Path), help="SVG to write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def contrastive(**options: Any) -> None:
    r"""Measure the loss in seven ways, and SupCon, InfoNCE and CLIP in two; needs no data.

    \b
    Example:
      lmcl bench contrastive --rows 10240 --output benchmarks/results/contrastive.jsonl
    """
    from lmcl.bench.contrastive import run

    run(**options)


@click.command("loss-precision")
@click.option("--rows", "m", type=int, multiple=True, help="Rows M; several are allowed.")
@click.option("--width", default=384, show_default=True, help="Width D of a row.")
@click.option("--crops", default=11, show_default=True, help="Crops per image.")
@click.option("--temperature", "temperatures", type=float, multiple=True, help="Several too.")
@click.option(
    "--precision", "precisions", multiple=True, default=("bf16",), show_default=True,
    type=click.Choice(["bf16", "fp16", "tf32", "fp32"]), help="Several are allowed.",
)  # fmt: skip
@click.option("--spread", "spreads", type=float, multiple=True, default=(0.0, 1.0, 4.0),
              show_default=True, help="How near the crops of an image lie to its hub.")  # fmt: skip
@click.option("--sample", default=2048, show_default=True, help="Rows whose gradient is taken.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
def loss_precision(**options: Any) -> None:
    r"""Relative error of loss and gradients against float64, emulated on the CPU.

    \b
    Example:
      lmcl bench loss-precision --rows 176 --temperature 0.1 --precision bf16 --precision fp16
    """
    from lmcl.bench.contrastive_precision import run

    run(**options)


@click.command("loader")
@click.option("--codec", type=click.Choice([*_CODECS, "all"]), default="jpg", show_default=True)
@click.option("--images", default=96, show_default=True, help="Images per round.")
@click.option("--batch", default=32, show_default=True, help="Images per batch.")
@click.option("--crops", default=10, show_default=True, help="Crops per image.")
@click.option("--size", default=224, show_default=True, help="Side of a crop, pixels.")
@click.option("--rounds", default=7, show_default=True, help="Rounds; medians are over them.")
@click.option("--threads", default=2, show_default=True, help="Decoding threads.")
@click.option("--workers", default=2, show_default=True, help="Worker processes of the baselines.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for the images; kept.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--chart", "chart_path", type=click.Path(path_type=Path), help="SVG to write.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def loader(**options: Any) -> None:
    r"""Measure the loader, its stages and the usual alternatives; needs no data.

    \b
    Example:
      lmcl bench loader --codec all --output benchmarks/results/loader.jsonl
    """
    from lmcl.bench.loader import run

    run(**options)


@click.command("manifest")
@click.option("--samples", default=10_000_000, show_default=True, help="Rows of the table.")
@click.option("--work", type=click.Path(path_type=Path), help="Where the table is written.")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
def manifest(**options: Any) -> None:
    """Open a synthetic set of many samples, draw a split of it, write it and load it."""
    from lmcl.bench.manifest import run

    run(**options)


@click.command("score")
@click.option("--images", default=24, show_default=True, help="Images per round.")
@click.option("--rounds", default=5, show_default=True, help="Rounds; every case in each.")
@click.option("--crops", default=10, show_default=True, help="Crops an image, in every case.")
@click.option("--encoder", default="deit3_small_patch16_224", show_default=True, help="Model.")
@click.option(
    "--model",
    metavar="MODEL",
    help="A real model with its own crops, in place of random weights: a folder, a run, starter, "
    "hf://USER/NAME. Adaptive crops are measured too where it is calibrated for them.",
)
@click.option(
    "--photos",
    type=click.Path(path_type=Path),
    help="Score the first images of this folder [made for it, 512 x 512].",
)
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Of bare_model and lmcl_score.",
)
@click.option(
    "--engine",
    "engines",
    type=click.Choice(["torch", "onnx", "int8"]),
    multiple=True,
    default=("torch", "onnx", "int8"),
    show_default=True,
    help="Engines of lmcl_score on a processor; torch is always among them.",
)
@click.option("--threads", default=2, show_default=True, help="Decoding threads.")
@click.option(
    "--pyiqa",
    "python",
    type=click.Path(path_type=Path),
    help="Python of an environment with pyiqa: its command runs beside ours.",
)
@click.option(
    "--pyiqa-metric",
    type=click.Choice(["hyperiqa", "vit-s"]),
    default="hyperiqa",
    show_default=True,
    help="hyperiqa: ResNet-50 on 224 crops; vit-s: our size of network in pyiqa's loop.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append records there.")
def score(**options: Any) -> None:
    """Score a folder of 512 x 512 JPEGs, and the bare model on the same number of crops.

    Engines, adaptive crops and int8 stand in one table, each with the SRCC of its order of the
    images with that of PyTorch in float32.
    """
    from lmcl.bench.score import run

    run(**options)


@click.command("step")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Run whose step is measured; its data are replaced [the method's defaults].",
)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one field.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="Refuse to run elsewhere.")
@click.option("--batch-sizes", metavar="N[,N...]", help="Images per step [the run's own].")
@click.option("--steps", type=click.IntRange(1), help="Steps of a round [2; 20 on a GPU].")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Rounds.")
@click.option("--codec", type=click.Choice(_CODECS), default="jpg", show_default=True)
@click.option("--workers", default=2, show_default=True, help="Worker processes of the usual loop.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Also ours compiled [GPU].")
@click.option("--output", type=click.Path(path_type=Path), help="JSON lines are appended here.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines instead of a table.")
@click.option("--no-progress", is_flag=True, help="No progress bar.")
def step(**options: Any) -> None:
    r"""Measure an optimiser step: its parts, crops per second, memory, and the usual loop.

    \b
    Example:
      lmcl bench step --set train.batch_size=8 --output benchmarks/results/step.jsonl
    """
    from lmcl.bench.step import run

    run(**options)
