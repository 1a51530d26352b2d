"""Checks before the first step: what a start refuses and `--dry-run` refuses too."""

import difflib
import hashlib
import logging
import os
import shutil
import tomllib
from pathlib import Path

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from timm.optim import get_optimizer_info, list_optimizers

from lmcl.config import (
    Config,
    EvaluationConfig,
    RuntimeConfig,
    TrainConfig,
    binding_differences,
    parse_run_config,
)
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.data import epoch_images
from lmcl.method.lr_schedule import same_until
from lmcl.method.objective import ObjectiveConfig
from lmcl.models.encoder import Encoder
from lmcl.models.saliency import SaliencyConfig, best_window
from lmcl.training.checkpoint import (
    State,
    best_path,
    list_checkpoints,
    load_tensors,
    read_checkpoint,
    read_newest,
)
from lmcl.training.run_dir import LENGTH, RunDir
from lmcl.utils.kernels import LossPlan
from pipeline.backends.select import DecodeChoice
from pipeline.decode_config import same_pixels
from shards.errors import ShardError
from shards.joined import JoinedSet
from shards.read import ShardSet
from shards.source_files import read_text
from shards.splits.split import Split
from shards.text import printable

logger = logging.getLogger(__name__)

_LEAST_COMPILED_STEPS = 100
"""On a processor; four steps were seen to take two minutes, nearly all of it compiling."""
_FEW = 5
"""Images whose SRCC takes a handful of values: two of them have 1 or -1."""
_ALIKE, _NARROW = 0.9, 0.01
"""Share of equal scores, and deviation on the scale 0 to 1, that are worth a word."""


def check_required(runtime: RuntimeConfig, choice: DecodeChoice, loss: LossPlan | None) -> None:
    """Refuse a fall-back from what the configuration cannot do without.

    Raises:
        ConfigError: Names the part, what was taken instead, and why.
    """
    if "gpu-decode" in runtime.require and choice.decoder != "gpu":
        raise ConfigError(
            f"runtime.require asks for 'gpu-decode', but images are decoded by {choice.recipe} "
            f"({choice.reason}); run on a machine with a GPU and DALI, or take it out of "
            "runtime.require"
        )
    if "fused-loss" in runtime.require and (loss is None or loss.backend != "triton"):
        taken = str(loss) if loss else "objective.contrastive_weight is 0, so there is none"
        raise ConfigError(
            f"runtime.require asks for 'fused-loss', but {taken}; change what stands in the way, "
            "or take it out of runtime.require"
        )


def check_data(config: Config, shard_set: ShardSet, split: Split, world_size: int) -> None:
    """Refuse a set, a split and a configuration that do not fit each other."""
    where = f"{shard_set.root}, split {split.name!r}"
    if isinstance(shard_set, JoinedSet):
        _check_sets(shard_set, split, config.evaluation)
    images = epoch_images(config.data, shard_set, split)
    _check_labels(where, shard_set, split)
    _check_parts(where, shard_set, split, config.evaluation, patience=config.train.patience)
    _check_batch_size(where, images, config.train, world_size)
    # A view larger than what crops are cut from would be blown up.
    view, longest = config.saliency.view, config.crops.max_side or config.crops.short_side
    if longest is not None and view > longest:
        raise ConfigError(
            f"saliency.view is {view} pixels, larger than crops.max_side or crops.short_side "
            f"= {longest}; lower "
            "saliency.view"
        )


def _check_sets(joined: JoinedSet, split: Split, evaluation: EvaluationConfig) -> None:
    """Refuse a set that has nothing to learn from, to choose by or to be judged on."""
    val = ["val"] if evaluation.select == "best" else []
    for part in dict.fromkeys(["train", *val, evaluation.part]):
        counts = np.bincount(joined.set_of(split.part(part)), minlength=len(joined.sets))
        if counts.all():
            continue
        name = joined.names[int(np.argmin(counts))]
        way = " or set evaluation.select = 'last'" if part == "val" else ""
        raise ConfigError(
            f"{name}: its {part} part is empty, and each of data.sets needs one; make another "
            f"split of it (`lmcl-shard split`), leave the set out{way}",
            exit_code=3,
        )


