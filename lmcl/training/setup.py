"""From a configuration to a finished run: open the data, build what learns, train, write it up."""

import logging
import os
import tomllib
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import msgspec
import numpy as np
import torch
from accelerate import Accelerator, InitProcessGroupKwargs

from kernels.contrastive import choose_backend
from lmcl.config import Config, binding_differences, flatten, parse_config
from lmcl.distributed import RankContext
from lmcl.errors import ConfigError, LmclError
from lmcl.features.build import FeatureCacheBuilder, check_cacheable
from lmcl.features.cache import FeatureCaches, FeatureLoader
from lmcl.method.teacher import Teacher
from lmcl.models.preprocess import Preprocessing
from lmcl.models.quality_model import (
    MEAN,
    STD,
    QualityModel,
    enable_gradient_checkpointing,
    select_attention_impl,
)
from lmcl.models.weights import load_weights
from lmcl.training.checkpoint import (
    Position,
    State,
    load_tensors,
    read_checkpoint,
    read_newest,
    save_tensors,
)
from lmcl.training.finish import Outcome, write_outcome
from lmcl.training.grad_cache import GradCache, check_divisible
from lmcl.training.init_from import start_from_model
from lmcl.training.logger import CollapseWatch, MetricsLogger
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import InterruptedRunError, stop_on_signals
from lmcl.training.trainer import Run, best_path, restore, train, training_crops
from lmcl.utils.environment import describe_environment
from lmcl.utils.files import write_atomic
from lmcl.utils.trackers import Trackers
from pipeline.loader import Loader
from shards.read import ShardSet, open_set
from shards.splits.split import Split, load_split

logger = logging.getLogger(__name__)

_PRECISION = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ONE_RANK_WORKS = timedelta(hours=24)
"""How long ranks wait for one another: rank 0 alone makes the cells of a set (`runtime.cells`).
When a rank dies the launcher ends the others, however long they would wait."""
_NO_WEIGHT_DECAY = ("cls", "members", "pos_embed", "reg_token")


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
    with stop_on_signals() as stop:
        try:
            run = prepare(config, output, resume=resume, progress=progress)
            run.stop = stop
            try:
                train(run)
                return write_outcome(run)
            finally:
                run.metrics_logger.close()
                run.loader.close()
        except InterruptedRunError:
            # Any rank may be the only one that was signalled outside the steps.
            RunDir(output).mark_interrupted()
            raise


def plan(config: Config, output: Path) -> str:
    """What `fit` would do, in words: counts, steps, crops; nothing is written."""
    shard_set = open_set(config.data.root, cache=_cache(config))
    split = load_split(shard_set, config.data.split)
    counts = ", ".join(f"{name} {len(split.part(name))}" for name in ("train", "val", "test"))
    steps = -(-len(split.part("train")) // config.train.batch_size)
    crops = training_crops(config)
    views = crops.random + crops.salient
    return (
        f"set {shard_set.name} in {shard_set.root}, split {split.name}: {counts}\n"
        f"{config.train.epochs} epochs x {steps} steps x {config.train.batch_size} images x "
        f"{views} crops of {crops.size} px\n"
        f"encoder {config.encoder.name}, weights "
        f"{config.train.start_from or config.encoder.weights or 'random'}\n"
        f"run folder {output}"
    )


def prepare(config: Config, output: Path, *, resume: str, progress: bool) -> Run:
    """Everything a run needs, at the position it starts from."""
    if config.runtime.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.precision = 'fp16' needs a GPU, and there is none here; set it to 'bf16' or "
            "'no'"
        )
    accelerator = Accelerator(
        # Without this a machine without a GPU is taken for a single process (decision 0005).
        cpu=not torch.cuda.is_available(),
        mixed_precision="fp16" if config.runtime.precision == "fp16" else "no",
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_ONE_RANK_WORKS)],
    )
    context = _make_context(accelerator, config, progress=progress)
    if not context.is_main:
        logging.getLogger("lmcl").setLevel(logging.WARNING)  # every rank says its own errors only
    shard_set = open_set(config.data.root, cache=_cache(config))
    split = load_split(shard_set, config.data.split)
    _check_data(config, shard_set, split, context)
    folder = RunDir(output)
    if context.is_main:
        folder.create_or_check(config, resume=bool(resume))
    accelerator.wait_for_everyone()
    student = make_student(config, accelerator.device)
    _check_backend(config, student)
    start_from_model(student, config, shard_set=shard_set, split=split)
    teacher = Teacher(student, config.teacher)
    if config.runtime.micro_batch:
        check_divisible(student)
    if config.runtime.gradient_checkpointing:
        enable_gradient_checkpointing(student.encoder)
    if config.runtime.compile:
        student.compile()
    optimizer = torch.optim.AdamW(
        _parameter_groups(student, config), lr=config.schedule.lr, betas=config.train.betas
    )
    wrapped, prepared = accelerator.prepare(student, optimizer)
    loader = _training_loader(config, shard_set, split, context)
    if loader.skipped.size:
        split = _without_damaged(split, loader)
        _check_data(config, shard_set, split, context)
    banks = _banks(config, shard_set, split, context, student)
    run = Run(
        config=config,
        folder=folder,
        accelerator=accelerator,
        context=context,
        preprocessing=_make_preprocessing(config),
        shard_set=shard_set,
        split=split,
        student=wrapped,
        core=student,
        teacher=teacher,
        grad_cache=_make_grad_cache(config, wrapped, teacher, accelerator, context),
        optimizer=prepared,
        loader=_with_cells(loader, banks, config, context),
        metrics_logger=_make_metrics_logger(config, folder, context),
        banks=banks,
        position=Position(epoch=0, step=0),
    )
    state = _state_to_resume(folder, resume)
    if state is not None:
        _check_state(run, state)
        restore(run, state)
        if context.is_main and resume != "auto":
            _bring_best(run, Path(resume).parent)
        accelerator.wait_for_everyone()
        logger.info("resuming at epoch %d, step %d", state.position.epoch + 1, state.position.step)
    if context.is_main:
        _write_environment(run)
        if state is None:
            folder.rewind_log(epoch=0, step=0)
    return run


