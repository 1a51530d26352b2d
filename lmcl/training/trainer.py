"""Trainer: refresh the salient boxes, then per batch forward, loss, backward, update the teacher.

Every epoch the teacher computes the saliency of all training images; every step the loader cuts
their crops, the student embeds and scores them, the objective compares, the optimiser updates the
student and the teacher follows by its moving average (method.md, steps 2 to 6).
"""

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from lmcl.config import Config, dump_config
from lmcl.distributed import RankContext
from lmcl.errors import LmclError
from lmcl.evaluation.data import epoch_images
from lmcl.evaluation.predict import CropLoader, CropSource, compute_saliency, predict
from lmcl.evaluation.sets import ValFigures, val_figures
from lmcl.method.lr_schedule import learning_rate, stable_epochs
from lmcl.method.objective import Terms, crop_errors, objective, regression_costs
from lmcl.method.teacher import Teacher
from lmcl.models.preprocess import Preprocessing
from lmcl.models.quality_model import QualityModel
from lmcl.models.saliency import make_table
from lmcl.models.training_images import TrainingImages
from lmcl.training.checkpoint import (
    Position,
    State,
    best_path,
    save_best,
    set_checkpoints_aside_after,
    write_checkpoint,
)
from lmcl.training.grad_cache import ForwardResult, GradCache
from lmcl.training.logger import EpochEntry, MetricsLogger, StepEntry
from lmcl.training.param_groups import without_unused
from lmcl.training.run_dir import RunDir
from lmcl.training.signals import InterruptedRunError, StopSignal, way_on
from lmcl.utils.files import write_atomic
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, centre_boxes, frame_sizes
from pipeline.overlap import box_iou
from pipeline.saliency_table import SaliencyTable
from pipeline.sampler import images_by_rank
from shards.read import ShardSet
from shards.splits.split import Split

logger = logging.getLogger(__name__)

_L1, _EMBEDDING, _LOSS, _GRADIENT = 8, 4, 2, 1
"""What is not finite on a rank, as the bits of one number."""


@dataclass(kw_only=True)
class Progress:
    """How far a run is: what a checkpoint holds beside weights."""

    position: Position
    """The next step to take."""
    saliency: SaliencyTable | None = None
    """Salient boxes in force; None before the first saliency pass."""
    best_srcc: float = math.nan
    """Highest SRCC on the val part so far; NaN before the first."""
    best_epoch: int = -1
    """Its epoch, from 0; -1 before the first."""
    seconds: float = 0.0
    """Time spent in training steps, resumed parts included."""


