"""The training loop, readable aloud: look, cut, see, compute_loss, learn, follow.

Every epoch the teacher looks at all training images; every step the loader cuts their crops, the
student sees them, the objective compares, the optimiser learns and the teacher follows.
"""

import dataclasses
import logging
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from lmcl.config import Config, dump_config
from lmcl.distributed import RankContext
from lmcl.errors import LmclError
from lmcl.evaluation.metrics import plcc, srcc
from lmcl.evaluation.predict import compute_saliency, predict
from lmcl.features.cache import FeatureCaches, FeatureLoader
from lmcl.method.lr_schedule import learning_rate
from lmcl.method.objective import Terms, crop_errors, objective
from lmcl.method.teacher import Teacher
from lmcl.models.preprocess import Preprocessing
from lmcl.models.quality_model import QualityModel
from lmcl.models.saliency import make_table
from lmcl.training.checkpoint import (
    Position,
    State,
    best_name,
    digest_path,
    drop_checkpoints_after,
    list_bests,
    save_tensors,
    write_checkpoint,
)
from lmcl.training.grad_cache import ForwardResult, GradCache
from lmcl.training.logger import EpochEntry, MetricsLogger, StepEntry
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import InterruptedRunError, StopSignal
from lmcl.utils.files import write_atomic
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, SaliencyTable, box_iou, centre_boxes, frame_sizes
from pipeline.loader import Loader
from shards.read import ShardSet
from shards.splits.split import Split

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Run:
    """One training in progress: what is fixed, what learns, and where it stands."""

    config: Config
    folder: RunDir
    accelerator: Accelerator
    context: RankContext
    preprocessing: Preprocessing
    shard_set: ShardSet
    split: Split
    student: torch.nn.Module
    """What is trained, wrapped for several ranks where there are any."""
    core: QualityModel
    """The student without wrapping; shares its weights."""
    teacher: Teacher
    grad_cache: GradCache
    optimizer: torch.optim.Optimizer
    loader: Loader | FeatureLoader
    metrics_logger: MetricsLogger
    banks: FeatureCaches | None
    """Cells of the frozen stem in place of pixels, where they are kept."""
    position: Position
    stop: StopSignal = field(default_factory=StopSignal)
    saliency: SaliencyTable | None = None
    best_srcc: float = math.nan
    best_epoch: int = -1
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.train.epochs * self.loader.steps

    @property
    def steps_done(self) -> int:
        """Optimiser steps behind the run's position."""
        return self.position.epoch * self.loader.steps + self.position.step


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """What all ranks know of a step before the objective is taken; the same on each."""

    images: int
    """Images that count."""
    l1: float
    """Mean absolute error of their random crops."""
    stop: bool
    """Some rank was asked to stop."""
    broken: tuple[int, ...]
    """Ranks whose scores, labels or embeddings are not finite."""
    broken_term: str
    """Which term that spoils: `l1` (scores, labels) or `contrastive` (embeddings alone)."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one optimiser step did."""

    terms: Terms
    agreed: StepStats
    lr: float
    grad_norm: float | None
    """Of the gradient over all ranks, before clipping; None if clipping is off."""


def training_crops(config: Config) -> CropConfig:
    """The crops a training batch holds: the random ones, then the hub if the objective has one."""
    crops = config.crops
    if config.objective.contrastive_weight == 0:
        return dataclasses.replace(crops, salient=False)
    if config.objective.hub == "random":
        return dataclasses.replace(crops, salient=False, random=crops.random + 1)
    return crops


def train(run: Run) -> None:
    """Run all epochs that remain, writing checkpoints; returns when the last one is done.

    Raises:
        InterruptedRunError: If a signal asked the run to stop; a checkpoint was written.
        LmclError: If the loss or its gradient is not finite; the batch's keys are saved.
    """
    with run.stop.deferred():
        for epoch in range(run.position.epoch, run.config.train.epochs):
            if training_crops(run.config).salient:
                refresh_salient_boxes(run, epoch)
            last = train_epoch(run, epoch)
            run.teacher.update_after_epoch(run.core)
            validate(run, epoch, last)
            run.position = Position(epoch=epoch + 1, step=0)
            save(run)
            if _anyone_asked_to_stop(run):
                raise _stopped(run)


