"""`lmcl eval`: a finished run's model on a part of its own set, or on another set."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import click
import msgspec
import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmcl.config import Config, load_config
from lmcl.errors import LmclError
from lmcl.evaluate import Judged, Pixels, Place, judge
from lmcl.files import write_atomic
from lmcl.metrics import Evaluation, evaluate, fit_logistic
from lmcl.outcome import evaluate_judged, metrics_tree, predictions
from lmcl.release import ModelCard, load_model
from lmcl.report.scope import ON_THEMSELVES, ON_TRAIN, WHOLE, Scale, Scope, SplitFigures
from shards.errors import ShardError
from shards.manifest import MANIFEST
from shards.read import ShardSet, open_set
from shards.split import Protocol, Split, load_split, make_splits

_PARTS = ("train", "val", "test")
PROTOCOLS = (WHOLE, "70-10-20", "80-20", "official", "k-fold")
_PRECISION: dict[Literal["no", "bf16", "fp16"], torch.dtype] = {
    "no": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Which images of which set, by which rule."""

    data: str | None = None
    """Another set: a folder, a URL, or the name of a folder beside the run's own set."""
    part: str = "test"
    """train, val or test of the run's split, `all`, or the name of a split of the set."""
    protocol: str = WHOLE
    """Across sets: `whole`, or a rule by which splits of the other set are drawn."""


@click.command(
    epilog="EXAMPLES: lmcl eval runs/livec --split val · lmcl eval runs/livec --set koniq10k · "
    "lmcl eval runs/livec --data data/koniq10k --protocol 70-10-20"
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--data",
    "--set",
    "data",
    metavar="SET",
    help="Another packed set: folder, URL, or name of a folder beside the run's own set.",
)
@click.option(
    "--split",
    "part",
    default="test",
    show_default=True,
    help="A part of the run's split (train, val, test), `all`, or the name of a split of SET.",
)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOLS),
    default=WHOLE,
    show_default=True,
    help="On another set: all its images at once, or the test parts of its splits, the mapping "
    "fitted on their train parts, medians over the splits.",
)
@click.option("--batch-size", type=click.IntRange(1), default=32, show_default=True)
@click.option("--no-progress", is_flag=True, help="No progress bars.")
def command(
    run: Path, data: str | None, part: str, protocol: str, batch_size: int, no_progress: bool
) -> None:
    """Judge a run's model; predictions and figures are written into the run folder."""
    asked = Asked(data=data, part=part, protocol=protocol)
    found, scope, path = evaluate_run(run, asked, batch_size=batch_size, progress=not no_progress)
    click.echo(
        f"{path.stem}: SRCC {found.srcc:.4f}  PLCC {found.plcc_raw:.4f}  "
        f"PLCC after the fit {found.plcc_fit4:.4f}  ({found.n} images)\npredictions: {path}"
    )
    if scope.tested_on != scope.trained_on:
        click.echo(_across(scope))
    for name, value in _medians(scope.splits):
        click.echo(f"median of {len(scope.splits)} splits: {name} {value:.4f}")


def evaluate_run(
    run: Path, asked: Asked, *, batch_size: int, progress: bool
) -> tuple[Evaluation, Scope, Path]:
    """Predictions and figures of a run's model on one part of one set.

    Across sets the whole of the other set is judged (`part` = test or all), as the field does,
    less those images the model was trained on byte for byte; predictions are brought to the set's
    own scale and direction by both ranges.

    Returns:
        The figures over all judged images, what they are about, and the predictions file.

    Raises:
        LmclError: If the run, its model, the set or the part is not there, or splits are asked
            for on the set the model was trained on.
    """
    config = load_config(run / "config.toml")
    released = load_model(run / "model")
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    place = _place(accelerator, config, progress)
    shard_set, other = _open(asked.data, config)
    ids, name = _chosen(shard_set, asked, config, other=other)
    scope = _scope(shard_set, released.card, asked, name)
    if other:
        ids, scope = _without_training_images(shard_set, ids, scope, config)
    if not len(ids):
        raise LmclError(
            f"{shard_set.root}: part {asked.part!r} holds no image to judge "
            f"({scope.left_out} are training images of the run); choose another",
            exit_code=3,
        )
    judged = judge(
        released.model.to(place.device),
        shard_set,
        ids,
        crops=released.card.crops,
        pixels=Pixels(
            mean=released.card.mean,
            std=released.card.std,
            precision=_PRECISION[config.runtime.precision],
        ),
        place=place,
        batch_size=batch_size,
        title=f"judging {shard_set.name} {name}",
    )
    found = evaluate_judged(shard_set, judged)
    scope = replace(scope, images=len(ids), splits=_over_splits(shard_set, judged, scope.protocol))
    stem = f"{shard_set.name}-{name}" if other else name
    path = run / "predictions" / f"{stem}.csv"
    if place.is_main:
        max_side = released.card.crops.max_side
        predictions(shard_set, judged, name, None, max_side=max_side).write_csv(path)
        tree = metrics_tree(shard_set, {name: judged}, {name: found}, name)
        tree["trained_on"] = released.card.training_set
        tree["scope"] = msgspec.to_builtins(scope)
        text = msgspec.json.format(msgspec.json.encode(tree), indent=2)
        write_atomic(run / "predictions" / f"{stem}.metrics.json", text + b"\n")
    accelerator.wait_for_everyone()
    return found, scope, path