def _check_labels(where: str, shard_set: ShardSet, split: Split) -> None:
    if shard_set.score is None:
        raise LmclError(
            f"{where}: the set has no scores, so nothing can be learned from it; `lmcl score` "
            "gives it some",
            exit_code=3,
        )
    for part in ("train", "val", "test"):
        unlabelled = split.part(part)[np.isnan(shard_set.unit_mos()[split.part(part)])]
        if len(unlabelled):
            raise LmclError(
                f"{where}: {len(unlabelled)} images of the {part} part have no score (ids "
                f"{unlabelled[:5].tolist()}); leave them out of the split or give them one",
                exit_code=3,
            )


def _without_srcc(mos: NDArray[np.float64]) -> str:
    """What a part is that has no SRCC whatever is predicted; empty if it may have one."""
    if len(mos) == 1:
        return "one image"
    return f"{len(mos)} images with equal scores" if len(mos) and np.ptp(mos) == 0 else ""


def _check_parts(
    where: str, shard_set: ShardSet, split: Split, evaluation: EvaluationConfig, *, patience: int
) -> None:
    if not len(split.part("train")):
        raise LmclError(f"{where}: the train part is empty; make a split with one", exit_code=3)
    if not len(split.part(evaluation.part)):
        raise LmclError(
            f"{where}: the {evaluation.part} part is empty; set evaluation.part to another "
            "one or make a split with `lmcl-shard split`",
            exit_code=3,
        )
    if patience and not len(split.part("val")):
        raise ConfigError(
            f"{where}: train.patience = {patience} waits for the SRCC of a val part, and this "
            "split has none; set it to 0, or make one with `lmcl-shard split --val-fraction 0.1`"
        )
    if patience and (why := _without_srcc(shard_set.unit_mos()[split.part("val")])):
        raise ConfigError(
            f"{where}: train.patience = {patience} waits for the SRCC of the val part, which is "
            f"{why} and has none; set it to 0, or make a split with a larger val part"
        )
    if evaluation.select == "best" and not len(split.part("val")):
        raise ConfigError(
            f"{where}: evaluation.select = 'best' needs a val part, and this split has none; set "
            "evaluation.select = 'last', or make one with `lmcl-shard split --val-fraction 0.1`"
        )


def check_optimizer(name: str) -> None:
    """Refuse an optimiser that timm does not know, or that asks for more than a gradient.

    Raises:
        ConfigError: Names near ones.
    """
    known = list_optimizers()
    if name not in known or get_optimizer_info(name).second_order:
        near = difflib.get_close_matches(name, known, n=3) or ["adamw", "sgd", "lamb"]
        raise ConfigError(
            f"train.optimizer = {printable(name, 80)!r} is none of timm's optimisers that take a "
            f"gradient as it is; try one of {', '.join(near)}"
        )