def refresh_salient_boxes(run: Run, epoch: int) -> None:
    """Say where each training image's hub lies: where the teacher looks, or in the middle."""
    if run.config.objective.hub == "salient":
        run_saliency_pass(run, epoch)
    elif run.saliency is None:
        ids, samples = np.unique(run.split.part("train")), run.shard_set.samples
        frames = frame_sizes(samples.height[ids], samples.width[ids], run.config.crops)
        run.saliency = SaliencyTable(
            ids=ids, boxes=centre_boxes(frames, size=run.config.crops.size)
        )


def run_saliency_pass(run: Run, epoch: int) -> None:
    """Refresh the salient box of every training image, unless this epoch keeps the old ones."""
    settings = run.config.saliency
    if run.saliency is not None and (run.position.step > 0 or epoch % settings.every):
        return
    looked = compute_saliency(
        run.teacher.cls_attention,
        run.shard_set,
        run.split.part("train"),
        saliency=settings,
        crops=run.config.crops,
        preprocessing=run.preprocessing,
        context=run.context,
        keep_attention=False,
        title=f"epoch {epoch + 1}: teacher looks",
        bank=run.banks.views if run.banks else None,
    )
    run.saliency = make_table(looked.ids, looked.boxes)
    if run.context.is_main:
        run.saliency.write(run.folder.saliency / f"epoch-{epoch:02d}.parquet")


def train_epoch(run: Run, epoch: int) -> StepEntry | None:
    """The steps of one epoch, from where the run stands; the last one's entry, if any was left."""
    run.student.train()
    config, entry = run.config, None
    started, before, waited, seen = time.monotonic(), run.seconds, run.loader.wait_s, 0
    bar = run.metrics_logger.epoch(
        epoch,
        epochs=config.train.epochs,
        images=len(run.split.part("train")),
        seen=run.position.step * config.train.batch_size,
        steps_done=run.steps_done,
    )
    with bar:
        for batch in run.loader.epoch(epoch, start=run.position.step, saliency=run.saliency):
            out = step(run, batch)
            run.position = Position(epoch=epoch, step=batch.step + 1)
            run.seconds = before + time.monotonic() - started
            spent = max(run.seconds - before, 1e-9)
            seen += out.agreed.images
            wait = (run.loader.wait_s - waited) / spent
            entry = _entry(run, batch, out, rate=seen / spent, wait=wait)
            run.metrics_logger.step(entry, done=run.steps_done, steps=run.steps)
            if out.agreed.stop:
                save(run)
                raise _stopped(run)
            every = config.runtime.checkpoint_steps
            last = batch.step + 1 == run.loader.steps
            if every and (batch.step + 1) % every == 0 and not last:
                save(run)
    return entry


def step(run: Run, batch: CropBatch) -> StepOutput:
    """See the crops, compute_loss, learn, and let the teacher follow (method.md, steps 4 to 6)."""
    lr = _set_rate(run, batch)
    seen = run.grad_cache.forward(batch)
    agreed = reduce_step_stats(run, batch, seen)
    if agreed.broken:
        raise _not_finite(run, batch, agreed.broken, agreed.broken_term)
    terms = compute_loss(run, batch, seen, images=agreed.images)
    if not torch.isfinite(terms.loss):
        # The contrastive term is one value over all ranks, so all of them stop here.
        raise _not_finite(run, batch, tuple(range(run.context.world_size)), "contrastive")
    run.grad_cache.backward(batch, seen, terms.loss)
    grad_norm = _clip(run)
    # Ranks hold the same gradient, so all of them stop here. A scaler skips overflows by itself.
    if run.accelerator.scaler is None and not math.isfinite(grad_norm):
        raise _not_finite(run, batch, tuple(range(run.context.world_size)), "gradient")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.teacher.update_after_step(run.core, steps_per_epoch=run.loader.steps)
    shown = grad_norm if run.config.train.clip else None
    return StepOutput(terms=terms, agreed=agreed, lr=lr, grad_norm=shown)