def make_student(config: Config, device: torch.device) -> QualityModel:
    """The model of a run as it is before the first step, laid out as the device likes it."""
    torch.manual_seed(config.train.seed)
    student = QualityModel(
        config.encoder,
        config.decoder,
        crop_size=config.crops.size,
        view_size=config.saliency.view,
    )
    load_weights(student.encoder, config.encoder)
    student.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    select_attention_impl(student, device, _PRECISION[config.runtime.precision])
    return student


def _check_backend(config: Config, student: QualityModel) -> None:
    """Whether the loss can run here as asked, said before the first step asks for it."""
    if config.objective.contrastive_weight == 0:
        return
    device = next(student.parameters()).device
    # On a GPU autocast's dtype reaches the loss, elsewhere float32.
    precision = _PRECISION[config.runtime.precision] if device.type == "cuda" else torch.float32
    rows = torch.empty(1, student.encoder.width, device=device, dtype=precision)
    try:
        choose_backend(rows, config.objective.backend)
    except ValueError as error:
        raise ConfigError(f"objective.{error}") from error


def _make_context(accelerator: Accelerator, config: Config, *, progress: bool) -> RankContext:
    world = accelerator.num_processes
    if config.train.batch_size % world:
        raise ConfigError(
            f"train.batch_size is {config.train.batch_size} images over all ranks, which {world} "
            f"processes cannot share evenly; choose a multiple of {world}"
        )
    local = max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    threads = config.runtime.threads or max(1, (os.cpu_count() or 1) // local)
    return RankContext(
        rank=accelerator.process_index,
        world_size=world,
        device=accelerator.device,
        backend=config.runtime.backend,
        threads=threads,
        progress=progress and accelerator.is_main_process,
    )


def _check_data(config: Config, shard_set: ShardSet, split: Split, context: RankContext) -> None:
    where = f"{config.data.root}, split {config.data.split!r}"
    if shard_set.score is None:
        raise LmclError(
            f"{where}: the set has no scores, so nothing can be learned from it; `lmcl score` "
            "gives it some",
            exit_code=3,
        )
    if not len(split.part("train")):
        raise LmclError(f"{where}: the train part is empty; make a split with one", exit_code=3)
    if not len(split.part(config.evaluation.part)):
        raise LmclError(
            f"{where}: the {config.evaluation.part} part is empty; set evaluation.part to another "
            "one or make a split with `lmcl-shard split`",
            exit_code=3,
        )
    world, images = context.world_size, len(split.part("train"))
    # One image a rank is always allowed: padding fills what is missing, and counts nowhere.
    most = -(-images // world) * world
    if config.train.batch_size > most:
        raise ConfigError(
            f"train.batch_size is {config.train.batch_size} images, but {where} has {images} to "
            f"train on; set it to at most {most}"
        )
    for part in ("train", "val", "test"):
        unlabelled = split.part(part)[np.isnan(shard_set.unit_mos()[split.part(part)])]
        if len(unlabelled):
            raise LmclError(
                f"{where}: {len(unlabelled)} images of the {part} part have no score (ids "
                f"{unlabelled[:5].tolist()}); leave them out of the split or give them one",
                exit_code=3,
            )
    if config.evaluation.select == "best" and not len(split.part("val")):
        raise ConfigError(
            f"{where}: evaluation.select = 'best' needs a val part, and this split has none; set "
            "evaluation.select = 'last', or make one with `lmcl-shard split --val-fraction 0.1`"
        )
    view = config.saliency.view
    if config.crops.max_side is not None and view > config.crops.max_side:
        raise ConfigError(
            f"saliency.view is {view} pixels, larger than crops.max_side "
            f"{config.crops.max_side}; lower saliency.view"
        )


def _banks(
    config: Config, shard_set: ShardSet, split: Split, context: RankContext, student: QualityModel
) -> FeatureCaches | None:
    if not config.runtime.cells:
        return None
    maker = FeatureCacheBuilder(
        folder=Path(config.runtime.cells),
        shard_set=shard_set,
        stem=check_cacheable(student, pool=config.crops.pool, flip=config.train.flip),
        crops=config.crops,
        saliency=config.saliency,
        has_centre=config.objective.hub == "centre",
        preprocessing=_make_preprocessing(config),
        context=context,
    )
    judged = np.union1d(split.part("val"), split.part(config.evaluation.part))
    return maker.make(split.part("train"), judged)


def _training_loader(
    config: Config, shard_set: ShardSet, split: Split, context: RankContext
) -> Loader:
    return Loader(
        shard_set,
        split.part("train"),
        crops=training_crops(config),
        batch_size=config.train.batch_size // context.world_size,
        mode="train",
        seed=config.train.seed,
        rank=context.rank,
        world_size=context.world_size,
        backend=context.backend,
        device=context.device,
        num_threads=context.threads,
        on_error=config.runtime.on_error,
    )


def _without_damaged(split: Split, loader: Loader) -> Split:
    """The split with those of its train part that the loader kept.

    Everything else that goes over the train part, the teacher's look for one, then does the same.
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


def _with_cells(
    loader: Loader, banks: FeatureCaches | None, config: Config, context: RankContext
) -> Loader | FeatureLoader:
    if banks is None:
        return loader
    salient = training_crops(config).salient
    return FeatureLoader(loader, banks.train, salient=salient, device=context.device)


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
        preprocessing=_make_preprocessing(config),
        context=context,
        flip=config.train.flip,
        micro_batch=config.runtime.micro_batch,
        seed=config.train.seed,
    )


def _make_metrics_logger(config: Config, folder: RunDir, context: RankContext) -> MetricsLogger:
    names = config.runtime.trackers if context.is_main else ()
    return MetricsLogger(
        folder,
        Trackers(names, folder.root, settings=flatten(config)),
        CollapseWatch(limit=config.runtime.collapse_steps),
        enabled=context.is_main,
        progress=context.progress,
    )


def _make_preprocessing(config: Config) -> Preprocessing:
    return Preprocessing(mean=MEAN, std=STD, precision=_PRECISION[config.runtime.precision])


def _parameter_groups(student: QualityModel, config: Config) -> list[dict[str, object]]:
    """Weights with and without decay, and the stem apart with its own learning rate."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        spared = parameter.ndim <= 1 or any(part in name for part in _NO_WEIGHT_DECAY)
        groups.setdefault((name.startswith("encoder.stem.layers."), spared), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": 0.0 if spared else config.train.weight_decay,
            "lr_scale": config.train.stem_lr_scale if stem else 1.0,
        }
        for (stem, spared), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _state_to_resume(folder: RunDir, resume: str) -> State | None:
    if not resume:
        return None
    if resume == "auto":
        return read_newest(folder.checkpoints)
    return read_checkpoint(Path(resume))


def _bring_best(run: Run, origin: Path) -> None:
    """A run that goes on in another folder takes the weights of its best epoch along.

    Raises:
        LmclError: If they are not where the checkpoint came from (exit code 4).
    """
    target = best_path(run.folder, run.best_epoch)
    if run.best_epoch < 0 or target.exists():
        return
    source = origin / target.name
    try:
        weights = load_tensors(source)
    except LmclError as error:
        raise LmclError(
            f"the checkpoint's best epoch is {run.best_epoch + 1}, and its weights are not beside "
            f"it ({error}); copy the whole checkpoints folder, or resume in the run's own",
            exit_code=4,
        ) from error
    save_tensors(target, weights)


def _check_state(run: Run, state: State) -> None:
    """Refuse a checkpoint of another experiment or other data.

    Raises:
        ConfigError: With exit code 5.
    """
    theirs = parse_config(tomllib.loads(state.config), where="the checkpoint's configuration")
    changed = binding_differences(run.config, theirs)
    if changed:
        raise ConfigError(
            f"the checkpoint is of another configuration (asked / found there): "
            f"{'; '.join(changed[:5])}; resume with that run's own config.toml, or start a new run "
            "in another --output",
            exit_code=5,
        )
    if state.data and state.data != run.split.hash:
        raise ConfigError(
            f"the checkpoint was trained on other data than {run.config.data.root}, split "
            f"{run.split.name!r}: the set's names or the parts differ; name the set it was trained "
            "on, or start a new run in another --output",
            exit_code=5,
        )


def _cache(config: Config) -> Path | None:
    return Path(config.data.cache) if config.data.cache else None


def _write_environment(run: Run) -> None:
    found = describe_environment(
        device=str(run.accelerator.device),
        world_size=run.context.world_size,
        decode=run.loader.recipe,
    )
    logger.info("decoding with %s: %s", run.loader.recipe, run.loader.backend_reason)
    text = msgspec.json.format(msgspec.json.encode(found), indent=2)
    write_atomic(run.folder.root / "environment.json", text + b"\n")
