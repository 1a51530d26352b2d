"""Set-up of a run: open the data, build student, teacher and optimiser, resume, train, finish."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from timm.optim import create_optimizer_v2, get_optimizer_info

from lmcl.config import (
    Config,
    RuntimeConfig,
    TrainConfig,
    flatten,
    load_run_config,
    with_precision,
)
from lmcl.distributed import RankContext, is_lost_peer, make_rank_context
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.calibrate import sample_ids
from lmcl.evaluation.data import epoch_images, epoch_shares, open_data
from lmcl.evaluation.predict import CropLoader, CropSource, PixelSource
from lmcl.features.build import FeatureCacheBuilder, check_cacheable
from lmcl.features.cache import FeatureLoader, FeatureSource
from lmcl.method.lr_schedule import schedule_line, schedule_warnings, trace_schedule
from lmcl.method.objective import ObjectiveConfig, plan_objective
from lmcl.method.teacher import Teacher
from lmcl.models.normalization import find_normalization
from lmcl.models.precision import PrecisionChoice, choose_precision, warn_of_emulation
from lmcl.models.preprocess import Preprocessing
from lmcl.models.quality_model import QualityModel, enable_gradient_checkpointing
from lmcl.models.training_images import TrainingImages
from lmcl.training.checkpoint import (
    Position,
    State,
    best_path,
    load_tensors,
    read_checkpoint,
    save_tensors,
)
from lmcl.training.checks import (
    check_best,
    check_compile,
    check_data,
    check_optimizer,
    check_recipe,
    check_required,
    check_saliency,
    check_state,
    find_best,
    hash_images,
    newest_state,
    warn_of_objective,
    warn_of_scores,
)
from lmcl.training.finish import Outcome, write_outcome
from lmcl.training.grad_cache import GradCache, check_divisible
from lmcl.training.init_from import start_from_model, training_images_of
from lmcl.training.launcher import parents_command, refuse_ignored
from lmcl.training.logger import CollapseWatch, MetricsLogger
from lmcl.training.lora import add_lora, lora_words
from lmcl.training.param_groups import freeze_backbone, parameter_groups
from lmcl.training.rating_weights import rating_weights
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import InterruptedRunError, StopSignal, stop_on_signals, way_on
from lmcl.training.soft_labels import soft_labels
from lmcl.training.student import make_student
from lmcl.training.trainer import Trainer, training_crops, uncompiled
from lmcl.utils.environment import describe_environment, engines_line
from lmcl.utils.kernels import LossPlan, announce, read_chip
from lmcl.utils.trackers import Trackers
from pipeline.backends.select import DecodeChoice
from pipeline.balanced_sampler import BalancedSampler, score_ranges
from pipeline.loader import Loader, decode_choice
from shards.joined import JoinedSet
from shards.lock import lock_folder
from shards.read import ShardSet
from shards.splits.split import Split

logger = logging.getLogger(__name__)

_HALVES: dict[str, Literal["bf16", "fp16"]] = {"bf16": "bf16", "fp16": "fp16"}
_MOST_RANGES = 8
"""Ranges of scores that a line names."""
_RANK_TIMEOUT = timedelta(hours=24)
"""How long ranks wait for one another: rank 0 alone builds the feature cache (`runtime.cells`).
When a rank dies the launcher ends the others, however long they would wait."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    """What a run learns from and is evaluated on."""

    shard_set: ShardSet
    split: Split
    loader: CropLoader
    """Training batches."""
    source: CropSource
    """Crops for saliency passes and evaluation."""


def fit(config: Config, output: Path, *, resume: str = "", progress: bool = True) -> Outcome:
    """Train, evaluate and report one configuration in one run folder.

    Every process of an `accelerate launch` calls this with the same arguments.

    Args:
        config: The run.
        output: Its folder; made if it is not there.
        resume: Empty: a new run. `auto`: the newest whole checkpoint of the folder, or a new run
            if there is none. Otherwise the path of a checkpoint.
        progress: Show bars on a terminal.

    Raises:
        ConfigError: If configuration, data and machine do not fit each other.
        LmclError: If something is missing or a run goes wrong.
    """
    with stop_on_signals() as stop, hold_run_folder(output, "lmcl train"):
        return fit_held(config, output, resume=resume, progress=progress, stop=stop)


def fit_held(
    config: Config, output: Path, *, resume: str, progress: bool, stop: StopSignal
) -> Outcome:
    """`fit` for a caller that holds the run folder (`hold_run_folder`) and hears signals."""
    config = follow_launcher(config, os.environ)
    refuse_ignored(parents_command(), os.environ)
    try:
        trainer = prepare(config, output, resume=resume, progress=progress, stop=stop)
        try:
            trainer.train()
            with uncompiled(config.runtime.compile):
                return write_outcome(trainer)
        finally:
            trainer.close()
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        raise LmclError(
            f"{output}: another process of this run ended, so this one cannot go on; what it said "
            "stands above, and if it said nothing the system may have killed it for want of "
            f"memory (`dmesg`). Checkpoints written so far stand, and {way_on()} goes on from the "
            "newest"
        ) from error
    except InterruptedRunError:
        # Any rank may be the only one that was signalled outside the steps.
        RunDir(output).mark_interrupted()
        raise


def follow_launcher(config: Config, environment: Mapping[str, str]) -> Config:
    """The configuration with the precision and the compiler that `accelerate launch` was asked for.

    Raises:
        ConfigError: If the configuration says otherwise, or there is nothing of the kind here.
    """
    asked_for = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    runtime = config.runtime
    if asked_for not in ("no", "", runtime.precision):
        name = _HALVES.get(asked_for)
        if runtime.precision != "auto" or name is None:
            raise ConfigError(
                f"accelerate launch was asked for --mixed_precision {asked_for} (or its "
                f"configuration file says so), and runtime.precision is {runtime.precision!r}; "
                "leave that option out (--mixed_precision no), or set runtime.precision to the same"
                + ("" if asked_for in ("bf16", "fp16") else ", which can be bf16 or fp16")
            )
        config = with_precision(config, name)
    compiler = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler not in ("no", "") and not (compiler == "inductor" and runtime.compile):
        raise ConfigError(
            f"accelerate launch was asked for --dynamo_backend {compiler}; here the student is "
            "compiled by runtime.compile = true (inductor): set that, and leave the option out"
        )
    return config


@contextmanager
def hold_run_folder(output: Path, purpose: str) -> Iterator[None]:
    """Keep other runs out of a run folder while this one is in it; rank 0 does so for all.

    Args:
        output: The folder; made if it is not there, and its parents.
        purpose: Of this process, for the sentence another one gets.

    Raises:
        LockedError: If another run is in it (exit code 2), a requeued job's first copy for one.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    try:
        with lock_folder(output, purpose):
            yield
    finally:
        # A run that was refused before it wrote anything leaves no folder.
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@dataclass(frozen=True, kw_only=True)
class _CheckedStart:
    """A start that nothing stands in the way of, and what was made to find that out."""

    shard_set: ShardSet
    split: Split
    student: QualityModel
    """With its first weights, before a checkpoint's."""
    loss: LossPlan | None
    choice: DecodeChoice
    image_weights: torch.Tensor | None
    """Of the set's images, where `objective.image_weight` asks for them."""
    soft_labels: torch.Tensor | None
    """Distributions of the images' ratings, where the head gives one."""
    training_images: TrainingImages
    """What the model will have seen when the run ends."""
    state: State | None
    """The checkpoint the run goes on from; None for a new one."""
    rates: str
    """The learning rates, in one line."""
    warnings: tuple[str, ...]
    """What may be meant and probably is not."""