def reduce_step_stats(run: Run, batch: CropBatch, seen: ForwardResult) -> StepStats:
    """One tiny all-reduce: images, errors, wishes and accidents of all ranks.

    A rank that met a number that is not finite must not leave the others waiting for it in the
    next exchange, so all learn of it here and stop together.
    """
    random = run.config.crops.random
    errors = crop_errors(seen.output.score.detach(), batch.mos, batch.valid, random=random)
    total = errors.double().sum()
    is_finite = torch.isfinite(total)
    has_directions = torch.isfinite(seen.output.embedding.detach()).all()
    here = torch.zeros(3 + run.context.world_size, dtype=torch.float64, device=run.context.device)
    here[0] = batch.valid.sum()
    here[1] = torch.where(is_finite, total, 0.0)
    here[2] = run.stop.requested
    here[3 + run.context.rank] = 2 * ~is_finite + 1 * ~has_directions
    summed: Tensor = run.accelerator.reduce(here, reduction="sum")
    images, error, stop, *broken = summed.tolist()
    return StepStats(
        images=int(images),
        l1=error / (images * random),
        stop=stop > 0,
        broken=tuple(rank for rank, flag in enumerate(broken) if flag),
        broken_term="l1" if any(flag >= 2 for flag in broken) else "contrastive",
    )


def compute_loss(run: Run, batch: CropBatch, seen: ForwardResult, *, images: int) -> Terms:
    """The objective on what the student saw; `images` count over all ranks."""
    goal, random = run.config.objective, run.config.crops.random
    return objective(
        seen.output,
        batch.mos,
        batch.ids,
        batch.valid,
        goal,
        random=random,
        overlap=box_iou(batch.boxes[:, :random]) if goal.overlap_aware else None,
        keys=seen.keys,
        rank_share=run.context.world_size * int(batch.valid.sum()) / images,
    )


def validate(run: Run, epoch: int, last: StepEntry | None) -> None:
    """Judge the val part, if there is one; remember the weights of the best epoch."""
    ids = run.split.part("val")
    value = value_plcc = None
    if len(ids):
        judged = predict(
            judged_model(run),
            run.shard_set,
            ids,
            crops=run.config.crops,
            preprocessing=run.preprocessing,
            context=run.context,
            batch_size=run.config.evaluation.batch_size,
            title=f"epoch {epoch + 1}: validation",
            bank=run.banks.judged if run.banks else None,
        )
        mos = run.shard_set.unit_mos()[judged.ids]
        value, value_plcc = srcc(judged.score, mos), plcc(judged.score, mos)
        if value > run.best_srcc or (math.isnan(run.best_srcc) and not math.isnan(value)):
            run.best_srcc, run.best_epoch = value, epoch
            _keep_best(run)
    entry = EpochEntry(epoch=epoch, time_s=run.seconds, val_srcc=value, val_plcc=value_plcc)
    run.metrics_logger.epoch_end(entry, last, done=(epoch + 1) * run.loader.steps)


def judged_model(run: Run) -> QualityModel:
    """Whose weights are evaluated."""
    return run.teacher.model if run.config.evaluation.model == "teacher" else run.core


def save(run: Run) -> None:
    """Write a checkpoint of the run's position; all ranks hold the same state, rank 0 writes."""
    if run.context.is_main:
        table = run.saliency
        state = State(
            position=run.position,
            config=dump_config(run.config),
            data=run.split.hash,
            student=run.core.state_dict(),
            teacher=run.teacher.model.state_dict(),
            optimizer=run.optimizer.state_dict(),
            scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
            saliency_ids=torch.from_numpy(table.ids if table else np.zeros(0, np.int64)),
            saliency_boxes=torch.from_numpy(table.boxes if table else np.zeros((0, 4), np.int32)),
            best_srcc=run.best_srcc,
            best_epoch=run.best_epoch,
            seconds=run.seconds,
            collapsed_steps=run.metrics_logger.watch.streak,
        )
        write_checkpoint(run.folder.checkpoints, state, keep_last=run.config.runtime.keep_last)
    run.accelerator.wait_for_everyone()


