"""Set-up of a run: open the data, build student, teacher and optimiser, resume, train, finish."""

import logging
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list

from kernels import LossPlan, announce, read_chip
from lmcl.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    RuntimeConfig,
    TrainConfig,
    binding_differences,
    flatten,
    load_run_config,
    parse_run_config,
    with_precision,
)
from lmcl.distributed import RankContext, make_rank_context
from lmcl.errors import ConfigError, LmclError
from lmcl.evaluation.calibrate import sample_ids
from lmcl.evaluation.predict import CropLoader, CropSource, PixelSource
from lmcl.features.build import FeatureCacheBuilder, check_cacheable
from lmcl.features.cache import FeatureLoader, FeatureSource
from lmcl.method.objective import ObjectiveConfig, plan_objective
from lmcl.method.teacher import Teacher
from lmcl.models.factory import make_encoder
from lmcl.models.normalization import find_normalization
from lmcl.models.precision import PrecisionChoice, choose_precision, warn_of_emulation
from lmcl.models.preprocess import Preprocessing
from lmcl.models.quality_model import QualityModel, enable_gradient_checkpointing
from lmcl.training.checkpoint import (
    State,
    best_path,
    load_tensors,
    read_checkpoint,
    read_newest,
    save_tensors,
)
from lmcl.training.finish import Outcome, write_outcome
from lmcl.training.grad_cache import GradCache, check_divisible
from lmcl.training.init_from import start_from_model
from lmcl.training.logger import CollapseWatch, MetricsLogger
from lmcl.training.rating_weights import rating_weights
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import InterruptedRunError, StopSignal, stop_on_signals
from lmcl.training.student import make_student
from lmcl.training.trainer import Trainer, training_crops
from lmcl.utils.environment import describe_environment, engines_line
from lmcl.utils.files import write_atomic
from lmcl.utils.trackers import Trackers
from pipeline.backends.select import DecodeChoice
from pipeline.decode_config import same_pixels
from pipeline.loader import Loader, decode_choice
from shards.errors import ShardError
from shards.lock import lock_folder
from shards.read import ShardSet, open_set
from shards.source_files import read_text
from shards.splits.split import Split, load_split

logger = logging.getLogger(__name__)

_RANK_TIMEOUT = timedelta(hours=24)
"""How long ranks wait for one another: rank 0 alone builds the feature cache (`runtime.cells`).
When a rank dies the launcher ends the others, however long they would wait."""
_NO_WEIGHT_DECAY = ("cls", "members", "pos_embed", "reg_token")


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
    try:
        trainer = prepare(config, output, resume=resume, progress=progress, stop=stop)
        try:
            trainer.train()
            return write_outcome(trainer)
        finally:
            trainer.close()
    except InterruptedRunError:
        # Any rank may be the only one that was signalled outside the steps.
        RunDir(output).mark_interrupted()
        raise


@contextmanager
def hold_run_folder(output: Path, purpose: str) -> Iterator[None]:
    """Keep other runs out of a run folder while this one is in it; rank 0 does so for all.

    Args:
        output: The folder; made if it is not there.
        purpose: Of this process, for the sentence another one gets.

    Raises:
        LockedError: If another run is in it (exit code 2), a requeued job's first copy for one.
    """
    if int(os.environ.get("RANK", "0")):
        yield
        return
    is_new = not output.exists()
    try:
        with lock_folder(output, purpose):
            yield
    finally:
        if is_new:
            # A run that was refused before it wrote anything leaves no folder.
            with suppress(OSError):
                output.rmdir()