def _place(accelerator: Accelerator, config: Config, progress: bool) -> Place:
    return Place(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        backend=config.runtime.backend,
        threads=config.runtime.threads or None,
        progress=progress and accelerator.is_main_process,
    )


def _open(data: str | None, config: Config) -> tuple[ShardSet, bool]:
    """The set to be judged, and whether it is another one than the run's own."""
    if data is None or data == config.data.root:
        return open_set(config.data.root), False
    beside = Path(config.data.root).parent / data
    # A bare name, as in `--set koniq10k`, means the folder beside the run's own set.
    if "://" not in data and not (Path(data) / MANIFEST).is_file() and beside.is_dir():
        return open_set(beside), True
    return open_set(data), True


def _chosen(
    shard_set: ShardSet, asked: Asked, config: Config, *, other: bool
) -> tuple[NDArray[np.int64], str]:
    """Ids to judge, and what the choice is called."""
    if asked.protocol != WHOLE:
        if not other:
            raise LmclError(
                f"--protocol {asked.protocol} on {shard_set.name}, the set this run was trained "
                "on: test images of other splits are its training images; train one run per "
                "split and compare them by `lmcl report RUN...`",
                exit_code=2,
            )
        return shard_set.ids(), asked.protocol
    if asked.part == "all" or (other and asked.part == "test"):
        return shard_set.ids(), "all"
    if asked.part in _PARTS and not other:
        return load_split(shard_set, config.data.split).part(asked.part), asked.part
    return load_split(shard_set, asked.part).part("test"), asked.part


def _scope(shard_set: ShardSet, card: ModelCard, asked: Asked, name: str) -> Scope:
    score, own = shard_set.score, card.score
    return Scope(
        tested_on=shard_set.name,
        part=name,
        trained_on=card.training_set,
        # Without labels predictions stay in [0, 1], higher = better.
        scale=Scale(low=0.0, high=1.0)
        if score is None
        else Scale(
            kind=score.kind,
            low=score.low,
            high=score.high,
            higher_is_better=score.higher_is_better,
        ),
        trained_scale=Scale(
            kind=own.kind, low=own.low, high=own.high, higher_is_better=own.higher_is_better
        ),
        images=0,
        protocol=asked.protocol,
        mapping=ON_THEMSELVES if asked.protocol == WHOLE else ON_TRAIN,
    )


def _without_training_images(
    shard_set: ShardSet, ids: NDArray[np.int64], scope: Scope, config: Config
) -> tuple[NDArray[np.int64], Scope]:
    """Leave out what the model learned from or was chosen on: sets share images."""
    try:
        own = open_set(config.data.root)
        split = load_split(own, config.data.split)
    except (ShardError, OSError):
        return ids, replace(scope, left_out_known=False)
    seen = own.samples.sha256[np.concatenate([split.train, split.val])]
    known = {digest.tobytes() for digest in seen}
    fresh = np.array(
        [digest.tobytes() not in known for digest in shard_set.samples.sha256[ids]], dtype=bool
    )
    return ids[fresh], replace(scope, left_out=int(np.sum(~fresh)))


def _over_splits(shard_set: ShardSet, judged: Judged, protocol: str) -> tuple[SplitFigures, ...]:
    """Figures per split of the tested set; nothing for the whole set."""
    if protocol == WHOLE:
        return ()
    return tuple(
        _of_split(shard_set, judged, split)
        for split in make_splits(shard_set, protocol=cast(Protocol, protocol))
    )


def _of_split(shard_set: ShardSet, judged: Judged, split: Split) -> SplitFigures:
    samples, score = shard_set.samples, shard_set.score
    assert score is not None  # drawing splits asks for labels
    raw, mos = score.from_unit(judged.score), samples.mos[judged.ids]
    test = np.isin(judged.ids, split.test)
    train = np.isin(judged.ids, split.train)
    fit = fit_logistic(raw[train], mos[train])
    found = evaluate(raw[test], mos[test], fit=fit, fit_on="train", resamples=0)
    figures = {
        name: None if np.isnan(found.figure(name)) else found.figure(name)
        for name in ("srcc", "krcc", "plcc_raw", "plcc_fit4", "rmse_fit4")
    }
    return SplitFigures(
        name=split.name, hash=split.hash, n=found.n, n_fit=int(np.sum(train)), **figures
    )


def _medians(splits: tuple[SplitFigures, ...]) -> list[tuple[str, float]]:
    found = []
    for name in ("srcc", "plcc_raw", "plcc_fit4"):
        values = [v for s in splits if (v := getattr(s, name)) is not None]
        if values:
            found.append((name, float(np.median(values))))
    return found


def _across(scope: Scope) -> str:
    left = (
        f"; {scope.left_out} training images left out"
        if scope.left_out
        else ""
        if scope.left_out_known
        else "; the training set is not here, so shared images were not looked for"
    )
    return (
        f"trained on {scope.trained_on} ({scope.trained_scale.label}), tested on "
        f"{scope.tested_on} ({scope.scale.label}): {scope.direction}{left}\n"
        f"mapping: {scope.mapping}"
    )
