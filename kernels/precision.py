"""What the loss computes in, and by which backend: one pure function that every caller asks.

The rule of "auto": bfloat16 products with float32 sums on a GPU whose fused kernels have them,
float32 everywhere else. What cannot be had as asked is refused with a sentence; what "auto" chose
says why.
"""

import dataclasses
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from kernels.tuning import MAX_SINGLE_WIDTH, MAX_WIDTH

BACKENDS = ("auto", "triton", "chunked", "dense")
PRECISIONS = ("auto", "rows", "bf16", "fp16", "tf32", "fp32")
OLDEST_FUSED = 80
"""Compute capability times ten of the first chip the fused kernels run on."""

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}
"""Element type of the tables for each precision of the products."""

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}
_HALF = ("bf16", "fp16")
_FLOAT32_WAY_OUT = "use precision = 'auto' or 'fp32'"

_logger = logging.getLogger(__name__)
_announced: set["LossPlan"] = set()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """What the choice must know of a device."""

    kind: str
    """torch's device type: "cuda" (ROCm too), "cpu" or another."""
    capability: int = 0
    """Compute capability times ten, e.g. 90; 0 where there is none."""
    is_hip: bool = False
    """An AMD GPU behind torch's name "cuda"."""
    has_triton: bool = True
    """The package triton is installed."""
    is_interpreted: bool = False
    """Triton's kernels run interpreted on tensors of the CPU (TRITON_INTERPRET=1)."""

    @property
    def name(self) -> str:
        """Short name for messages: "sm_90", "ROCm", "cpu"."""
        if self.kind != "cuda":
            return self.kind
        return "ROCm" if self.is_hip else f"sm_{self.capability}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossPlan:
    """What the loss runs in, and why; `str(plan)` is the line that users see."""

    backend: str
    """"triton", "chunked" or "dense"."""
    precision: str
    """Of the products: "bf16", "fp16", "tf32", "fp32" or, for float64 rows, "fp64"; sums are
    float32 or float64."""
    reason: str
    """One clause without a full stop."""
    width: int
    """D, the width of a row."""
    chip: Chip

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the tables that are multiplied."""
        return DTYPES[self.precision]

    @property
    def is_fallback(self) -> bool:
        """A GPU does not get its fused kernels."""
        return self.chip.kind == "cuda" and self.backend != "triton"

    def __str__(self) -> str:
        text = f"loss {self.backend} {self.precision} D={self.width} ({self.chip.name})"
        return f"{text}: {self.reason}"


def plan_loss(
    chip: Chip,
    *,
    width: int,
    precision: str = "auto",
    backend: str = "auto",
    rows_dtype: torch.dtype = torch.float32,
    matmul_precision: str = "highest",
) -> LossPlan:
    """Backend and precision of the loss; reads nothing but its arguments.

    Args:
        chip: The device of the rows.
        width: Width D of a row.
        precision: "auto", "bf16", "fp16", "tf32", "fp32"; or "rows": what the rows came in, float32
            rows on a GPU being TF32 where `matmul_precision` allows it.
        backend: "auto" (triton where it can run, chunked elsewhere), "triton", "chunked", "dense".
        rows_dtype: Type the rows came in. float64 rows stay float64 under "auto" and "rows".
        matmul_precision: As `torch.get_float32_matmul_precision()` says; read for "rows" only.

    Raises:
        ValueError: If what was asked for cannot be had here: one sentence with the way out.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: asked for one of {', '.join(BACKENDS)}, got {backend!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision: asked for one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "auto":
        chosen = _automatic(chip, width, backend, rows_dtype)
    elif precision == "rows":
        chosen = _of_rows(chip, rows_dtype, matmul_precision)
    else:
        chosen = precision
        _check_asked(chip, width, backend, precision)
    taken, reason = _choose_backend(chip, width, backend, chosen)
    if taken == "chunked" and chosen in _HALF:
        # Only rows that came so get here: the chunked backend widens them as it goes.
        chosen = "fp32"
    return LossPlan(backend=taken, precision=chosen, reason=reason, width=width, chip=chip)


def plan_for_rows(
    device: torch.device, *, width: int, dtype: torch.dtype, precision: str, backend: str
) -> LossPlan:
    """`plan_loss` for rows of a device, as torch is set up in this process."""
    chip, matmul_precision = _read_process(device)
    return plan_loss(
        chip,
        width=width,
        precision=precision,
        backend=backend,
        rows_dtype=dtype,
        matmul_precision=matmul_precision,
    )


def read_chip(device: torch.device) -> Chip:
    """What `plan_loss` wants to know of a device.

    A CUDA device where torch finds none belongs to fake tensors, which exist without a GPU
    (FakeTensorMode): they are planned for sm_90.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda":
        return Chip(kind=device.type, has_triton=_has_triton(), is_interpreted=interpreted)
    capability = _read_capability(device.index) if torch.cuda.is_available() else 90
    return Chip(
        kind="cuda",
        capability=capability,
        is_hip=torch.version.hip is not None,
        has_triton=_has_triton(),
    )


def announce(plan: LossPlan, *, already_said: bool = False) -> None:
    """Say once per process, on rank 0, what the loss runs in; a GPU's fall-back is a warning.

    Args:
        plan: What was chosen.
        already_said: The caller has told it in a line of its own.
    """
    if plan in _announced:
        return
    _announced.add(plan)
    if already_said:
        return
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and torch.distributed.get_rank():
        return
    _logger.log(logging.WARNING if plan.is_fallback else logging.INFO, "%s", plan)


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Let torch's own float32 products be TF32 or exact, as `precision` says, and put it back.

    The process-wide setting is the caller's business; what the loss computes in is its own.
    """
    wanted = {"tf32": "high", "fp32": "highest"}.get(precision)
    before = torch.get_float32_matmul_precision()
    if wanted is None or wanted == before:
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def surroundings(device: torch.device, precision: str) -> Iterator[None]:
    """The rows' GPU is the current one, and products are what `precision` says.

    Triton launches on the current device, whatever device its arguments are on; autocast would
    round the products inside.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(float32_products(precision))
        yield


def _read_process(device: torch.device) -> tuple[Chip, str]:
    return read_chip(device), torch.get_float32_matmul_precision()


# What torch.compiler.assume_constant_result does, which loads the compiler for it: a graph is
# traced for the chip and the settings that there are, and cannot look them up itself.
_read_process._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _read_capability(index: int | None) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _automatic(chip: Chip, width: int, backend: str, dtype: torch.dtype) -> str:
    if dtype == torch.float64:
        return "fp64"
    if chip.kind != "cuda" or backend in ("chunked", "dense"):
        return "fp32"
    # Asked for by name, the kernels must have it or say why not: no other precision would help.
    is_fused = backend == "triton" or not _why_not_fused(chip, width, "bf16")
    return "bf16" if is_fused else "fp32"


def _of_rows(chip: Chip, dtype: torch.dtype, matmul_precision: str) -> str:
    name = _NAMES[dtype]
    has_tf32 = chip.kind == "cuda" and not chip.is_hip and chip.capability >= OLDEST_FUSED
    return "tf32" if name == "fp32" and has_tf32 and matmul_precision != "highest" else name


def _check_asked(chip: Chip, width: int, backend: str, precision: str) -> None:
    """Refuse a precision by name that would not be what the products are computed in."""
    asked = f"precision: asked for {precision!r}"
    if precision == "fp32":
        return
    if chip.kind != "cuda":
        if backend == "triton" and chip.is_interpreted:
            return
        raise ValueError(
            f"{asked}, but on {chip.name} the loss computes in float32; {_FLOAT32_WAY_OUT}"
        )
    if chip.is_hip or chip.capability < OLDEST_FUSED:
        raise ValueError(
            f"{asked}, but this GPU is {chip.name} and only those from sm_{OLDEST_FUSED} on have "
            f"it here; {_FLOAT32_WAY_OUT}"
        )
    if precision == "tf32" or backend == "dense":
        return
    obstacle = "backend 'chunked' computes in float32" if backend == "chunked" else ""
    obstacle = obstacle or _why_not_fused(chip, width, precision)
    if obstacle:
        raise ValueError(
            f"{asked}, but {obstacle}, and the chunked backend would widen it to float32; "
            f"{_FLOAT32_WAY_OUT}"
        )


def _choose_backend(chip: Chip, width: int, backend: str, precision: str) -> tuple[str, str]:
    """The backend and why."""
    if backend in ("chunked", "dense"):
        return backend, f"backend {backend!r} was asked for"
    obstacle = _why_not_fused(chip, width, precision)
    if backend == "triton":
        if obstacle:
            raise ValueError(
                f"backend: asked for 'triton', but {obstacle}; use backend = 'auto' or 'chunked'"
            )
        return "triton", "backend 'triton' was asked for"
    if chip.kind != "cuda":
        return "chunked", f"rows are on {chip.kind} and the fused kernels need CUDA"
    if precision == "fp32":
        # Whoever gets float32 hears first what keeps the chip from more.
        obstacle = _why_not_fused(chip, width, "bf16") or (
            "full float32 has no fast fused kernel; precision 'bf16' has, and so has 'tf32' to "
            f"D = {MAX_SINGLE_WIDTH}"
        )
    return ("chunked", obstacle) if obstacle else ("triton", "its fused kernels take this width")


def _why_not_fused(chip: Chip, width: int, precision: str) -> str:
    """What keeps the Triton kernels from running, as a clause; empty if nothing does."""
    if precision == "fp64":
        return "the fused kernels have no float64"
    if chip.kind != "cuda" and not chip.is_interpreted:
        return f"rows are on {chip.kind} and the fused kernels need CUDA"
    if chip.is_hip:
        return "this is ROCm and the fused kernels are for CUDA"
    if chip.kind == "cuda" and chip.capability < OLDEST_FUSED:
        return f"this GPU is {chip.name} and the fused kernels begin at sm_{OLDEST_FUSED}"
    if not chip.has_triton:
        return "the package triton is not installed"
    # The interpreter knows no registers, so the narrower limit of float32 does not bind there.
    is_narrow = precision in ("tf32", "fp32") and chip.kind == "cuda"
    most = MAX_SINGLE_WIDTH if is_narrow else MAX_WIDTH
    if width > most:
        return f"{precision} rows are {width} wide and the fused kernels stop at {most}"
    return ""