def plan(config: Config, output: Path) -> str:
    """What `fit` would do, in words: counts, steps, crops; nothing is written."""
    shard_set, split = _open_split(config.data)
    counts = ", ".join(f"{name} {len(split.part(name))}" for name in ("train", "val", "test"))
    steps = -(-len(split.part("train")) // config.train.batch_size)
    crops = training_crops(config)
    views = crops.random + crops.salient
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        width = make_encoder(config.encoder, sizes=(config.crops.size, config.saliency.view)).width
    try:
        loss = plan_objective(config.objective, read_chip(device), width=width)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    choice = decode_choice(shard_set, config.runtime.decoding, device)
    _check_required(config.runtime, choice, loss)
    rating_weights(config.objective, shard_set, split)
    networks = choose_precision(config.runtime.precision, device).line
    return (
        f"{engines_line(device, choice.line, networks, str(loss or 'no contrastive loss'))}\n"
        f"set {shard_set.named_version} in {shard_set.root}, split {split.name}: {counts}\n"
        f"{config.train.epochs} epochs x {steps} steps x {config.train.batch_size} images x "
        f"{views} crops of {crops.size} px\n"
        f"encoder {config.encoder.name}, weights "
        f"{config.train.start_from or config.encoder.weights or 'random'}\n"
        f"run folder {output}"
    )


def prepare(
    config: Config, output: Path, *, resume: str, progress: bool, stop: StopSignal | None = None
) -> Trainer:
    """A trainer at the position it starts from, on this rank."""
    accelerator, context = _make_ranks(config, progress=progress)
    shard_set, split = _open_split(config.data)
    _check_data(config, shard_set, split, context)
    weights = rating_weights(config.objective, shard_set, split)
    run_dir = RunDir(output)
    precision = _settle_precision(config, run_dir, resume, accelerator)
    config = with_precision(config, precision.name)
    if context.is_main:
        run_dir.create_or_check(config, resume=bool(resume))
    accelerator.wait_for_everyone()
    student = make_student(config, accelerator.device)
    loss = _plan_loss(config.objective, student)
    start_from_model(student, config, shard_set=shard_set, split=split)
    teacher = Teacher(student, config.teacher)
    _apply_runtime(student, config.runtime)
    data = _make_data(config, shard_set, split, context, student)
    trainer = _make_trainer(config, run_dir, accelerator, context, data, student, teacher)
    trainer.stop = stop or trainer.stop
    trainer.image_weights = weights if weights is None else weights.to(accelerator.device)
    _check_required(config.runtime, trainer.loader.choice, loss)
    _resume(trainer, resume)
    _describe(trainer, loss, precision)
    return trainer


def _settle_precision(
    config: Config, run_dir: RunDir, resume: str, accelerator: Accelerator
) -> PrecisionChoice:
    """What the networks of this run compute in: as asked, as it began, or as rank 0's device can.

    A run that is resumed on another machine keeps what it began with.
    """
    asked, found = config.runtime.precision, [PrecisionChoice(name="no", reason="")]
    if accelerator.is_main_process:
        begun = _begun_precision(run_dir, resume) if asked == "auto" else None
        found = [begun or choose_precision(asked, accelerator.device)]
    return broadcast_object_list(found)[0] if accelerator.num_processes > 1 else found[0]


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
        ConfigError: If precision or batch size do not suit the machine or the number of ranks.
    """
    precision, images = config.runtime.precision, config.train.batch_size
    check_network_precision(precision, has_gpu=torch.cuda.is_available())
    accelerator = Accelerator(
        # Without this a machine without a GPU is taken for a single process (decision 0005).
        cpu=not torch.cuda.is_available(),
        mixed_precision="fp16" if precision == "fp16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_RANK_TIMEOUT)],
    )
    world = accelerator.num_processes
    if images % world:
        raise ConfigError(
            f"train.batch_size is {images} images over all ranks, which {world} "
            f"processes cannot share evenly; choose a multiple of {world}"
        )
    runtime = config.runtime
    context = make_rank_context(
        accelerator,
        decode=runtime.decoding,
        progress=progress,
    )
    if not context.is_main:
        logging.getLogger("lmcl").setLevel(logging.WARNING)  # every rank says its own errors only
    return accelerator, context


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


def _open_split(data: DataConfig) -> tuple[ShardSet, Split]:
    shard_set = open_set(data.root, cache=Path(data.cache) if data.cache else None)
    return shard_set, load_split(shard_set, data.split)


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


def _check_required(runtime: RuntimeConfig, choice: DecodeChoice, loss: LossPlan | None) -> None:
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


def _check_data(config: Config, shard_set: ShardSet, split: Split, context: RankContext) -> None:
    """Refuse a set, a split and a configuration that do not fit each other."""
    where = f"{config.data.root}, split {config.data.split!r}"
    _check_labels(where, shard_set, split)
    _check_parts(where, split, config.evaluation)
    _check_batch_size(where, len(split.part("train")), config.train, context)
    # A view larger than what crops are cut from would be blown up.
    view, longest = config.saliency.view, config.crops.max_side or config.crops.short_side
    if longest is not None and view > longest:
        raise ConfigError(
            f"saliency.view is {view} pixels, larger than crops.max_side or crops.short_side "
            f"= {longest}; lower "
            "saliency.view"
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


def _check_parts(where: str, split: Split, evaluation: EvaluationConfig) -> None:
    if not len(split.part("train")):
        raise LmclError(f"{where}: the train part is empty; make a split with one", exit_code=3)
    if not len(split.part(evaluation.part)):
        raise LmclError(
            f"{where}: the {evaluation.part} part is empty; set evaluation.part to another "
            "one or make a split with `lmcl-shard split`",
            exit_code=3,
        )
    if evaluation.select == "best" and not len(split.part("val")):
        raise ConfigError(
            f"{where}: evaluation.select = 'best' needs a val part, and this split has none; set "
            "evaluation.select = 'last', or make one with `lmcl-shard split --val-fraction 0.1`"
        )


def _check_batch_size(where: str, images: int, train: TrainConfig, context: RankContext) -> None:
    world = context.world_size
    # One image a rank is always allowed: padding fills what is missing, and counts nowhere.
    most = -(-images // world) * world
    if train.batch_size > most:
        raise ConfigError(
            f"train.batch_size is {train.batch_size} images, but {where} has {images} to "
            f"train on; set it to at most {most}"
        )


def _apply_runtime(student: QualityModel, runtime: RuntimeConfig) -> None:
    """Trade memory for time, and compile, as the configuration asks."""
    if runtime.micro_batch:
        check_divisible(student)
    if runtime.gradient_checkpointing:
        enable_gradient_checkpointing(student.encoder)
    if runtime.compile:
        student.compile()


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
    )
    if loader.skipped.size:
        split = _without_damaged(split, loader)
        _check_data(config, shard_set, split, context)
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
) -> Trainer:
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
        metrics_logger=_make_metrics_logger(config, run_dir, context),
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


def _make_metrics_logger(config: Config, run_dir: RunDir, context: RankContext) -> MetricsLogger:
    names = config.runtime.trackers if context.is_main else ()
    return MetricsLogger(
        run_dir,
        Trackers(names, run_dir.root, settings=flatten(config)),
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
    return torch.optim.AdamW(_parameter_groups(student, train), lr=lr, betas=train.betas)


def _parameter_groups(student: QualityModel, train: TrainConfig) -> list[dict[str, object]]:
    """Weights with and without decay, and the stem apart with its own learning rate."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        has_no_decay = parameter.ndim <= 1 or any(part in name for part in _NO_WEIGHT_DECAY)
        groups.setdefault((name.startswith("encoder.stem.layers."), has_no_decay), []).append(
            parameter
        )
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if has_no_decay else train.weight_decay,
            "lr_scale": train.stem_lr_scale if is_stem else 1.0,
        }
        for (is_stem, has_no_decay), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _resume(trainer: Trainer, resume: str) -> None:
    """Put the trainer where the asked checkpoint was taken; without one, empty its log."""
    state = _state_to_resume(trainer.run_dir, resume)
    context = trainer.context
    if state is not None:
        _check_state(trainer, state)
        _check_recipe(trainer)
        trainer.restore_checkpoint(state)
        if context.is_main:
            if resume != "auto":
                _copy_best(trainer, Path(resume).parent)
            _check_best(trainer)
        trainer.accelerator.wait_for_everyone()
        logger.info("resuming at epoch %d, step %d", state.position.epoch + 1, state.position.step)
    elif context.is_main:
        trainer.run_dir.rewind_log(epoch=0, step=0)


