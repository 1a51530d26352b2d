"""What student and teacher see of a batch, and how the gradient finds its way back to the weights.

A batch larger than memory is seen in parts (`runtime.micro_batch`), and the contrastive term still
compares all images of all ranks: every part is embedded without a graph, the objective is taken
once over the whole, and each part is embedded again with the gradient of its embeddings and scores.
The result is the gradient of the undivided batch, for one more forward pass.

Source: [Gao, Zhang, Han, Callan, 2021], "Scaling Deep Contrastive Learning Batch Size under Memory
Limited Setup" (GradCache), section 3.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lmcl.distributed import RankContext
from lmcl.errors import ConfigError
from lmcl.method.teacher import Teacher
from lmcl.models.preprocess import Preprocessing, autocast, preprocess
from lmcl.models.quality_model import StudentOutput
from lmcl.training.seeding import seed_step
from pipeline.batch import CropBatch


@dataclass(frozen=True, kw_only=True)
class ForwardResult:
    """A batch in the student's eyes."""

    output: StudentOutput
    """All crops, image-major. Of an undivided batch it carries the graph; of a divided one it is a
    leaf that collects the objective's gradient."""
    keys: Float[Tensor, "n d"] | None
    """The teacher's embeddings of the same crops, where the objective wants them."""
    parts: tuple[slice, ...]
    """Images of each forward pass."""
    mirrored: Bool[Tensor, " n"] | None
    """Which crops were flipped; None = flipping is off."""


@dataclass(frozen=True, kw_only=True)
class GradCache:
    """How training crops reach the networks."""

    student: nn.Module
    """What is trained, wrapped for several ranks where there are any."""
    key_teacher: Teacher | None
    """Who embeds the keys; None where the student's own embeddings are the keys."""
    accelerator: Accelerator
    preprocessing: Preprocessing
    context: RankContext
    flip: bool
    micro_batch: int
    """Images per forward pass; 0 = the whole batch."""
    seed: int

    def forward(self, batch: CropBatch) -> ForwardResult:
        """Embeddings and scores of all crops of this rank."""
        seed_step(self.seed, epoch=batch.epoch, step=batch.step, rank=self.context.rank)
        mirrored = None
        if self.flip:
            crops = batch.crops.shape[0] * batch.crops.shape[1]
            mirrored = torch.rand(crops, device=batch.crops.device) < 0.5
        parts = split_images(len(batch.ids), self.micro_batch)
        whole = len(parts) == 1
        outputs, keys = [], []
        for number, part in enumerate(parts):
            pixels = self._view(batch, part, mirrored)
            with nullcontext() if whole else torch.no_grad():
                outputs.append(self._forward(pixels, batch, part, number))
            if self.key_teacher is not None:
                with autocast(self.context.device, self.preprocessing.precision):
                    keys.append(self.key_teacher.embed(pixels))
        return ForwardResult(
            output=outputs[0] if whole else _cached(outputs),
            keys=torch.cat(keys) if keys else None,
            parts=parts,
            mirrored=mirrored,
        )

    def backward(self, batch: CropBatch, seen: ForwardResult, loss: Float[Tensor, ""]) -> None:
        """Add the gradient of `loss` to the student's weights, summed over parts and ranks."""
        self.accelerator.backward(loss)
        if len(seen.parts) == 1:
            return
        views = batch.crops.shape[1]
        for number, part in enumerate(seen.parts):
            last = number == len(seen.parts) - 1
            rows = slice(part.start * views, part.stop * views)
            # Ranks exchange gradients once, with the last part.
            with nullcontext() if last else self.accelerator.no_sync(self.student):
                pixels = self._view(batch, part, seen.mirrored)
                again = self._forward(pixels, batch, part, number)
                torch.autograd.backward(*_gradients(again, seen.output, rows))

    def _forward(self, pixels: Tensor, batch: CropBatch, part: slice, number: int) -> StudentOutput:
        # Layers that draw random numbers must draw the same ones when a part is seen again.
        seed_step(
            self.seed, epoch=batch.epoch, step=batch.step, rank=self.context.rank, part=number + 1
        )
        with autocast(self.context.device, self.preprocessing.precision):
            if batch.sets is None:
                output: StudentOutput = self.student(pixels)
            else:
                views = batch.crops.shape[1]
                output = self.student(pixels, batch.sets.number[part].repeat_interleave(views))
        return output

    def _view(self, batch: CropBatch, part: slice, mirrored: Tensor | None) -> Tensor:
        flip = None
        if mirrored is not None:
            views = batch.crops.shape[1]
            flip = mirrored[part.start * views : part.stop * views]
        return preprocess(batch.crops[part], self.preprocessing, flip)


def split_images(images: int, most: int) -> tuple[slice, ...]:
    """Ranges of at most `most` images that cover `images`; 0 = all in one."""
    size = most or images
    return tuple(
        slice(start, min(start + size, images)) for start in range(0, max(images, 1), size)
    )


def check_divisible(student: nn.Module) -> None:
    """Refuse to see a batch in parts where a layer's result depends on the rest of the batch.

    Raises:
        ConfigError: If the student has batch norms: their statistics would be those of a part.
    """
    for name, module in student.named_modules():
        learns = any(parameter.requires_grad for parameter in module.parameters())
        if learns and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"runtime.micro_batch sees a batch in parts, but {name} of the encoder is a "
                f"{type(module).__name__}, whose statistics are those of all crops seen at once, "
                "so the gradient would be another one; set runtime.micro_batch = 0, or take an "
                "encoder without batch norms (timm ViTs, squeezenet-vit, a frozen stem). "
                "runtime.gradient_checkpointing saves memory without dividing the batch"
            )


def _cached(outputs: list[StudentOutput]) -> StudentOutput:
    readouts = [output.readouts for output in outputs if output.readouts is not None]
    logits = [output.logits for output in outputs if output.logits is not None]
    return StudentOutput(
        embedding=torch.cat([output.embedding for output in outputs]).requires_grad_(),
        score=torch.cat([output.score for output in outputs]).requires_grad_(),
        readouts=torch.cat(readouts).requires_grad_() if readouts else None,
        logits=torch.cat(logits).requires_grad_() if logits else None,
    )


def _gradients(
    again: StudentOutput, cached: StudentOutput, rows: slice
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of one part and the gradient each was given; embeddings may have got none."""
    pairs = [
        (output, leaf.grad[rows])
        for output, leaf in zip(again, cached, strict=True)
        if output is not None and leaf is not None and leaf.grad is not None
    ]
    return [output for output, _ in pairs], [gradient for _, gradient in pairs]
