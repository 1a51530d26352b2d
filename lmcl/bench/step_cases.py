"""The two loops that `lmcl bench step` compares: this project's own, and the usual one.

Ours is the loop that `lmcl train` runs, watched from outside. The other is written the way DEIQT's
public code is: every crop is an entry of the data set, opened and decoded anew by worker processes
with Pillow; crops are independent samples, shuffled one by one; the loss is L1 alone; no compiler.
Both have the same model, precision, optimiser and number of crops in a step.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

from lmcl.bench.step_data import StepData
from lmcl.bench.stopwatch import Part, PeakMemory, Spent, Stopwatch, synchronize
from lmcl.bench.workers import Workers
from lmcl.config import Config
from lmcl.models.preprocess import Preprocessing, autocast
from lmcl.training.checkpoint import Position
from lmcl.training.setup import prepare
from lmcl.training.student import make_student
from lmcl.training.trainer import Trainer, training_crops
from lmcl.utils.environment import engines_line


@dataclass(frozen=True, kw_only=True)
class Round:
    """What some optimiser steps of one loop took."""

    spent: Spent
    """Wall-clock seconds."""
    cpu: float
    """Processor seconds of this process's threads and of its workers."""


class Loop(Protocol):
    """A training loop that can be run for a round."""

    peak_bytes: int
    """Highest memory of its first round, above what was in use before it was built."""
    engines: str
    """What computes it: device, decoder, loss."""

    def round(self) -> Round:
        """Some optimiser steps."""

    def close(self) -> None:
        """Give back what it holds."""


def views(config: Config) -> int:
    """Crops of one image that pass through the student in a step."""
    crops = training_crops(config)
    return crops.random + crops.salient


class OurLoop:
    """One epoch of `lmcl train` on the benchmark's images, as often as wanted.

    The run's objects report to a stopwatch; what they do, and in which order, is the engine's.
    """

    def __init__(self, config: Config, folder: Path, device: torch.device) -> None:
        gc.collect()
        memory = PeakMemory(device)
        trainer = prepare(config, folder, resume="", progress=False)
        self._trainer, self._epoch, self._device = trainer, 0, device
        self._watch = Stopwatch(device)
        _watch_trainer(trainer, self._watch)
        self.steps, self.engines = trainer.loader.steps, trainer.engines
        self.preprocessing = trainer.preprocessing
        self._looks = training_crops(config).salient
        self.round()
        self.peak_bytes = memory.read()

    def round(self) -> Round:
        """An epoch, and the teacher's look before it as far as it falls to one epoch."""
        trainer = self._trainer
        trainer.progress.position = Position(epoch=self._epoch, step=0)
        began = time.process_time()
        saliency = self._look() if self._looks else 0.0
        looked = time.process_time()
        self._watch.start(Part.LOGGING)
        trainer.train_epoch(self._epoch)
        spent = self._watch.stop()
        share = saliency / trainer.config.saliency.every
        self._epoch += 1
        return Round(
            spent=Spent(wall=spent.wall + share, parts={**spent.parts, Part.SALIENCY: share}),
            cpu=time.process_time() - looked + (looked - began) / trainer.config.saliency.every,
        )

    def close(self) -> None:
        """End the loader's threads."""
        self._trainer.close()

    def _look(self) -> float:
        """Wall-clock seconds of a pass over all training images."""
        on_gpu = self._device.type == "cuda"
        synchronize(on_gpu)
        began = time.perf_counter()
        # Whatever saliency.every says, this epoch's pass is made: its cost is divided by it.
        self._trainer.progress.saliency = None
        self._trainer.run_saliency_pass(self._epoch)
        synchronize(on_gpu)
        return time.perf_counter() - began


class PlainLoop:
    """A training loop as it is usually written."""

    def __init__(
        self,
        config: Config,
        data: StepData,
        *,
        steps: int,
        preprocessing: Preprocessing,
        device: torch.device,
        workers: int,
    ) -> None:
        self._steps, self._preprocessing, self._device = steps, preprocessing, device
        self._clip = config.train.clip
        self.engines = engines_line(device, "decode pillow", "loss l1 fp32")
        gc.collect()
        memory = PeakMemory(device)
        self._model = make_student(config, device)
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.schedule.lr,
            betas=config.train.betas,
            weight_decay=config.train.weight_decay,
        )
        self._watch = Stopwatch(device)
        self._workers = Workers(_plain_loader(config, data, preprocessing, device, workers))
        self._batches = iter(self._workers)
        self.losses: list[float] = []
        self.round()
        self.peak_bytes = memory.read()

    def round(self) -> Round:
        """As many optimiser steps as the other loop takes in a round."""
        self._workers.resume()
        began = time.process_time() + self._workers.cpu_seconds()
        self._watch.start(Part.WAIT)
        for _ in range(self._steps):
            pixels, target = next(self._batches)
            self._step(pixels, target)
        spent = self._watch.stop()
        cpu = time.process_time() + self._workers.cpu_seconds() - began
        self._workers.pause()
        return Round(spent=spent, cpu=cpu)

    def close(self) -> None:
        """End the worker processes."""
        self._workers.close()

    def _step(self, pixels: Tensor, target: Tensor) -> None:
        watch = self._watch
        watch.enter(Part.PREPARE)
        pixels, target = pixels.to(self._device), target.to(self._device)
        watch.enter(Part.FORWARD)
        with autocast(self._device, self._preprocessing.precision):
            score = self._model(pixels).score
        watch.enter(Part.OBJECTIVE)
        score.register_hook(_mark(watch, Part.BACKWARD))
        loss = nn.functional.l1_loss(score, target)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        watch.enter(Part.OPTIMISER)
        if self._clip:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        watch.enter(Part.LOGGING)
        self.losses.append(loss.item())
        watch.enter(Part.WAIT)