def _state_to_resume(run_dir: RunDir, resume: str) -> State | None:
    if not resume:
        return None
    if resume == "auto":
        return read_newest(run_dir.checkpoints)
    return read_checkpoint(Path(resume))


def _copy_best(trainer: Trainer, origin: Path) -> None:
    """A run that goes on in another folder takes the weights of its best epoch along.

    Raises:
        LmclError: If they are not where the checkpoint came from (exit code 4).
    """
    epoch = trainer.progress.best_epoch
    target = best_path(trainer.run_dir.checkpoints, epoch)
    if epoch < 0 or target.exists():
        return
    try:
        weights = load_tensors(origin / target.name)
    except LmclError as error:
        raise LmclError(
            f"the checkpoint's best epoch is {epoch + 1}, and its weights are not beside "
            f"it ({error}); copy the whole checkpoints folder, or resume in the run's own",
            exit_code=4,
        ) from error
    save_tensors(target, weights)


def _check_best(trainer: Trainer) -> None:
    """Refuse to train on towards an end that would look for weights which are lost.

    Raises:
        LmclError: If the best epoch's weights are missing (exit code 4) or damaged (5).
    """
    epoch = trainer.progress.best_epoch
    if trainer.config.evaluation.select == "last" or epoch < 0:
        return
    path = best_path(trainer.run_dir.checkpoints, epoch)
    try:
        load_tensors(path)
    except LmclError as error:
        raise LmclError(
            f"{path}: the weights of the best epoch so far ({epoch + 1}) cannot be used ({error}); "
            "bring that file back, or go on with --set evaluation.select=last, which takes the "
            "last epoch's weights in the end",
            exit_code=error.exit_code,
        ) from error