@dataclass(frozen=True, kw_only=True)
class StepStats:
    """Figures of one step over all ranks; the same on each."""

    images: int
    """Images that count."""
    l1: float
    """Mean absolute error of their random crops."""
    regression: float
    """What of it is in the loss, by `objective.regression` and `objective.image_weight`."""
    contrastive: float
    """Contrastive loss in nats; 0 when switched off, as are the three after it."""
    intra_share: float
    intra_similarity: float
    positive_similarity: float
    plcc_loss: float
    """Over the images of all ranks; 0 when switched off, as is the next."""
    rank_loss: float
    distribution_loss: float
    """Mean over the crops of all ranks; 0 without `decoder.bins`."""
    grad_norm: float
    """Of the gradient over all ranks, before clipping."""
    stop: bool
    """Some rank was asked to stop."""
    broken: tuple[int, ...]
    """Ranks with scores, labels, embeddings, a loss or a gradient that is not finite."""
    broken_term: str
    """The first of `l1` (scores, labels), `contrastive` and `gradient` that is not finite."""


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one optimiser step did."""

    stats: StepStats
    lr: float


def training_crops(config: Config) -> CropConfig:
    """The crops a training batch holds: the random ones, then the hub if the objective has one."""
    crops = config.crops
    if config.objective.contrastive_weight == 0:
        return dataclasses.replace(crops, salient=False)
    if config.objective.hub == "random":
        return dataclasses.replace(crops, salient=False, random=crops.random + 1)
    return crops


@contextmanager
def uncompiled(is_compiled: bool) -> Iterator[None]:
    """Run models as they are written within, whatever was compiled for training steps.

    Args:
        is_compiled: Whether anything was; asking torch imports its compiler, which takes seconds.
    """
    with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
        yield


@dataclass(kw_only=True)
class Trainer:
    """Training of one student and its teacher on one part of one set.

    Source: [Local Manifold Learning, 2024], mutual learning of student and teacher.
    """

    config: Config
    run_dir: RunDir
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
    loader: CropLoader
    """Training batches."""
    source: CropSource
    """Crops for saliency passes and evaluation."""
    metrics_logger: MetricsLogger
    image_weights: Float[Tensor, " n"] | None = None
    """Of every row of the sample table in the regression; None: all the same."""
    soft_labels: Float[Tensor, "n k"] | None = None
    """Distribution of the ratings of every row; None: the head says a score."""
    training_images: TrainingImages | None = None
    """What the model will have seen when the run ends; written beside it."""
    images_sha256: str = ""
    """Hash over the bytes of the images of each part."""
    engines: str = ""
    """The line the run begins with: device, what decodes, what computes the loss."""
    stop: StopSignal = field(default_factory=StopSignal)
    progress: Progress = field(default_factory=lambda: Progress(position=Position(epoch=0, step=0)))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.train.epochs * self.loader.steps

    @property
    def steps_done(self) -> int:
        """Optimiser steps behind the run's position."""
        return self.progress.position.epoch * self.loader.steps + self.progress.position.step

    @property
    def stable_epochs(self) -> int | None:
        """Epochs before the rate falls for good, where the schedule has such a phase."""
        schedule = self.config.schedule
        return (
            stable_epochs(schedule, self.config.train.epochs) if schedule.shape == "wsd" else None
        )

    @property
    def evaluated_model(self) -> QualityModel:
        """Whose weights are evaluated: the student's or the teacher's."""
        return self.teacher.model if self.config.evaluation.model == "teacher" else self.core

    def train(self) -> None:
        """Train all epochs that remain, writing checkpoints.

        Raises:
            InterruptedRunError: If a signal asked the run to stop; a checkpoint was written.
            LmclError: If the loss or its gradient is not finite; the batch's ids are saved.
        """
        with self.stop.deferred():
            for epoch in range(self.progress.position.epoch, self.config.train.epochs):
                if self._has_waited_enough(epoch):
                    break
                if training_crops(self.config).salient:
                    self.refresh_salient_boxes(epoch)
                last = self.train_epoch(epoch)
                self.teacher.update_after_epoch(self.core)
                self.validate(epoch, last)
                self.progress.position = Position(epoch=epoch + 1, step=0)
                self.save_checkpoint()
                if self._is_stop_requested():
                    raise self._interrupted()

    def _has_waited_enough(self, epoch: int) -> bool:
        """Whether `train.patience` epochs before this one had no higher SRCC on the val part."""
        patience = self.config.train.patience
        waited = epoch - (self.progress.best_epoch + 1)
        if not patience or waited < patience:
            return False
        if self.context.is_main:
            logger.info(
                "train.patience: no higher SRCC on the val part in %d epochs; the run ends after "
                "epoch %d of %d",
                *(waited, epoch, self.config.train.epochs),
            )
        return True

    def close(self) -> None:
        """End trackers, loader threads and open files."""
        self.metrics_logger.close()
        self.loader.close()

    def refresh_salient_boxes(self, epoch: int) -> None:
        """Salient box of every training image: the teacher's, or the one in the middle."""
        if self.config.objective.hub == "salient":
            self.run_saliency_pass(epoch)
        elif self.progress.saliency is None:
            ids, samples = np.unique(self.split.part("train")), self.shard_set.samples
            crops = self.config.crops
            frames = frame_sizes(samples.height[ids], samples.width[ids], crops)
            boxes = centre_boxes(frames, size=crops.size)
            self.progress.saliency = SaliencyTable(ids=ids, boxes=boxes)

    def run_saliency_pass(self, epoch: int) -> None:
        """Compute the teacher's salient boxes, unless this epoch keeps the old ones."""
        settings, progress = self.config.saliency, self.progress
        is_kept = progress.position.step > 0 or epoch % settings.every
        if progress.saliency is not None and is_kept:
            return
        maps = compute_saliency(
            self.teacher.cls_attention,
            self.source,
            self.split.part("train"),
            saliency=settings,
            crops=self.config.crops,
            preprocessing=self.preprocessing,
            context=self.context,
            keep_attention=False,
            title=f"epoch {epoch + 1}: saliency pass",
        )
        progress.saliency = make_table(maps.ids, maps.boxes)
        if self.context.is_main:
            progress.saliency.write(self.run_dir.saliency / f"epoch-{epoch:02d}.parquet")

    def train_epoch(self, epoch: int) -> StepEntry | None:
        """Take the steps of one epoch that remain; the last one's entry, if any was left."""
        self.student.train()
        config, progress, entry = self.config, self.progress, None
        started, before = time.monotonic(), progress.seconds
        waited, seen = self.loader.wait_s, 0
        bar = self.metrics_logger.epoch(
            epoch,
            epochs=config.train.epochs,
            images=epoch_images(config.data, self.shard_set, self.split),
            seen=progress.position.step * config.train.batch_size,
            steps_done=self.steps_done,
        )
        with bar:
            for batch in self.loader.epoch(
                epoch, start=progress.position.step, saliency=progress.saliency
            ):
                out = self.step(batch)
                progress.position = Position(epoch=epoch, step=batch.step + 1)
                progress.seconds = before + time.monotonic() - started
                spent = max(progress.seconds - before, 1e-9)
                seen += out.stats.images
                wait = (self.loader.wait_s - waited) / spent
                entry = self._entry(batch, out, rate=seen / spent, wait=wait)
                self.metrics_logger.step(entry, done=self.steps_done, steps=self.steps)
                self._checkpoint_within_epoch(batch, out)
        return entry

    def step(self, batch: CropBatch) -> StepOutput:
        """One optimiser step: forward, loss, backward, update (method.md, steps 4 to 6).

        The host waits for the device once, in `reduce_step_stats`.

        Raises:
            LmclError: If a rank met a number that is not finite; no weight was changed.
        """
        lr = self.set_learning_rate(batch)
        forward = self.grad_cache.forward(batch)
        terms = self.compute_loss(batch, forward)
        self.grad_cache.backward(batch, forward, terms.loss)
        grad_norm = self.clip_gradient()
        stats = self.reduce_step_stats(batch, forward, terms, grad_norm)
        if stats.broken:
            raise self._not_finite(batch, stats)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.teacher.update_after_step(self.core, steps_per_epoch=self.loader.steps)
        return StepOutput(stats=stats, lr=lr)

    def set_learning_rate(self, batch: CropBatch) -> float:
        """Give the optimiser this step's learning rate."""
        rate = learning_rate(
            self.config.schedule,
            step=batch.epoch * self.loader.steps + batch.step,
            steps_per_epoch=self.loader.steps,
            epochs=self.config.train.epochs,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def compute_loss(self, batch: CropBatch, forward: ForwardResult) -> Terms:
        """The objective of a batch: regression and contrastive terms."""
        goal, random = self.config.objective, self.config.crops.random
        return objective(
            forward.output,
            batch.mos,
            batch.ids,
            goal,
            images=batch.images,
            random=random,
            overlap=box_iou(batch.boxes[:, :random]) if goal.overlap_aware else None,
            keys=forward.keys,
            images_by_rank=images_by_rank(batch.images_of_all_ranks, self.context.world_size),
            weights=self._weights(batch),
            sets=batch.sets,
            labels=None if self.soft_labels is None else self.soft_labels[batch.ids],
            # Checking values waits for the device; what holds in the first step holds in all.
            validate=self.steps_done == 0,
        )

    @torch.no_grad()
    def _error_sums(
        self, batch: CropBatch, forward: ForwardResult
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Sums over this rank's random crops: absolute errors, and what the loss makes of them."""
        part = {"images": batch.images, "random": self.config.crops.random}
        errors = crop_errors(forward.output.score, batch.mos, **part)
        costs = regression_costs(
            forward.output, batch.mos, self.config.objective, self._weights(batch), **part
        )
        return errors.double().sum(), costs.double().sum()

    def _weights(self, batch: CropBatch) -> Float[Tensor, " b"] | None:
        return None if self.image_weights is None else self.image_weights[batch.ids]

    def clip_gradient(self) -> Float[Tensor, ""]:
        """Scale the gradient down to `train.clip`, if there is one; its norm before."""
        if self.config.train.clip:
            norm: Tensor = self.accelerator.clip_grad_norm_(
                self.student.parameters(), self.config.train.clip
            )
            return norm
        gradients = [value.grad for value in self.student.parameters() if value.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def reduce_step_stats(
        self, batch: CropBatch, forward: ForwardResult, terms: Terms, grad_norm: Float[Tensor, ""]
    ) -> StepStats:
        """Sum one small vector over all ranks: errors, figures, requests to stop, accidents.

        A rank that met a number that is not finite must not leave the others waiting for it in the
        next exchange, so all learn of it here and stop together. The one place of a step where
        the host waits for the device.
        """
        random = self.config.crops.random
        total, weighted = self._error_sums(batch, forward)
        has_l1 = torch.isfinite(total)
        flags = torch.zeros(self.context.world_size, dtype=torch.float64, device=total.device)
        flags[self.context.rank] = (
            _L1 * ~has_l1
            + _EMBEDDING * ~torch.isfinite(forward.output.embedding.detach()).all()
            + _LOSS * ~torch.isfinite(terms.loss.detach())
            # A scaler of float16 skips steps whose gradient overflows by itself.
            + _GRADIENT * ~(torch.isfinite(grad_norm) | (self.accelerator.scaler is not None))
        )
        figures = torch.stack([*(value.double() for value in terms[2:8]), grad_norm.double()])
        if not self.context.is_main:
            # Contrastive figures and the gradient are of all ranks: rank 0's count.
            figures = torch.zeros_like(figures)
        stop = torch.full_like(total, self.stop.requested)
        diverging = terms.distribution_loss.double() * (batch.images * random)
        sums = [torch.where(has_l1, one, 0.0) for one in (total, weighted, diverging)]
        mine = torch.stack([*sums, stop])
        summed: Tensor = self.accelerator.reduce(torch.cat([mine, figures, flags]), reduction="sum")
        error, counted, diverged, stops, *found = summed.tolist()
        contrastive, share, within, positive, plcc_loss, rank_loss, norm, *accidents = found
        broken, term = _find_broken([int(flag) for flag in accidents])
        return StepStats(
            images=batch.images_of_all_ranks,
            l1=error / (batch.images_of_all_ranks * random),
            regression=counted / (batch.images_of_all_ranks * random),
            contrastive=contrastive,
            intra_share=share,
            intra_similarity=within,
            positive_similarity=positive,
            plcc_loss=plcc_loss,
            rank_loss=rank_loss,
            distribution_loss=diverged / (batch.images_of_all_ranks * random),
            grad_norm=norm,
            stop=stops > 0,
            broken=broken,
            broken_term=term,
        )

    def validate(self, epoch: int, last: StepEntry | None) -> None:
        """Predict the val part, if there is one; keep the weights of the best epoch."""
        ids = self.split.part("val")
        value = ValFigures(srcc=None, plcc=None, reason="")
        if len(ids):
            with uncompiled(self.config.runtime.compile):
                found = predict(
                    self.evaluated_model,
                    self.source,
                    ids,
                    crops=self.config.crops,
                    preprocessing=self.preprocessing,
                    context=self.context,
                    batch_size=self.config.evaluation.batch_size,
                    title=f"epoch {epoch + 1}: validation",
                )
            value, best = val_figures(self.shard_set, found), self.progress.best_srcc
            if value.srcc is not None and (value.srcc > best or math.isnan(best)):
                self.progress.best_srcc, self.progress.best_epoch = value.srcc, epoch
                self._save_best()
        entry = EpochEntry(
            epoch=epoch,
            time_s=self.progress.seconds,
            val_srcc=value.srcc,
            val_plcc=value.plcc,
            val_reason=value.reason,
            val_sets=value.by_set,
        )
        self.metrics_logger.epoch_end(entry, last, done=(epoch + 1) * self.loader.steps)

    def save_checkpoint(self) -> None:
        """Write a checkpoint of the run's position; ranks hold the same state, rank 0 writes."""
        if self.context.is_main:
            progress, scaler = self.progress, self.accelerator.scaler
            table = progress.saliency
            state = State(
                position=progress.position,
                config=dump_config(self.config),
                data=self.split.hash,
                images=self.images_sha256,
                student=self.core.state_dict(),
                teacher=self.teacher.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scaler=scaler.state_dict() if scaler else {},
                saliency_ids=torch.from_numpy(table.ids if table else np.zeros(0, np.int64)),
                saliency_boxes=torch.from_numpy(
                    table.boxes if table else np.zeros((0, 4), np.int32)
                ),
                best_srcc=progress.best_srcc,
                best_epoch=progress.best_epoch,
                seconds=progress.seconds,
                collapsed_steps=self.metrics_logger.watch.streak,
            )
            write_checkpoint(
                self.run_dir.checkpoints,
                state,
                keep_last=self.config.runtime.keep_last,
                keep=Position(epoch=stable, step=0) if (stable := self.stable_epochs) else None,
            )
        self.accelerator.wait_for_everyone()

    def restore_checkpoint(self, state: State) -> None:
        """Put the run where the checkpoint was taken."""
        self.core.load_state_dict(state.student)
        self.teacher.model.load_state_dict(state.teacher)
        self.optimizer.load_state_dict(without_unused(state.optimizer, self.optimizer))
        if self.accelerator.scaler and state.scaler:
            self.accelerator.scaler.load_state_dict(state.scaler)
        ids, boxes = state.saliency_ids.numpy(), state.saliency_boxes.numpy()
        self.progress = Progress(
            position=state.position,
            saliency=SaliencyTable(ids=ids, boxes=boxes) if len(ids) else None,
            best_srcc=state.best_srcc,
            best_epoch=state.best_epoch,
            seconds=state.seconds,
        )
        self.metrics_logger.watch.streak = state.collapsed_steps
        if self.context.is_main:
            set_checkpoints_aside_after(self.run_dir.checkpoints, state.position)
            self.run_dir.rewind_log(epoch=state.position.epoch, step=state.position.step)

    def _save_best(self) -> None:
        if self.context.is_main:
            weights = self.evaluated_model.state_dict()
            path = best_path(self.run_dir.checkpoints, self.progress.best_epoch)
            keep_last = self.config.runtime.keep_last
            save_best(path, weights, keep_last=keep_last, before=self.stable_epochs)

    def _checkpoint_within_epoch(self, batch: CropBatch, out: StepOutput) -> None:
        """Write a checkpoint if one is due after this step, or the run was asked to stop."""
        every, done = self.config.runtime.checkpoint_steps, batch.step + 1
        is_due = every and done % every == 0 and done != self.loader.steps
        if out.stats.stop or is_due:
            self.save_checkpoint()
        if out.stats.stop:
            raise self._interrupted()

    def _is_stop_requested(self) -> bool:
        asked = torch.tensor(float(self.stop.requested), device=self.context.device)
        return bool(self.accelerator.reduce(asked, reduction="sum") > 0)

    def _interrupted(self) -> InterruptedRunError:
        position = self.progress.position
        return InterruptedRunError(
            f"{self.run_dir.root}: stopped as asked at epoch {position.epoch + 1}, step "
            f"{position.step}; the checkpoint is written, and {way_on()} goes on from there"
        )

    def _not_finite(self, batch: CropBatch, stats: StepStats) -> LmclError:
        """Save the ids of this rank's batch, if it is to blame, and name what happened where."""
        root = self.run_dir.root
        if self.context.rank in stats.broken:
            write_atomic(
                root / f"nonfinite-rank{self.context.rank}.txt",
                "\n".join(map(str, batch.ids.tolist())) + "\n",
            )
        term = stats.broken_term
        what = term if term == "gradient" else f"{term} term"
        ranks = ", ".join(map(str, stats.broken))
        files = ", ".join(f"nonfinite-rank{rank}.txt" for rank in stats.broken)
        return LmclError(
            f"{root}: the {what} is not finite at epoch {batch.epoch + 1}, step "
            f"{batch.step + 1}, rank {ranks}; the sample ids of the batch are in {files}. Lower "
            "schedule.lr or raise objective.temperature, set runtime.precision = 'no', or look at "
            "these images with `lmcl-shard verify --deep`"
        )

    def _entry(self, batch: CropBatch, out: StepOutput, *, rate: float, wait: float) -> StepEntry:
        stats, weight = out.stats, self.config.objective.contrastive_weight
        crops = self.config.crops.random
        goal = self.config.objective
        regression = stats.regression
        if goal.compares_images:
            regression += goal.plcc_weight * stats.plcc_loss + goal.rank_weight * stats.rank_loss
        regression += goal.distribution_weight * stats.distribution_loss
        return StepEntry(
            epoch=batch.epoch,
            step=batch.step,
            images=stats.images,
            loss=(1 - weight) * regression + weight * stats.contrastive,
            l1=stats.l1,
            plcc_loss=stats.plcc_loss if goal.plcc_weight else None,
            rank_loss=stats.rank_loss if goal.rank_weight else None,
            distribution_loss=stats.distribution_loss if self.config.decoder.bins else None,
            contrastive=stats.contrastive if weight else None,
            intra_share=stats.intra_share if weight and crops > 1 else None,
            intra_similarity=stats.intra_similarity if weight and crops > 1 else None,
            positive_similarity=stats.positive_similarity if weight else None,
            grad_norm=stats.grad_norm if self.config.train.clip else None,
            lr=out.lr,
            images_per_s=round(rate, 2),
            data_wait=round(wait, 4),
            time_s=round(self.progress.seconds, 3),
        )


def _find_broken(flags: list[int]) -> tuple[tuple[int, ...], str]:
    """Ranks to blame for a number that is not finite, and the first term that it spoils.

    Scores, labels and embeddings are a rank's own; the loss and the gradient are of all ranks.
    """
    own = tuple(rank for rank, flag in enumerate(flags) if flag & (_L1 | _EMBEDDING))
    if own:
        return own, "l1" if any(flag & _L1 for flag in flags) else "contrastive"
    everywhere = tuple(rank for rank, flag in enumerate(flags) if flag)
    return everywhere, "contrastive" if any(flag & _LOSS for flag in flags) else "gradient"