def check_start(
    config: Config, run_dir: RunDir, *, resume: str, device: torch.device, world_size: int
) -> _CheckedStart:
    """Everything that can be found wrong before the first step; nothing is written.

    A start and `--dry-run` both go through here, so what one refuses the other does.

    Raises:
        ConfigError: If configuration, data and machine do not fit each other.
        LmclError: If something is missing or damaged.
    """
    check_network_precision(config.runtime.precision, has_gpu=device.type == "cuda")
    check_shares(config.train.batch_size, world_size)
    shard_set, split = open_data(config.data)
    check_data(config, shard_set, split, world_size)
    images = epoch_images(config.data, shard_set, split)
    run_dir.check(config, resume=bool(resume))
    check_optimizer(config.train.optimizer)
    student = make_student(config, device)
    _begin_scales(student, shard_set, split)
    loss = _plan_loss(config.objective, student)
    start_from_model(student, config, shard_set=shard_set, split=split)
    freeze_backbone(student, config.train)
    add_lora(student, config.train, crop_size=config.crops.size)
    _make_optimizer(student, config.train, lr=config.schedule.lr)
    check_saliency(student.encoder, config.saliency)
    _check_runtime(student, config)
    check_compile(config, images=images, world_size=world_size, device=device)
    choice = decode_choice(shard_set, config.runtime.decoding, device)
    check_required(config.runtime, choice, loss)
    weights = rating_weights(config.objective, shard_set, split)
    state = _state_to_resume(run_dir, resume, config, images=images)
    if state is not None:
        check_state(state, config, shard_set, split)
        check_recipe(run_dir, choice)
        check_best(run_dir, state.best_epoch, resume, select=config.evaluation.select)
    rates, warnings = _look_at_rates(config, images)
    warnings += warn_of_objective(config.objective)
    warnings += warn_of_scores(shard_set, split, config.evaluation)
    return _CheckedStart(
        shard_set=shard_set,
        split=split,
        student=student,
        loss=loss,
        choice=choice,
        image_weights=weights,
        soft_labels=soft_labels(config.objective, config.decoder.bins, shard_set, split),
        training_images=training_images_of(config, shard_set, split),
        state=state,
        rates=rates,
        warnings=tuple(warnings),
    )