def _check_state(trainer: Trainer, state: State) -> None:
    """Refuse a checkpoint of another experiment or other data.

    Raises:
        ConfigError: With exit code 5.
    """
    theirs = parse_run_config(tomllib.loads(state.config), where="the checkpoint's configuration")
    changed = binding_differences(trainer.config, theirs)
    if changed:
        raise ConfigError(
            f"the checkpoint is of another configuration (asked / found there): "
            f"{'; '.join(changed[:5])}; resume with that run's own config.toml, or start a new run "
            "in another --output",
            exit_code=5,
        )
    if state.data and state.data != trainer.split.hash:
        raise ConfigError(
            f"the checkpoint was trained on other data than {trainer.config.data.root}, split "
            f"{trainer.split.name!r}: the set's names or the parts differ; name the set it was "
            "trained on, or start a new run in another --output",
            exit_code=5,
        )


def _check_recipe(trainer: Trainer) -> None:
    """Refuse to go on with other pixels than the run began with.

    Raises:
        ConfigError: With exit code 5.
    """
    try:
        text = read_text(trainer.run_dir.root / "environment.json", limit_bytes=1 << 20)
        before = str(msgspec.json.decode(text)["decode"])
    except (OSError, ShardError, msgspec.DecodeError, KeyError, TypeError):
        return  # another folder, or one of a version that did not write it down
    if not same_pixels(before, trainer.loader.recipe):
        raise ConfigError(
            f"{trainer.run_dir.root}: was decoded by {before} so far, here it would be "
            f"{trainer.loader.recipe} ({trainer.loader.choice.reason}), whose pixels differ; set "
            "runtime.decode to the decoder it began with, on a machine that has it, or start a new "
            "run in another --output",
            exit_code=5,
        )


def _describe(trainer: Trainer, loss: LossPlan | None, precision: PrecisionChoice) -> None:
    """Say on what and by what the run works, in one line, and write it into environment.json."""
    choice, device = trainer.loader.choice, trainer.context.device
    if loss is not None:
        announce(loss, already_said=True)
    parts = (choice.line, precision.line, str(loss or "no contrastive loss"))
    trainer.engines = engines_line(device, *parts)
    if not trainer.context.is_main:
        return
    logger.info("%s", trainer.engines)
    logger.info("set %s, split %s", trainer.shard_set.named_version, trainer.split.name)
    crops = training_crops(trainer.config)
    views = crops.random + crops.salient
    warn_of_emulation(
        trainer.core, precision.dtype, device, size=crops.size, crops=views, learns=True
    )
    found = describe_environment(
        device,
        world_size=trainer.context.world_size,
        decode=choice.recipe,
        decode_reason=choice.reason,
        precision=precision.line,
        loss=str(loss or ""),
    )
    text = msgspec.json.format(msgspec.json.encode(found), indent=2)
    write_atomic(trainer.run_dir.root / "environment.json", text + b"\n")
