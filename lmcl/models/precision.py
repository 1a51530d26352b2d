"""Precision: what the networks compute in, decided by what the device multiplies in.

bfloat16 on a processor that lacks it is emulated, several times slower than float32, and nothing
else shows it; so `runtime.precision = "auto"` looks first (docs/decisions/0012).
"""

import copy
import logging
import time
from dataclasses import dataclass
from typing import Literal

import torch

from lmcl.models.preprocess import PRECISIONS, autocast
from lmcl.models.quality_model import QualityModel, select_attention_impl

logger = logging.getLogger(__name__)

PrecisionName = Literal["no", "bf16", "fp16"]
AskedPrecision = Literal["auto", "no", "bf16", "fp16"]
"""Values of `runtime.precision`."""


@dataclass(frozen=True, kw_only=True)
class PrecisionChoice:
    """What the networks compute in, and why."""

    name: PrecisionName
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """Type of autocast; float32 = none."""
        return PRECISIONS[self.name]

    @property
    def line(self) -> str:
        """For the line a command begins with: `networks bf16 (avx512_bf16)`."""
        name = "float32" if self.name == "no" else self.name
        return f"networks {name} ({self.reason})"


def choose_precision(asked: AskedPrecision, device: torch.device) -> PrecisionChoice:
    """The precision of the networks on a device; `auto` is bf16 where it multiplies in that.

    Args:
        asked: `runtime.precision`.
        device: Of the networks.
    """
    unit = bfloat16_unit(device)
    if asked != "auto":
        return PrecisionChoice(name=asked, reason="as asked")
    if unit:
        return PrecisionChoice(name="bf16", reason=f"auto: {unit}")
    return PrecisionChoice(name="no", reason=f"auto: {device.type} has no bfloat16 products")


def bfloat16_unit(device: torch.device) -> str:
    """What multiplies bfloat16 on a device (`avx512_bf16`, `amx`, `sm_90`); empty: nothing does."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}" if major >= 8 else ""
    if device.type != "cpu":
        return ""
    if torch.cpu._is_amx_tile_supported():
        return "amx"
    return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else ""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself; others emulate it, slowly."""
    return bool(bfloat16_unit(device))


def warn_of_emulation(
    model: QualityModel,
    precision: torch.dtype,
    device: torch.device,
    *,
    size: int,
    crops: int,
    learns: bool,
) -> None:
    """Measure a half precision that the device emulates in one batch, and warn with the factor.

    Nothing where the device multiplies in it. Weights, statistics and random numbers stay as they
    are.

    Args:
        model: The run's own network, on the device.
        precision: What it is to compute in.
        device: Of the model.
        size: Side of a crop in pixels.
        crops: Of the batch.
        learns: Whether the backward pass is measured too.
    """
    if precision == torch.float32 or has_bfloat16(device):
        return
    factor = _measure_factor(model, precision, device, size=size, crops=crops, learns=learns)
    logger.warning(
        "%s does not multiply in %s and emulates it: one batch of %d crops took %.1f times as long "
        "as in float32; runtime.precision = 'auto' takes float32 here",
        device,
        str(precision).removeprefix("torch."),
        crops,
        factor,
    )


def _measure_factor(
    model: QualityModel,
    precision: torch.dtype,
    device: torch.device,
    *,
    size: int,
    crops: int,
    learns: bool,
) -> float:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        pixels = torch.randn(max(crops, 2), 3, size, size, device=device)
        other = copy.deepcopy(model).train(learns)
        spent = []
        for kind in (torch.float32, precision):
            select_attention_impl(other, device, kind)
            _pass(other, pixels, kind, learns=learns)
            begin = _clock(device)
            _pass(other, pixels, kind, learns=learns)
            spent.append(max(_clock(device) - begin, 1e-6))
    return spent[1] / spent[0]


def _pass(model: QualityModel, pixels: torch.Tensor, kind: torch.dtype, *, learns: bool) -> None:
    with torch.set_grad_enabled(learns):
        with autocast(pixels.device, kind):
            output = model(pixels.to(kind))
        if learns:
            (output.score.sum() + output.embedding[:, 0].sum()).backward()


def _clock(device: torch.device) -> float:
    """Seconds: of the processor, which other programs do not lengthen; by the clock for a GPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