class PlainCrops(Dataset[tuple[Tensor, float]]):
    """Every crop an entry: the file is opened, decoded whole, and one crop is cut from it."""

    def __init__(
        self, data: StepData, *, crops: int, size: int, preprocessing: Preprocessing
    ) -> None:
        self._samples = [
            (path, label)
            for path, label in zip(data.files, data.labels, strict=True)
            for _ in range(crops)
        ]
        self._transform: Callable[[Image.Image], Tensor] = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.RandomCrop(size=size),
                transforms.ToTensor(),
                transforms.Normalize(mean=preprocessing.mean, std=preprocessing.std),
            ]
        )

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        path, label = self._samples[index]
        with path.open("rb") as file:
            image = Image.open(file).convert("RGB")
        return self._transform(image), label


def crop_flops(config: Config, device: torch.device) -> int:
    """Floating-point operations of the networks for one crop, forward and backward, as counted.

    What is done twice for want of memory is not counted: these are the model's operations.
    """
    model = make_student(config, device)
    side = config.crops.size
    with FlopCounterMode(display=False) as counter:
        output = model(torch.randn(1, 3, side, side, device=device))
        (output.score.sum() + output.embedding.sum()).backward()
    return int(counter.get_total_flops())


def _plain_loader(
    config: Config, data: StepData, preprocessing: Preprocessing, device: torch.device, workers: int
) -> DataLoader[Any]:
    crops = PlainCrops(
        data, crops=views(config), size=config.crops.size, preprocessing=preprocessing
    )
    return DataLoader(
        crops,
        batch_size=config.train.batch_size * views(config),
        # Endless: the workers of the usual loop are started once, and so are these.
        sampler=RandomSampler(crops, replacement=True, num_samples=1 << 40),
        num_workers=workers,
        multiprocessing_context="forkserver" if workers else None,
        pin_memory=device.type == "cuda",
        drop_last=True,
    )


class _Watched(nn.Module):
    """A network that says when its forward pass begins and ends, and when its backward begins."""

    def __init__(self, inner: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.inner = inner
        self._watch = watch

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """The inner network's answer."""
        self._watch.enter(Part.FORWARD)
        output = self.inner(*inputs, **options)
        self._watch.enter(Part.OBJECTIVE)
        if output.score.requires_grad:
            # Autograd runs what was recorded last first: all of the objective comes before this.
            output.score.register_hook(_mark(self._watch, Part.BACKWARD))
        return output


def _watch_trainer(trainer: Trainer, watch: Stopwatch) -> None:
    """Let the parts of a run report to the stopwatch; none of them behaves otherwise."""
    trainer.student = _Watched(trainer.student, watch)
    trainer.grad_cache = dataclasses.replace(trainer.grad_cache, student=trainer.student)
    _surround(trainer.teacher, "embed", watch, during=Part.FORWARD, after=Part.OBJECTIVE)
    _surround(trainer.teacher, "update_after_step", watch, during=Part.TEACHER, after=Part.LOGGING)
    _surround(trainer.accelerator, "backward", watch, during=Part.OBJECTIVE, after=Part.OPTIMISER)
    for owner, name in ((trainer.accelerator, "clip_grad_norm_"), (trainer.optimizer, "step")):
        _surround(owner, name, watch, during=Part.OPTIMISER, after=Part.OPTIMISER)
    batches = trainer.loader.epoch

    def epoch(*arguments: Any, **options: Any) -> Iterator[Any]:
        watch.enter(Part.WAIT)
        for batch in batches(*arguments, **options):
            watch.enter(Part.PREPARE)
            yield batch
            watch.enter(Part.WAIT)
        watch.enter(Part.LOGGING)

    trainer.loader.epoch = epoch  # type: ignore[method-assign]


def _surround(owner: object, name: str, watch: Stopwatch, *, during: Part, after: Part) -> None:
    method = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        watch.enter(during)
        found = method(*arguments, **options)
        watch.enter(after)
        return found

    setattr(owner, name, watched)


def _mark(watch: Stopwatch, part: Part) -> Callable[[Tensor], None]:
    def mark(_gradient: Tensor) -> None:
        watch.enter(part)

    return mark
