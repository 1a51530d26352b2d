"""The network in PyTorch: qualities of crops, gradients, where it looks.

A pass does not depend on what surrounds it: the caller's autocast, a fork, the other images.
"""

import contextlib
import copy
import logging
import os
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from lmcl.errors import LmclError
from lmcl.inference.adaptive_scoring import CropOutputs
from lmcl.models.precision import has_bfloat16
from lmcl.models.pretrained import ModelCard, ReleasedModel
from lmcl.models.quality_model import to_bfloat16
from lmcl.models.saliency import best_window, window_to_box
from pipeline.boxes import CropConfig, evaluation_boxes, frame_sizes, scaled_sizes
from pipeline.normalize import normalize

logger = logging.getLogger(__name__)

_IMPORTED_BY = os.getpid()
_told_threads = {_IMPORTED_BY}
"""Processes in which torch's threads exist, or have been given up."""


class TorchEngine:
    """A released model on a device, ready to judge crops.

    It can be copied and pickled; weights go with it.
    """

    name: Literal["torch"] = "torch"

    def __init__(
        self,
        released: ReleasedModel,
        *,
        device: str | torch.device,
        precision: Literal["float32", "bfloat16", "auto"],
    ) -> None:
        self.card: ModelCard = released.card
        self.device = torch.device(device)
        self.precision: Literal["float32", "bfloat16"] = "float32"
        # Channels-last changes which convolution is picked; it must be the same on every day.
        self.model = released.model.eval().requires_grad_(False).to(self.device)
        has_it = has_bfloat16(self.device)
        if precision == "auto":
            _tell_choice(self.device, has_it)
        if precision == "bfloat16" or (precision == "auto" and has_it):
            before_s = 0.0 if has_it else self._time_pass()
            self.precision = "bfloat16"
            to_bfloat16(self.model, self.device)
            if not has_it:
                _warn_of_emulation(self._time_pass() / before_s)

    def _time_pass(self) -> float:
        """Seconds of processor time of one image's pass, after one that warms up."""
        size, count = self.card.crops.size, self.card.crops.evaluation
        crops = [np.zeros((count, size, size, 3), np.uint8)]
        self.forward(crops, batch_images=1)
        begin = time.process_time()
        self.forward(crops, batch_images=1)
        return max(time.process_time() - begin, 1e-6)

    @property
    def batch_images(self) -> int:
        """Images of a pass."""
        return 16 if self.device.type == "cuda" else 1

    @property
    def gives_deviation(self) -> bool:
        """Whether the model predicts how far ratings lie apart."""
        return self.card.decoder.bins > 0

    @property
    def view_side(self) -> int:
        """Side of the whole image's view that `salient_box` takes, pixels."""
        return self.card.saliency.view

    def forward(self, crops: Sequence[np.ndarray | Tensor], *, batch_images: int) -> CropOutputs:
        """Quality of every crop, in [0, 1] units, higher = better, and its embedding.

        Matrix products pick their algorithm by the shape of their input, and algorithms differ in
        the last bits: so a short batch is filled up, and every pass has one and the same shape.

        Args:
            crops: Of each image, bytes `[v, s, s, 3]`, arrays or tensors on this device.
            batch_images: Images of a pass; at least as many as there are.

        Raises:
            LmclError: In a process that was forked from one that has used the GPU.
        """
        settle_after_fork(self.device)
        pixels = self._stacked(crops)
        missing = batch_images - len(pixels)
        if missing > 0:
            pixels = torch.cat([pixels, pixels.new_zeros((missing, *pixels.shape[1:]))])
        with torch.inference_mode(), self.autocast():
            output = self.model(self._normalized(pixels))
        quality = output.score.double().cpu().numpy().reshape(len(pixels), -1)
        embedding = output.embedding.float().cpu().numpy().reshape(*quality.shape, -1)
        kept = len(pixels) - max(missing, 0)
        deviation = None
        if output.deviation is not None:
            deviation = output.deviation.double().cpu().numpy().reshape(quality.shape)[:kept]
        return CropOutputs(quality[:kept], embedding[:kept], deviation)

    def salient_box(
        self, view: UInt8[np.ndarray, "g g 3"], size: tuple[int, int]
    ) -> tuple[int, int, int, int]:
        """The crop the network looks at most: y, x, h, w, from the whole image's squeezed view."""
        settle_after_fork(self.device)
        saliency = self.card.saliency
        with torch.inference_mode(), self.autocast():
            flat = self._normalized(torch.from_numpy(view[None, None]))
            maps = self.model.encoder.cls_attention(flat, layers=saliency.layers).cpu()
        box = window_to_box(
            best_window(maps, saliency.window).numpy(),
            np.array([size]),
            grid=maps.shape[-1],
            window=saliency.window,
            size=self.card.crops.size,
        )[0].tolist()
        return box[0], box[1], box[2], box[3]

    def quality(self, images: Float[Tensor, "b c h w"], keys: Sequence[int]) -> Float[Tensor, " b"]:
        """Qualities of images in [0, 1], with gradients; see `Scorer.quality`."""
        settle_after_fork(self.device)
        half = images.dtype in (torch.float16, torch.bfloat16)
        pixels = images.to(self.device, torch.float32 if half else images.dtype)
        pixels = pixels.expand(-1, 3, -1, -1)
        cut = cut_crops(pixels, self.card.crops, keys)
        mean, std = (cut.new_tensor(v)[:, None, None] for v in (self.card.mean, self.card.std))
        flat = ((cut - mean) / std).contiguous(memory_format=torch.channels_last)
        is_wide = flat.dtype == torch.float64
        # Weights as wide as the pixels: a gradient is compared with differences in float64.
        model = copy.deepcopy(self.model).double() if is_wide else self.model
        with self.autocast(enabled=not is_wide):
            scores: Tensor = model(flat).score
        return scores.reshape(len(pixels), -1).mean(dim=1)

    def autocast(self, *, enabled: bool = True) -> contextlib.AbstractContextManager[None]:
        """The region the network runs in: products in bfloat16 if that was asked for, else none.

        Never the caller's own: scores would move by thousandths of the range with it.
        """
        wanted = enabled and self.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def _stacked(self, crops: Sequence[np.ndarray | Tensor]) -> UInt8[Tensor, "b v s s 3"]:
        if all(isinstance(one, np.ndarray) for one in crops):
            return torch.from_numpy(np.stack([np.asarray(one) for one in crops]))
        return torch.stack([torch.as_tensor(one, device=self.device) for one in crops])

    def _normalized(self, pixels: UInt8[Tensor, "b v s s 3"]) -> Float[Tensor, "n 3 s s"]:
        card = self.card
        return normalize(pixels.to(self.device), mean=card.mean, std=card.std, dtype=torch.float32)


