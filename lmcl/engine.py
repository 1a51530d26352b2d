"""The training loop, readable aloud: look, cut, see, compare, learn, follow.

Every epoch the teacher looks at all training images; every step the loader cuts their crops, the
student sees them, the objective compares, the optimiser learns and the teacher follows.
"""

import dataclasses
import logging
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lmcl.checkpoint import Position, State, save_tensors, write_checkpoint
from lmcl.config import Config, dump_config
from lmcl.errors import LmclError
from lmcl.evaluate import Pixels, Place, autocast, judge, look
from lmcl.files import write_atomic
from lmcl.metrics import plcc, srcc
from lmcl.model import QualityModel
from lmcl.objective import Terms, objective
from lmcl.runtime import RunFolder, seed_step
from lmcl.saliency import make_table
from lmcl.schedule import learning_rate
from lmcl.teacher import Teacher
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, SaliencyTable, box_iou
from pipeline.loader import Loader
from pipeline.normalize import normalize
from shards.read import ShardSet
from shards.split import Split

logger = logging.getLogger(__name__)


class InterruptedRunError(LmclError):
    """The run was asked to stop; its checkpoint is written."""

    def __init__(self, message: str) -> None:
        super().__init__(message, exit_code=130)


@dataclass(kw_only=True)
class Run:
    """One training in progress: what is fixed, what learns, and where it stands."""

    config: Config
    folder: RunFolder
    accelerator: Accelerator
    place: Place
    pixels: Pixels
    shard_set: ShardSet
    split: Split
    student: torch.nn.Module
    """What is trained, wrapped for several ranks where there are any."""
    core: QualityModel
    """The student without wrapping; shares its weights."""
    teacher: Teacher
    optimizer: torch.optim.Optimizer
    loader: Loader
    position: Position
    saliency: SaliencyTable | None = None
    best_srcc: float = math.nan
    best_epoch: int = -1
    seconds: float = 0.0
    stopping: bool = False


@dataclass(frozen=True, kw_only=True)
class StepOutput:
    """What one optimiser step did."""

    terms: Terms
    lr: float
    images: int
    """Images of all ranks that counted."""
    stop: bool
    """Some rank was asked to stop."""


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
        LmclError: If the loss is not finite; the batch's keys are saved.
    """
    with _stop_on_signals(run):
        for epoch in range(run.position.epoch, run.config.train.epochs):
            if training_crops(run.config).salient:
                teacher_looks(run, epoch)
            train_epoch(run, epoch)
            run.teacher.follow_epoch(run.core)
            validate(run, epoch)
            run.position = Position(epoch=epoch + 1, step=0)
            save(run)


def teacher_looks(run: Run, epoch: int) -> None:
    """Refresh the salient box of every training image, unless this epoch keeps the old ones."""
    settings = run.config.saliency
    if run.saliency is not None and (run.position.step > 0 or epoch % settings.every):
        return
    looked = look(
        run.teacher.look,
        run.shard_set,
        run.split.part("train"),
        saliency=settings,
        crops=run.config.crops,
        pixels=run.pixels,
        place=run.place,
        keep_attention=False,
        title=f"epoch {epoch + 1}: teacher looks",
    )
    run.saliency = make_table(looked.ids, looked.boxes)
    if run.place.is_main:
        run.saliency.write(run.folder.saliency / f"epoch-{epoch:02d}.parquet")


def train_epoch(run: Run, epoch: int) -> None:
    """The steps of one epoch, from where the run stands."""
    run.student.train()
    started, before, waited, seen = time.monotonic(), run.seconds, run.loader.wait_s, 0
    batches = run.loader.epoch(epoch, start=run.position.step, saliency=run.saliency)
    with _bar(run, epoch) as bar:
        for batch in batches:
            out = step(run, batch)
            run.position = Position(epoch=epoch, step=batch.step + 1)
            run.seconds = before + time.monotonic() - started
            spent = max(run.seconds - before, 1e-9)
            seen += out.images
            _report_step(
                run, batch, out, bar, wait=(run.loader.wait_s - waited) / spent, rate=seen / spent
            )
            every = run.config.runtime.checkpoint_steps
            last = batch.step + 1 == run.loader.steps
            if out.stop:
                _stop(run)
            if every and (batch.step + 1) % every == 0 and not last:
                save(run)


def step(run: Run, batch: CropBatch) -> StepOutput:
    """See the crops, compare, learn, and let the teacher follow (method.md, steps 4 to 6)."""
    config, epochs = run.config, run.config.train.epochs
    seed_step(config.train.seed, epoch=batch.epoch, step=batch.step, rank=run.place.rank)
    images, stop = _agree(run, batch)
    lr = learning_rate(
        config.schedule,
        step=batch.epoch * run.loader.steps + batch.step,
        steps_per_epoch=run.loader.steps,
        epochs=epochs,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    terms = compare(run, batch, images=images)
    _check_finite(run, batch, terms)
    run.accelerator.backward(terms.loss)
    if config.train.clip:
        run.accelerator.clip_grad_norm_(run.student.parameters(), config.train.clip)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.teacher.follow_step(run.core, steps_per_epoch=run.loader.steps)
    return StepOutput(terms=terms, lr=lr, images=images, stop=stop)


def compare(run: Run, batch: CropBatch, *, images: int) -> Terms:
    """The student's view of a batch and the objective on it; `images` count over all ranks."""
    goal, random = run.config.objective, run.config.crops.random
    pixels = normalize(batch.crops, mean=run.pixels.mean, std=run.pixels.std, dtype=torch.float32)
    if run.config.train.flip:
        pixels = _flip_half(pixels)
    with autocast(run.place.device, run.pixels.precision):
        output = run.student(pixels)
        wants_keys = goal.keys == "teacher" and goal.contrastive_weight > 0
        keys = run.teacher.embed(pixels) if wants_keys else None
    here = int(batch.valid.sum())
    return objective(
        output,
        batch.mos,
        batch.ids,
        batch.valid,
        goal,
        random=random,
        overlap=box_iou(batch.boxes[:, :random]) if goal.overlap_aware else None,
        keys=keys,
        rank_share=run.place.world_size * here / images,
    )