def _look_at_rates(config: Config, images: int) -> tuple[str, list[str]]:
    """The learning rates of a run over so many images in one line, and what is odd about them."""
    schedule, epochs = config.schedule, config.train.epochs
    steps = -(-images // config.train.batch_size)
    curve = trace_schedule(schedule, steps_per_epoch=steps, epochs=epochs)
    return schedule_line(schedule, curve), schedule_warnings(schedule, curve, epochs=epochs)


def plan(config: Config, output: Path, *, resume: str = "", processes: int = 1) -> str:
    """What `fit` would do, in words, once everything it checks has been checked.

    The folder is held for the moment; nothing in it is written.

    Raises:
        ConfigError: As `fit`.
        LmclError: As `fit`.
    """
    config = follow_launcher(config, os.environ)
    refuse_ignored(parents_command(), os.environ)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world_size = int(os.environ.get("WORLD_SIZE", processes))
    run_dir = RunDir(output)
    precision = _find_precision(config, run_dir, resume, device)
    config = with_precision(config, precision.name)
    with hold_run_folder(output, "lmcl train --dry-run"):
        start = check_start(config, run_dir, resume=resume, device=device, world_size=world_size)
    split, crops, train = start.split, training_crops(config), config.train
    counts = ", ".join(f"{name} {len(split.part(name))}" for name in ("train", "val", "test"))
    shares = epoch_shares(config.data, start.shard_set, split)
    steps = -(-sum(shares) // train.batch_size)
    at = start.state.position if start.state else None
    lines = [
        engines_line(
            device, start.choice.line, precision.line, str(start.loss or "no contrastive loss")
        ),
        f"set {start.shard_set.named_version} in {start.shard_set.root}, split {split.name}: "
        f"{counts}",
        *_set_lines(config, start.shard_set, split, shares),
        f"{train.epochs} epochs x {steps} steps x {train.batch_size} images x "
        f"{crops.random + crops.salient} crops of {crops.size} px",
        start.rates,
        *filter(None, [balance_line(start.shard_set, split.part("train"), train)]),
        *(f"warning: {words}" for words in start.warnings),
        f"encoder {config.encoder.name}, weights "
        f"{train.start_from or config.encoder.weights or 'random'}",
        *filter(None, [lora_words(start.student)]),
        f"run folder {output}"
        + (f", going on at epoch {at.epoch + 1}, step {at.step}" if at else "")
        + (" (all its epochs are done)" if at and at.epoch >= train.epochs else ""),
    ]
    return "\n".join(lines)


def balance_line(shard_set: ShardSet, ids: NDArray[np.int64], train: TrainConfig) -> str:
    """How often an epoch shows the images of each range of scores; empty without balance."""
    if not train.balance:
        return ""
    mos = shard_set.samples.mos[ids]
    ranges = score_ranges(mos, train.balance)
    sampler = BalancedSampler(ranges=ranges, batch_size=train.batch_size, seed=train.seed)
    words = [
        f"{mos[one].min():.4g} to {mos[one].max():.4g}: {len(one)} images {drawn / len(one):.2g}x"
        for one, drawn in zip(ranges, sampler.draws().tolist(), strict=True)
    ]
    if len(words) > _MOST_RANGES:
        words = [*words[: _MOST_RANGES // 2], "...", *words[-_MOST_RANGES // 2 :]]
    return f"balanced over {len(ranges)} ranges of scores, in an epoch {', '.join(words)}"


def _set_lines(
    config: Config, shard_set: ShardSet, split: Split, shares: tuple[int, ...]
) -> list[str]:
    """Each set of a joint run in a line: its scale, its parts, its share of an epoch."""
    if not isinstance(shard_set, JoinedSet):
        return []
    lines = []
    for number, (name, share) in enumerate(zip(shard_set.names, shares, strict=True)):
        train, val, test = (
            int(np.sum(shard_set.set_of(split.part(part)) == number))
            for part in ("train", "val", "test")
        )
        scale = shard_set.scale_of(number).description
        lines.append(
            f"  {name} ({scale}): train {train}, val {val}, test {test}; {share} images an epoch "
            f"({share / sum(shares):.0%})"
        )
    negatives = "all sets" if config.objective.across_sets else "the crop's own set"
    return [*lines, f"  negatives are of {negatives}; the shared scale is {shard_set.names[0]}'s"]


def _begin_scales(student: QualityModel, shard_set: ShardSet, split: Split) -> None:
    """Let the lines to the sets' own scales begin at the moments of their train scores."""
    if student.scales is None or not isinstance(shard_set, JoinedSet):
        return
    train, mos = split.part("train"), shard_set.unit_mos()
    scores = [mos[train[shard_set.set_of(train) == k]] for k in range(len(shard_set.sets))]
    student.scales.match_moments(
        [float(one.mean()) for one in scores], [float(one.std()) for one in scores]
    )


def prepare(
    config: Config, output: Path, *, resume: str, progress: bool, stop: StopSignal | None = None
) -> Trainer:
    """A trainer at the position it starts from, on this rank."""
    accelerator, context = _make_ranks(config, progress=progress)
    run_dir = RunDir(output)
    precision = _settle_precision(config, run_dir, resume, accelerator)
    config = with_precision(config, precision.name)
    start = check_start(
        config,
        run_dir,
        resume=resume,
        device=accelerator.device,
        world_size=context.world_size,
    )
    # Every rank has looked at the folder before rank 0 writes into it.
    accelerator.wait_for_everyone()
    if context.is_main:
        run_dir.create(config)
    accelerator.wait_for_everyone()
    teacher = Teacher(start.student, config.teacher)
    _apply_runtime(start.student, config.runtime)
    data = _make_data(config, start.shard_set, start.split, context, start.student)
    trainer = _make_trainer(
        config, run_dir, accelerator, context, data, start.student, teacher, state=start.state
    )
    trainer.stop = stop or trainer.stop
    weights = start.image_weights
    trainer.image_weights = weights if weights is None else weights.to(accelerator.device)
    labels = start.soft_labels
    trainer.soft_labels = labels if labels is None else labels.to(accelerator.device)
    trainer.training_images = start.training_images
    trainer.images_sha256 = hash_images(start.shard_set, start.split)
    _resume(trainer, start.state, resume)
    _describe(trainer, start, precision)
    return trainer


def _settle_precision(
    config: Config, run_dir: RunDir, resume: str, accelerator: Accelerator
) -> PrecisionChoice:
    """What the networks of this run compute in: as asked, as it began, or as rank 0's device can.

    A run that is resumed on another machine keeps what it began with.
    """
    found = [PrecisionChoice(name="no", reason="")]
    if accelerator.is_main_process:
        found = [_find_precision(config, run_dir, resume, accelerator.device)]
    return broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]


def _find_precision(
    config: Config, run_dir: RunDir, resume: str, device: torch.device
) -> PrecisionChoice:
    asked = config.runtime.precision
    begun = _begun_precision(run_dir, resume) if asked == "auto" else None
    return begun or choose_precision(asked, device)


def _begun_precision(run_dir: RunDir, resume: str) -> PrecisionChoice | None:
    """The precision in the config.toml of the run that goes on; None where there is none."""
    origin = run_dir if resume in ("", "auto") else RunDir(Path(resume).parent.parent)
    if not (origin.has_begun and origin.config.is_file()):
        return None
    name = load_run_config(origin.config).runtime.precision
    return None if name == "auto" else PrecisionChoice(name=name, reason="as the run began")


def _make_ranks(config: Config, *, progress: bool) -> tuple[Accelerator, RankContext]:
    """Accelerate's view of this process, and ours.

    Raises:
        ConfigError: If the precision does not suit the machine.
    """
    precision = config.runtime.precision
    check_network_precision(precision, has_gpu=torch.cuda.is_available())
    # What of these a run follows is in its configuration by now (`follow_launcher`).
    os.environ.pop("ACCELERATE_DYNAMO_BACKEND", None)
    try:
        accelerator = Accelerator(
            # Without this a machine without a GPU is taken for a single process (decision 0005).
            cpu=not torch.cuda.is_available(),
            mixed_precision="fp16" if precision == "fp16" else "no",
            kwargs_handlers=[InitProcessGroupKwargs(timeout=_RANK_TIMEOUT)],
        )
    except RuntimeError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ.get('MASTER_PORT', '')}, by which the processes of a run find each "
            "other, is taken by another program; on one machine use `lmcl train --processes N`, "
            "`accelerate launch --main_process_port 0` or `torchrun --standalone`, which take a "
            "free one"
        ) from error
    runtime = config.runtime
    context = make_rank_context(
        accelerator,
        decode=runtime.decoding,
        progress=progress,
    )
    if not context.is_main:
        logging.getLogger("lmcl").setLevel(logging.WARNING)  # every rank says its own errors only
    return accelerator, context


def check_shares(images: int, world_size: int) -> None:
    """Refuse a batch that the ranks cannot share evenly.

    Raises:
        ConfigError: Names a multiple.
    """
    if images % world_size:
        raise ConfigError(
            f"train.batch_size is {images} images over all ranks, which {world_size} "
            f"processes cannot share evenly; choose a multiple of {world_size}"
        )


def check_network_precision(precision: str, *, has_gpu: bool) -> None:
    """Refuse a `runtime.precision` that this machine has no use for.

    Raises:
        ConfigError: If float16 is asked for without a GPU.
    """
    if precision == "fp16" and not has_gpu:
        raise ConfigError(
            "runtime.precision = 'fp16' needs a GPU, and there is none here; set it to 'auto' "
            "(bf16 where the processor multiplies in it) or 'no'"
        )


def _plan_loss(objective: ObjectiveConfig, student: QualityModel) -> LossPlan | None:
    """What the contrastive term runs in here, said before the first step; None without one.

    Raises:
        ConfigError: If it cannot run here as asked.
    """
    chip = read_chip(next(student.parameters()).device)
    try:
        return plan_objective(objective, chip, width=student.encoder.width)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_runtime(student: QualityModel, config: Config) -> None:
    """Refuse parts of a batch and kept features where the student's layers do not allow them.

    Raises:
        ConfigError: Names the layer, or the field.
    """
    if config.runtime.micro_batch:
        check_divisible(student)
    if config.runtime.cells:
        check_cacheable(student, pool=config.crops.pool, flip=config.train.flip)


def _apply_runtime(student: QualityModel, runtime: RuntimeConfig) -> None:
    """Trade memory for time, and compile, as the configuration asks."""
    if runtime.gradient_checkpointing:
        enable_gradient_checkpointing(student.encoder)
    if runtime.compile:
        # One graph, for training steps: evaluation stays as it is (`uncompiled`), so nothing is
        # compiled a second time for another shape.
        student.compile(dynamic=False)


def _make_data(
    config: Config, shard_set: ShardSet, split: Split, context: RankContext, student: QualityModel
) -> _Data:
    """Training batches, and crops for saliency and evaluation: pixels, or kept features."""
    crops = training_crops(config)
    loader = Loader(
        shard_set,
        split.part("train"),
        crops=crops,
        batch_size=config.train.batch_size // context.world_size,
        mode="train",
        seed=config.train.seed,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
        decode=context.decode,
        on_error=config.runtime.on_error,
        balance=config.train.balance,
        share_exponent=config.data.share_exponent,
    )
    if loader.skipped.size:
        split = _without_damaged(split, loader)
        check_data(config, shard_set, split, context.world_size)
    pixels = PixelSource(shard_set=shard_set, context=context)
    if not config.runtime.cells:
        return _Data(shard_set=shard_set, split=split, loader=loader, source=pixels)
    stem = check_cacheable(student, pool=config.crops.pool, flip=config.train.flip)
    builder = FeatureCacheBuilder(
        folder=Path(config.runtime.cells),
        shard_set=shard_set,
        stem=stem,
        crops=config.crops,
        saliency=config.saliency,
        hub=config.objective.hub,
        preprocessing=_make_preprocessing(config, context.device),
        context=context,
    )
    evaluated = np.union1d(split.part("val"), split.part(config.evaluation.part))
    # The run's end calibrates on some training images, at the places of evaluation.
    evaluated = np.union1d(evaluated, sample_ids(split.part("train")))
    caches = builder.build(split.part("train"), evaluated)
    cached = FeatureLoader(loader, caches.train, salient=crops.salient, device=context.device)
    source = FeatureSource(shard_set=shard_set, pixels=pixels, caches=caches, context=context)
    return _Data(shard_set=shard_set, split=split, loader=cached, source=source)


def _without_damaged(split: Split, loader: Loader) -> Split:
    """The split with those of its train part that the loader kept.

    Everything else that goes over the train part, the saliency pass for one, then does the same.
    """
    shown = ", ".join(str(one) for one in loader.skipped[:8].tolist())
    logger.warning(
        "runtime.on_error = 'skip': %d of the %d images of the train part are damaged and left "
        "out: ids %s%s",
        loader.skipped.size,
        len(split.train),
        shown,
        " and more" if loader.skipped.size > 8 else "",
    )
    return replace(split, train=loader.ids)


def _make_trainer(
    config: Config,
    run_dir: RunDir,
    accelerator: Accelerator,
    context: RankContext,
    data: _Data,
    student: QualityModel,
    teacher: Teacher,
    *,
    state: State | None,
) -> Trainer:
    at = state.position if state else Position(epoch=0, step=0)
    done = at.epoch * data.loader.steps + at.step
    optimizer = _make_optimizer(student, config.train, lr=config.schedule.lr)
    wrapped, optimizer = accelerator.prepare(student, optimizer)
    return Trainer(
        config=config,
        run_dir=run_dir,
        accelerator=accelerator,
        context=context,
        preprocessing=_make_preprocessing(config, context.device),
        shard_set=data.shard_set,
        split=data.split,
        student=wrapped,
        core=student,
        teacher=teacher,
        grad_cache=_make_grad_cache(config, wrapped, teacher, accelerator, context),
        optimizer=optimizer,
        loader=data.loader,
        source=data.source,
        metrics_logger=_make_metrics_logger(config, run_dir, context, done=done),
    )


def _make_grad_cache(
    config: Config,
    student: torch.nn.Module,
    teacher: Teacher,
    accelerator: Accelerator,
    context: RankContext,
) -> GradCache:
    goal = config.objective
    has_teacher_keys = goal.keys == "teacher" and goal.contrastive_weight > 0
    return GradCache(
        student=student,
        key_teacher=teacher if has_teacher_keys else None,
        accelerator=accelerator,
        preprocessing=_make_preprocessing(config, context.device),
        context=context,
        flip=config.train.flip,
        micro_batch=config.runtime.micro_batch,
        seed=config.train.seed,
    )


def _make_metrics_logger(
    config: Config, run_dir: RunDir, context: RankContext, *, done: int
) -> MetricsLogger:
    names = config.runtime.trackers if context.is_main else ()
    return MetricsLogger(
        run_dir,
        Trackers(names, run_dir.root, settings=flatten(config), done=done),
        CollapseWatch(limit=config.runtime.collapse_steps),
        enabled=context.is_main,
        progress=context.progress,
    )


def _make_preprocessing(config: Config, device: torch.device) -> Preprocessing:
    mean, std = find_normalization(config.encoder)
    precision = choose_precision(config.runtime.precision, device).dtype
    return Preprocessing(mean=mean, std=std, precision=precision)


def _make_optimizer(
    student: QualityModel, train: TrainConfig, *, lr: float
) -> torch.optim.Optimizer:
    if train.optimizer != "adamw":
        return _named_optimizer(student, train, lr=lr)
    return torch.optim.AdamW(parameter_groups(student, train), lr=lr, betas=train.betas)


def _named_optimizer(
    student: QualityModel, train: TrainConfig, *, lr: float
) -> torch.optim.Optimizer:
    """One of timm's optimisers over the same parameter groups.

    Raises:
        ConfigError: If a package it needs is not installed.
    """
    info = get_optimizer_info(train.optimizer)
    betas = {"betas": train.betas} if info.has_betas and info.num_betas == 2 else {}
    try:
        found: torch.optim.Optimizer = create_optimizer_v2(
            parameter_groups(student, train), opt=train.optimizer, lr=lr, weight_decay=0.0, **betas
        )
    except (AssertionError, ImportError, TypeError, ValueError) as error:
        raise ConfigError(
            f"train.optimizer = {train.optimizer!r} cannot be made ({error}); install what it "
            "needs, or set train.optimizer = 'adamw'"
        ) from error
    return found


def _resume(trainer: Trainer, state: State | None, resume: str) -> None:
    """Put the trainer where the checkpoint was taken; without one, empty its log."""
    if state is not None:
        trainer.restore_checkpoint(state)
        if trainer.context.is_main and state.best_epoch >= 0:
            best = find_best(trainer.run_dir, state.best_epoch, resume)
            if best.parent != trainer.run_dir.checkpoints:
                # A run that goes on in another folder takes its best weights along.
                save_tensors(
                    best_path(trainer.run_dir.checkpoints, state.best_epoch), load_tensors(best)
                )
        trainer.accelerator.wait_for_everyone()
        logger.info("resuming at epoch %d, step %d", state.position.epoch + 1, state.position.step)
    elif trainer.context.is_main:
        trainer.run_dir.rewind_log(epoch=0, step=0)


def _state_to_resume(run_dir: RunDir, resume: str, config: Config, *, images: int) -> State | None:
    if not resume:
        return None
    if resume == "auto":
        return newest_state(run_dir, config, images=images)
    return read_checkpoint(Path(resume))


def _describe(trainer: Trainer, start: _CheckedStart, precision: PrecisionChoice) -> None:
    """Say on what, by what and at which rates the run works; write it into environment.json."""
    loss, choice, device = start.loss, trainer.loader.choice, trainer.context.device
    if loss is not None:
        announce(loss, already_said=True)
    parts = (choice.line, precision.line, str(loss or "no contrastive loss"))
    trainer.engines = engines_line(device, *parts)
    if not trainer.context.is_main:
        return
    logger.info("%s", trainer.engines)
    logger.info("set %s, split %s", trainer.shard_set.named_version, trainer.split.name)
    shares = epoch_shares(trainer.config.data, trainer.shard_set, trainer.split)
    for line in _set_lines(trainer.config, trainer.shard_set, trainer.split, shares):
        logger.info("%s", line)
    crops = training_crops(trainer.config)
    views = crops.random + crops.salient
    warn_of_emulation(
        trainer.core, precision.dtype, device, size=crops.size, crops=views, learns=True
    )
    if trainer.config.runtime.compile:
        images = trainer.config.train.batch_size // trainer.context.world_size
        logger.info(
            "torch.compile: the student's training step, %d images x %d crops of %d px, before "
            "the first step (minutes on a processor); teacher, saliency passes and evaluation "
            "are not compiled",
            *(trainer.config.runtime.micro_batch or images, views, crops.size),
        )
    logger.info("%s", start.rates)
    if trainer.config.train.lora_rank:
        logger.info("%s", lora_words(trainer.core))
    if trainer.config.train.balance:
        logger.info(
            "%s",
            balance_line(trainer.shard_set, trainer.split.part("train"), trainer.config.train),
        )
    for words in start.warnings:
        logger.warning("warning: %s", words)
    found = describe_environment(
        device,
        world_size=trainer.context.world_size,
        decode=choice.recipe,
        decode_reason=choice.reason,
        precision=precision.line,
        loss=str(loss or ""),
    )
    trainer.run_dir.write_environment(found)