def cut_crops(
    images: Float[Tensor, "b 3 h w"], crops: CropConfig, keys: Sequence[int]
) -> Float[Tensor, "n 3 s s"]:
    """The crops that scoring cuts, without rounding to bytes, so that gradients flow."""
    height, width = images.shape[-2:]
    heights, widths = np.array([height]), np.array([width])
    tall, wide = scaled_sizes(heights, widths, crops)[0].tolist()
    if (tall, wide) != (height, width):
        images = functional.interpolate(images, size=(tall, wide), mode="bilinear", antialias=True)
    for axis, side in ((-2, tall), (-1, wide)):
        if side < crops.size:
            mirrored = np.pad(np.arange(side), (0, crops.size - side), mode="reflect")
            images = images.index_select(axis, torch.from_numpy(mirrored).to(images.device))
    frames = np.repeat(frame_sizes(heights, widths, crops), len(images), axis=0)
    boxes = evaluation_boxes(np.array(keys, dtype=np.int64), frames, crops)
    size = crops.size
    return torch.stack(
        [
            image[:, y : y + size, x : x + size]
            for image, places in zip(images, boxes, strict=True)
            for y, x in places[:, :2].tolist()
        ]
    )


def _tell_choice(device: torch.device, has_it: bool) -> None:
    logger.info(
        "precision auto: the network computes in %s, as %s %s",
        "bfloat16" if has_it else "float32",
        device,
        "multiplies in it" if has_it else "has no bfloat16 products",
    )


def _warn_of_emulation(factor: float) -> None:
    logger.warning(
        "this processor has no bfloat16 and emulates it: one image took %.1f times as long as in "
        "float32, and its score is less exact; --precision auto takes float32 here",
        factor,
    )


def settle_after_fork(device: torch.device) -> None:
    """Make torch usable in a forked process: its threads were not copied, and are waited for.

    One thread from then on, for the whole process; nothing in a process that was not forked.

    Raises:
        LmclError: On a GPU, which cannot be used after a fork; exit code 2.
    """
    process = os.getpid()
    if process in _told_threads:
        return
    if device.type == "cuda":
        raise LmclError(
            f"this process was forked from one that uses {device}, and a GPU cannot be used after "
            "a fork; start processes by multiprocessing.get_context('spawn'), or open the model in "
            "the child",
            exit_code=2,
        )
    torch.set_num_threads(1)
    _told_threads.add(process)