def validate(run: Run, epoch: int) -> None:
    """Judge the val part, if there is one; remember the weights of the best epoch."""
    entry: dict[str, object] = {"event": "epoch", "epoch": epoch, "time_s": run.seconds}
    ids = run.split.part("val")
    if len(ids):
        judged = judge(
            judged_model(run),
            run.shard_set,
            ids,
            crops=run.config.crops,
            pixels=run.pixels,
            place=run.place,
            batch_size=run.config.evaluation.batch_size,
            title=f"epoch {epoch + 1}: validation",
        )
        mos = run.shard_set.unit_mos()[judged.ids]
        value = srcc(judged.score, mos)
        entry |= {"val_srcc": value, "val_plcc": plcc(judged.score, mos)}
        if value > run.best_srcc or (math.isnan(run.best_srcc) and not math.isnan(value)):
            run.best_srcc, run.best_epoch = value, epoch
            _keep_best(run)
        logger.info("epoch %d: validation SRCC %.4f", epoch + 1, value)
    if run.place.is_main:
        run.folder.append_log(entry)


def judged_model(run: Run) -> QualityModel:
    """Whose weights are evaluated."""
    return run.teacher.model if run.config.evaluation.model == "teacher" else run.core


def save(run: Run) -> None:
    """Write a checkpoint of the run's position; all ranks hold the same state, rank 0 writes."""
    if run.place.is_main:
        table = run.saliency
        state = State(
            position=run.position,
            config=dump_config(run.config),
            student=run.core.state_dict(),
            teacher=run.teacher.model.state_dict(),
            optimizer=run.optimizer.state_dict(),
            scaler=run.accelerator.scaler.state_dict() if run.accelerator.scaler else {},
            saliency_ids=torch.from_numpy(table.ids if table else np.zeros(0, np.int64)),
            saliency_boxes=torch.from_numpy(table.boxes if table else np.zeros((0, 4), np.int32)),
            best_srcc=run.best_srcc,
            best_epoch=run.best_epoch,
            seconds=run.seconds,
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
    if run.place.is_main:
        run.folder.rewind_log(epoch=state.position.epoch, step=state.position.step)


def _agree(run: Run, batch: CropBatch) -> tuple[int, bool]:
    """Valid images over all ranks, and whether any rank wants to stop: one tiny all-reduce."""
    here = torch.tensor([float(batch.valid.sum()), float(run.stopping)], dtype=torch.float64)
    everywhere: Tensor = run.accelerator.reduce(here.to(run.place.device), reduction="sum")
    return int(everywhere[0]), bool(everywhere[1] > 0)


def _flip_half(pixels: Tensor) -> Tensor:
    mirrored = torch.rand(len(pixels), device=pixels.device) < 0.5
    return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)


