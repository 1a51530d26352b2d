"""`lmcl eval`: a finished run's model on a part of its own set, or on another set."""

from pathlib import Path
from typing import Literal

import click
import msgspec
import torch
from accelerate import Accelerator

from lmcl.config import load_config
from lmcl.errors import LmclError
from lmcl.evaluate import Pixels, Place, judge
from lmcl.files import write_atomic
from lmcl.metrics import Evaluation
from lmcl.outcome import evaluate_judged, metrics_tree, predictions
from lmcl.release import load_model
from shards.read import open_set
from shards.split import load_split

_PARTS = ("train", "val", "test", "all")


@click.command(
    epilog="EXAMPLES: lmcl eval runs/livec --split val · lmcl eval runs/livec --data data/koniq10k"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", help="Another packed set (folder or URL) [the run's own].")
@click.option(
    "--split",
    "part",
    default="test",
    show_default=True,
    help="A part of the run's split (train, val, test), `all`, or the name of a split of --data.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(run: Path, data: str | None, part: str, batch_size: int, no_progress: bool) -> None:
    """Judge a run's model; predictions and figures are written into the run folder."""
    found, path = evaluate_run(
        run, data=data, part=part, batch_size=batch_size, progress=not no_progress
    )
    click.echo(
        f"{path.stem}: SRCC {found.srcc:.4f}  PLCC {found.plcc_raw:.4f}  "
        f"PLCC after the fit {found.plcc_fit4:.4f}  ({found.n} images)\npredictions: {path}"
    )


def evaluate_run(
    run: Path, *, data: str | None, part: str, batch_size: int, progress: bool
) -> tuple[Evaluation, Path]:
    """Predictions and figures of a run's model on one part of one set.

    Across sets the whole of the other set is taken (`part` = test or all), as the field does; the
    model's scale and direction are brought to the set's own by both ranges.

    Returns:
        The figures, and the predictions file.

    Raises:
        LmclError: If the run, its model, the set or the part is not there.
    """
    config = load_config(run / "config.toml")
    released = load_model(run / "model")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    place = Place(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        backend=config.runtime.backend,
        threads=config.runtime.threads or None,
        progress=progress and accelerator.is_main_process,
    )
    other = data is not None and str(data) != config.data.root
    shard_set = open_set(data if data is not None else config.data.root)
    if part == "all" or (other and part == "test"):
        ids, name = shard_set.ids(), "all"
    elif part in _PARTS:
        ids, name = load_split(shard_set, config.data.split).part(part), part
    else:
        ids, name = load_split(shard_set, part).part("test"), part
    if not len(ids):
        raise LmclError(f"{shard_set.root}: part {part!r} is empty; choose another", exit_code=3)
    precision: dict[Literal["no", "bf16", "fp16"], torch.dtype] = {
        "no": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    pixels = Pixels(
        mean=released.card.mean,
        std=released.card.std,
        precision=precision[config.runtime.precision],
    )
    judged = judge(
        released.model.to(place.device),
        shard_set,
        ids,
        crops=released.card.crops,
        pixels=pixels,
        place=place,
        batch_size=batch_size,
        title=f"judging {shard_set.name} {name}",
    )
    found = evaluate_judged(shard_set, judged)
    stem = f"{shard_set.name}-{name}" if other else name
    path = run / "predictions" / f"{stem}.csv"
    if place.is_main:
        max_side = released.card.crops.max_side
        predictions(shard_set, judged, name, None, max_side=max_side).write_csv(path)
        tree = metrics_tree(shard_set, {name: judged}, {name: found}, name)
        tree["trained_on"] = released.card.training_set
        text = msgspec.json.format(msgspec.json.encode(tree), indent=2)
        write_atomic(run / "predictions" / f"{stem}.metrics.json", text + b"\n")
    accelerator.wait_for_everyone()
    return found, path