def _check_batch_size(where: str, images: int, train: TrainConfig, world_size: int) -> None:
    # One image a rank is always allowed: padding fills what is missing, and counts nowhere.
    most = -(-images // world_size) * world_size
    if train.batch_size > most:
        raise ConfigError(
            f"train.batch_size is {train.batch_size} images, but {where} has {images} to "
            f"train on; set it to at most {most}"
        )


def warn_of_scores(shard_set: ShardSet, split: Split, evaluation: EvaluationConfig) -> list[str]:
    """What is odd about the scores that are learned from, chosen by and judged on."""
    mos, found = shard_set.unit_mos(), []
    train, val = mos[split.part("train")], mos[split.part("val")]
    values, counts = np.unique(train, return_counts=True)
    if len(train) == 1:
        found.append("the train part is one image, from whose score nothing can be learned")
    elif len(values) == 1:
        found.append(
            f"all {len(train)} scores of the train part are equal, so there is nothing to learn; "
            "look at the set with `lmcl-shard info`"
        )
    elif counts.max() > _ALIKE * len(train) or train.std() < _NARROW:
        found.append(
            f"the scores of the train part hardly differ ({counts.max()} of {len(train)} are "
            f"equal, their deviation is {train.std():.2g} of the scale): a model that always gives "
            "their mean looks good by its error; look at the set with `lmcl-shard info`"
        )
    if evaluation.select == "best" and (what := _without_srcc(val)):
        found.append(
            f"the val part is {what}, which has no SRCC: no epoch can be chosen by it, and the "
            "last one will be evaluated; make a split with a larger val part, or set "
            "evaluation.select = 'last'"
        )
    elif evaluation.select == "best" and len(val) < _FEW:
        found.append(
            f"the val part is {len(val)} images: which epoch has the highest SRCC on so few is "
            "nearly chance; make a split with a larger val part, or set evaluation.select = 'last'"
        )
    if what := _without_srcc(mos[split.part(evaluation.part)]):
        found.append(
            f"the {evaluation.part} part, which the run is judged on, is {what}: there will be no "
            "SRCC and no PLCC; make a split with a larger one"
        )
    return found


def warn_of_objective(objective: ObjectiveConfig) -> list[str]:
    """What the loss leaves without a gradient."""
    if objective.contrastive_weight < 1:
        return []
    return [
        "objective.contrastive_weight = 1 leaves the scores no gradient: they stay what random "
        "weights make of them, and every figure is chance; set it below 1 (0.1 is the default)"
    ]


def check_compile(config: Config, *, images: int, world_size: int, device: torch.device) -> None:
    """Refuse `runtime.compile` where it cannot pay, or would compile again and again.

    Args:
        config: Of the run.
        images: Of the train part.
        world_size: Processes.
        device: Of the networks.

    Raises:
        ConfigError: Says why, and what to set.
    """
    runtime, train = config.runtime, config.train
    if not runtime.compile:
        return
    share = train.batch_size // world_size
    if runtime.micro_batch and share % runtime.micro_batch:
        raise ConfigError(
            f"runtime.compile compiles for one shape, and runtime.micro_batch = "
            f"{runtime.micro_batch} does not divide a rank's {share} images, so the last part "
            "would have another; set runtime.micro_batch to a divisor, or runtime.compile = false"
        )
    if device.type != "cpu":
        return
    steps = train.epochs * -(-images // train.batch_size)
    if steps < _LEAST_COMPILED_STEPS:
        raise ConfigError(
            f"runtime.compile cannot pay: compiling takes minutes on a processor, and this run "
            f"takes {steps} steps; set runtime.compile = false, or train for at least "
            f"{_LEAST_COMPILED_STEPS} steps"
        )
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "runtime.compile needs a C++ compiler on a processor, and there is no g++ here (CXX "
            "names another one); install one, or set runtime.compile = false"
        )


@torch.no_grad()
def check_saliency(encoder: Encoder, saliency: SaliencyConfig) -> None:
    """Refuse a window, a number of layers or a view that the encoder's maps do not have.

    One empty view goes through the encoder, as whole images will.

    Raises:
        ConfigError: Says what the encoder has.
    """
    device, was_training = next(encoder.parameters()).device, encoder.training
    view = torch.zeros(1, 3, saliency.view, saliency.view, device=device)
    maps = encoder.eval().cls_attention(view, layers=saliency.layers)
    encoder.train(was_training)
    best_window(maps.float().cpu(), saliency.window)


def hash_images(shard_set: ShardSet, split: Split) -> str:
    """A hash over the bytes of all images of a split, part by part; names may be another set's."""
    found = hashlib.sha256()
    for part in ("train", "val", "test"):
        found.update(shard_set.samples.sha256[split.part(part)].tobytes())
    return found.hexdigest()


def check_state(state: State, config: Config, shard_set: ShardSet, split: Split) -> None:
    """Refuse a checkpoint of another experiment or other data.

    Raises:
        ConfigError: With exit code 5.
    """
    theirs = parse_run_config(tomllib.loads(state.config), where="the checkpoint's configuration")
    changed = binding_differences(config, theirs)
    if resized := [line for line in changed if line.startswith(LENGTH)]:
        _check_length(
            state,
            config,
            theirs.train.epochs,
            images=epoch_images(config.data, shard_set, split),
        )
        changed.remove(resized[0])
    if changed:
        raise ConfigError(
            f"the checkpoint is of another configuration (asked / found there): "
            f"{'; '.join(changed[:5])}; resume with that run's own config.toml, or start a new run "
            "in another --output",
            exit_code=5,
        )
    is_other = bool(state.images) and state.images != hash_images(shard_set, split)
    if is_other or (state.data and state.data != split.hash):
        raise ConfigError(
            f"the checkpoint was trained on other data than {shard_set.root}, split "
            f"{split.name!r}: the set's names, the images or the parts differ; name the set it was "
            "trained on, or start a new run in another --output",
            exit_code=5,
        )


def _check_length(state: State, config: Config, before: int, *, images: int) -> None:
    """Refuse another length where the steps so far would have been others with it.

    Raises:
        ConfigError: With exit code 5; names what can be done.
    """
    epochs, at = config.train.epochs, state.position
    if at.epoch > epochs:
        raise ConfigError(
            f"train.epochs = {epochs}, and the run has {at.epoch} epochs behind it; ask for more, "
            "or go on from an earlier checkpoint by its path",
            exit_code=5,
        )
    if not is_exact(state, config, before, images=images):
        raise ConfigError(
            f"the run was begun with train.epochs = {before}, and with {epochs} its learning "
            f"rates so far would have been others (schedule.shape = {config.schedule.shape!r}); "
            "begin a new run with this one's weights by train.start_from = <run>/model, and with "
            "schedule.shape = 'wsd' if it may be made longer: that keeps its checkpoint from "
            "before the rate falls",
            exit_code=5,
        )


def is_exact(state: State, config: Config, before: int, *, images: int) -> bool:
    """Whether a checkpoint of a run of `before` epochs is one of the configuration's run as well.

    Args:
        state: The checkpoint.
        config: With another length.
        before: Epochs of the run that wrote it.
        images: Of the train part.
    """
    at, steps = state.position, -(-images // config.train.batch_size)
    done = at.epoch + at.step / steps
    return same_until(config.schedule, done, epochs=config.train.epochs, before=before)


def newest_state(run_dir: RunDir, config: Config, *, images: int) -> State | None:
    """The newest whole checkpoint; of another length, the newest that a run of this one has too.

    `wsd` keeps the checkpoint at the end of its stable phase for that. Where there is none the
    newest is given, and `check_state` refuses it.
    """
    newest = read_newest(run_dir.checkpoints)
    if newest is None:
        return None
    asked = parse_run_config(tomllib.loads(newest.config), where="the checkpoint").train.epochs
    if asked >= config.train.epochs:
        return newest  # nothing that was learned is taken back unasked
    for path in [None, *list_checkpoints(run_dir.checkpoints)]:
        try:
            state = read_checkpoint(path) if path else newest
        except LmclError:
            continue  # damaged: said by `read_newest` if it is the newest
        theirs = parse_run_config(tomllib.loads(state.config), where="the checkpoint")
        before, epochs = theirs.train.epochs, config.train.epochs
        if before == epochs:
            return state
        if state.position.epoch <= epochs and is_exact(state, config, before, images=images):
            logger.info(
                "the run of %d epochs is made %d long; it goes on from epoch %d, which both have",
                *(before, epochs, state.position.epoch + 1),
            )
            return state
    return newest


def check_recipe(run_dir: RunDir, choice: DecodeChoice) -> None:
    """Refuse to go on with other pixels than the run began with.

    Raises:
        ConfigError: With exit code 5.
    """
    try:
        text = read_text(run_dir.root / "environment.json", limit_bytes=1 << 20)
        before = str(msgspec.json.decode(text)["decode"])
    except (OSError, ShardError, msgspec.DecodeError, KeyError, TypeError):
        return  # another folder, or one of a version that did not write it down
    if not same_pixels(before, choice.recipe):
        raise ConfigError(
            f"{run_dir.root}: was decoded by {before} so far, here it would be "
            f"{choice.recipe} ({choice.reason}), whose pixels differ; set "
            "runtime.decode to the decoder it began with, on a machine that has it, or start a new "
            "run in another --output",
            exit_code=5,
        )


def find_best(run_dir: RunDir, epoch: int, resume: str) -> Path:
    """The weights of the best epoch so far: in the run, or beside the checkpoint named."""
    own = best_path(run_dir.checkpoints, epoch)
    if resume == "auto" or own.exists():
        return own
    return Path(resume).parent / own.name


def check_best(run_dir: RunDir, epoch: int, resume: str, *, select: str) -> None:
    """Refuse to train on towards an end that would look for weights which are lost.

    Args:
        run_dir: Of the run.
        epoch: The best one so far; -1 if there is none.
        resume: `auto`, or the checkpoint the run goes on from.
        select: `evaluation.select`.

    Raises:
        LmclError: If the best epoch's weights are missing (exit code 4) or damaged (5).
    """
    if epoch < 0:
        return
    path = find_best(run_dir, epoch, resume)
    is_copied = path.parent != run_dir.checkpoints
    if select == "last" and not is_copied:
        return
    try:
        load_tensors(path)
    except LmclError as error:
        if is_copied:
            raise LmclError(
                f"the checkpoint's best epoch is {epoch + 1}, and its weights are not beside "
                f"it ({error}); copy the whole checkpoints folder, or resume in the run's own",
                exit_code=4,
            ) from error
        raise LmclError(
            f"{path}: the weights of the best epoch so far ({epoch + 1}) cannot be used ({error}); "
            "bring that file back, or go on with --set evaluation.select=last, which takes the "
            "last epoch's weights in the end",
            exit_code=error.exit_code,
        ) from error