def _check_finite(run: Run, batch: CropBatch, terms: Terms) -> None:
    if torch.isfinite(terms.loss):
        return
    wrong = "l1" if not torch.isfinite(terms.l1) else "contrastive"
    keys = run.folder.root / f"nonfinite-rank{run.place.rank}.txt"
    write_atomic(keys, "\n".join(map(str, batch.ids.tolist())) + "\n")
    raise LmclError(
        f"{run.folder.root}: the {wrong} term is {float(getattr(terms, wrong))} at epoch "
        f"{batch.epoch}, step {batch.step}, rank {run.place.rank}; the batch's sample ids are in "
        f"{keys.name}. Lower schedule.lr or raise objective.temperature, or look at these images "
        "with `lmcl-shard verify --deep`"
    )


def _keep_best(run: Run) -> None:
    if not run.place.is_main:
        return
    weights = judged_model(run).state_dict()
    save_tensors(best_path(run.folder, run.best_epoch), {"model": weights})
    for old in run.folder.checkpoints.glob("best-*"):
        if f"best-{run.best_epoch:04d}.pt" not in old.name:
            old.unlink()


def best_path(folder: RunFolder, epoch: int) -> Path:
    """Where the weights of the best epoch stand."""
    return folder.checkpoints / f"best-{epoch:04d}.pt"


def _report_step(
    run: Run, batch: CropBatch, out: StepOutput, bar: tqdm, *, wait: float, rate: float
) -> None:
    if not run.place.is_main:
        return
    values = {
        "l1": float(out.terms.l1),
        "contrastive": float(out.terms.contrastive),
        "intra_share": float(out.terms.intra_share),
        "intra_similarity": float(out.terms.intra_similarity),
        "positive_similarity": float(out.terms.positive_similarity),
    }
    bar.set_postfix(
        {"l1": f"{values['l1']:.3f}", "con": f"{values['contrastive']:.2f}", "wait": f"{wait:.0%}"},
        refresh=False,
    )
    bar.update(out.images)
    run.folder.append_log(
        {
            "event": "step",
            "epoch": batch.epoch,
            "step": batch.step,
            "images": out.images,
            "loss": float(out.terms.loss.detach()),
            **values,
            "lr": out.lr,
            "images_per_s": round(rate, 2),
            "data_wait": round(wait, 4),
            "time_s": round(run.seconds, 3),
        }
    )


def _bar(run: Run, epoch: int) -> tqdm:
    return tqdm(
        total=len(run.split.part("train")),
        initial=run.position.step * run.config.train.batch_size,
        desc=f"epoch {epoch + 1}/{run.config.train.epochs}",
        unit="img",
        disable=None if run.place.progress else True,
    )


def _stop(run: Run) -> None:
    save(run)
    raise InterruptedRunError(
        f"{run.folder.root}: stopped as asked at epoch {run.position.epoch}, step "
        f"{run.position.step}; --resume auto goes on from there"
    )


@contextmanager
def _stop_on_signals(run: Run) -> Iterator[None]:
    """Turn SIGTERM and SIGINT into a checkpoint at the end of the step; a second one kills."""
    taken = (signal.SIGTERM, signal.SIGINT)

    def ask(_signum: int, _frame: FrameType | None) -> None:
        run.stopping = True
        for signum in taken:
            signal.signal(signum, before[signum])

    try:
        before = {signum: signal.signal(signum, ask) for signum in taken}
    except ValueError:
        # Not the main thread (a notebook, a server): signals are the owner's business.
        yield
        return
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