def restore(run: Run, state: State) -> None:
    """Put the run where the checkpoint was taken."""
    run.core.load_state_dict(state.student)
    run.teacher.model.load_state_dict(state.teacher)
    run.optimizer.load_state_dict(state.optimizer)
    if run.accelerator.scaler and state.scaler:
        run.accelerator.scaler.load_state_dict(state.scaler)
    if len(state.saliency_ids):
        run.saliency = SaliencyTable(
            ids=state.saliency_ids.numpy(), boxes=state.saliency_boxes.numpy()
        )
    run.position = state.position
    run.best_srcc, run.best_epoch = state.best_srcc, state.best_epoch
    run.seconds = state.seconds
    run.metrics_logger.watch.streak = state.collapsed_steps
    if run.context.is_main:
        drop_checkpoints_after(run.folder.checkpoints, state.position)
        run.folder.rewind_log(epoch=state.position.epoch, step=state.position.step)


def _set_rate(run: Run, batch: CropBatch) -> float:
    """Give the optimiser this step's learning rate."""
    rate = learning_rate(
        run.config.schedule,
        step=batch.epoch * run.loader.steps + batch.step,
        steps_per_epoch=run.loader.steps,
        epochs=run.config.train.epochs,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def _clip(run: Run) -> float:
    """Scale the gradient down to `train.clip`, if there is one; its norm before."""
    if run.config.train.clip:
        return float(
            run.accelerator.clip_grad_norm_(run.student.parameters(), run.config.train.clip)
        )
    found = [value.grad for value in run.student.parameters() if value.grad is not None]
    return float(torch.nn.utils.get_total_norm(found))


def _anyone_asked_to_stop(run: Run) -> bool:
    asked = torch.tensor(float(run.stop.requested), device=run.context.device)
    return bool(run.accelerator.reduce(asked, reduction="sum") > 0)


def _stopped(run: Run) -> InterruptedRunError:
    return InterruptedRunError(
        f"{run.folder.root}: stopped as asked at epoch {run.position.epoch + 1}, step "
        f"{run.position.step}; the checkpoint is written, and --resume auto goes on from there"
    )


def _not_finite(run: Run, batch: CropBatch, broken: tuple[int, ...], term: str) -> LmclError:
    """Save the ids of this rank's batch, if it is to blame, and name what happened where."""
    if run.context.rank in broken:
        write_atomic(
            run.folder.root / f"nonfinite-rank{run.context.rank}.txt",
            "\n".join(map(str, batch.ids.tolist())) + "\n",
        )
    what = term if term == "gradient" else f"{term} term"
    ranks = ", ".join(map(str, broken))
    files = ", ".join(f"nonfinite-rank{rank}.txt" for rank in broken)
    return LmclError(
        f"{run.folder.root}: the {what} is not finite at epoch {batch.epoch}, step "
        f"{batch.step}, rank {ranks}; the sample ids of the batch are in {files}. Lower "
        "schedule.lr or raise objective.temperature, set runtime.precision = 'no', or look at "
        "these images with `lmcl-shard verify --deep`"
    )


def _keep_best(run: Run) -> None:
    if not run.context.is_main:
        return
    weights = judged_model(run).state_dict()
    save_tensors(best_path(run.folder, run.best_epoch), {"model": weights})
    # An older checkpoint, should the run fall back to it, names an older best: as many are kept.
    for old in list_bests(run.folder.checkpoints)[run.config.runtime.keep_last :]:
        old.unlink()
        digest_path(old).unlink(missing_ok=True)


def best_path(folder: RunDir, epoch: int) -> Path:
    """Where the weights of the best epoch stand."""
    return folder.checkpoints / best_name(epoch)


def _entry(run: Run, batch: CropBatch, out: StepOutput, *, rate: float, wait: float) -> StepEntry:
    terms, weight = out.terms, run.config.objective.contrastive_weight
    contrastive = float(terms.contrastive)
    return StepEntry(
        epoch=batch.epoch,
        step=batch.step,
        images=out.agreed.images,
        loss=(1 - weight) * out.agreed.l1 + weight * contrastive,
        l1=out.agreed.l1,
        contrastive=contrastive,
        intra_share=float(terms.intra_share),
        intra_similarity=float(terms.intra_similarity),
        positive_similarity=float(terms.positive_similarity),
        grad_norm=out.grad_norm,
        lr=out.lr,
        images_per_s=round(rate, 2),
        data_wait=round(wait, 4),
        time_s=round(run.seconds, 3),
    )
