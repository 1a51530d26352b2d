"""The public loss: checks, choice of backend, and nothing of the arithmetic."""

import importlib.util
import os

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int
from torch import Tensor

from kernels import reference_backend, torch_op, validation
from kernels.tuning import MAX_SINGLE_WIDTH, MAX_WIDTH
from kernels.types import LossInputs, LossOptions, LossOutput


def manifold_contrastive_loss(
    rows: Float[Tensor, "n d"],
    hubs: Float[Tensor, "b d"],
    group: Int[Tensor, " n"],
    *,
    temperature: float | Float[Tensor, "..."],
    intra_weight: float | str = 1.0,
    overlap: Float[Tensor, "n c"] | None = None,
    include_positive: bool = False,
    keys: Float[Tensor, "n d"] | None = None,
    gather: bool = True,
    backend: str = "auto",
    normalize: bool = False,
    validate: bool = True,
) -> LossOutput:
    """Pull each random crop to its image's salient crop, push it from all other crops.

    Args:
        rows: Unit-length embeddings of random crops, image-major; gradients flow. May be empty.
        hubs: Unit-length embeddings of the salient crops, one per image; gradients flow.
        group: Image of each row: equal = same image, rows of an image stand together, ids are
            unique over all ranks. The j-th run of equal values belongs to hub j.
        temperature: Cosines are divided by it; > 0. A tensor learns.
        intra_weight: Weight of the other crops of the same image in the denominator, or
            "balanced": .06 (T - 1) H / (H - 1) with T images on all ranks and H crops of this one.
        overlap: IoU of row i with the c-th crop of its own image, padded with 0: crops that share
            pixels count less, by 1 - IoU.
        include_positive: The positive stands in the denominator too (InfoNCE).
        keys: The teacher's embeddings of the same crops, to compare the rows with in place of the
            rows themselves; no gradient flows. Hubs are then expected from the teacher too.
        gather: Compare with the rows of all ranks, if torch.distributed is initialised.
        backend: "auto" (triton on CUDA, chunked elsewhere), "triton", "chunked" or "dense".
        normalize: Divide rows, hubs and keys by their lengths first.
        validate: Refuse rows that are not of unit length; reads values, so it waits for a GPU.

    Returns:
        Loss and figures, float32 (float64 for float64 rows). The gradient is scaled so that the
        mean over ranks, which DDP takes, is the gradient of the loss. A row with an empty
        denominator has the loss of its positive alone; there is never a NaN that was not put in.

    Raises:
        ValueError: Unequal sizes, scattered images, lengths other than 1, values out of range.
        TypeError: Wrong element types or devices.
        RuntimeError: On a second derivative.

    Source: arXiv 2406.19247, the information loss of its equation set; options are ours
    (docs/kernels.md).
    """
    validation.check_arguments(
        rows,
        hubs,
        group,
        temperature=temperature,
        intra_weight=intra_weight,
        overlap=overlap,
        keys=keys,
        backend=backend,
    )
    if backend in ("auto", "triton"):
        rows, hubs, keys = _in_autocast_dtype(rows, hubs, keys)
    backend = choose_backend(rows, backend)
    if normalize and backend != "triton":
        rows, hubs = F.normalize(rows, dim=1), F.normalize(hubs, dim=1)
        keys = None if keys is None else F.normalize(keys, dim=1)
    if validate and not torch.compiler.is_compiling():
        validation.check_values(rows, hubs, keys, normalize=normalize)
    if isinstance(temperature, Tensor):
        tau = temperature
    else:
        tau = torch.tensor(temperature, dtype=torch.float64)
    inputs = LossInputs(
        rows=rows,
        hubs=hubs,
        group=group,
        temperature=tau,
        overlap=overlap,
        keys=None if keys is None else keys.detach(),
        options=LossOptions(
            intra_weight=0.0 if isinstance(intra_weight, str) else float(intra_weight),
            balanced=isinstance(intra_weight, str),
            include_positive=include_positive,
            normalize=normalize and backend == "triton",
            gather=gather,
            validate=validate,
            has_keys=keys is not None,
            backend=backend,
        ),
    )
    if backend == "dense":
        return reference_backend.forward(inputs)
    result = torch_op.contrastive_forward(inputs)
    share, positive, intra = result.figures.detach().unbind()
    return LossOutput(result.loss, share, positive, intra)


def choose_backend(rows: Float[Tensor, "n d"], backend: str) -> str:
    """The backend that "auto" stands for, and a refusal of one that cannot work.

    Args:
        rows: Their device, width and dtype decide.
        backend: As given by the caller.

    Raises:
        ValueError: If the Triton kernels are asked for where they cannot run.
    """
    obstacle = _why_not_triton(rows) if backend in ("auto", "triton") else ""
    if backend == "auto":
        # Full float32 has no good tile (docs/kernels.md); TF32 is the caller's to allow.
        exact = rows.dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest"
        return "chunked" if obstacle or exact or not rows.is_cuda else "triton"
    if obstacle:
        raise ValueError(
            f"backend: asked for 'triton', but {obstacle}; use backend='auto' or 'chunked'"
        )
    return backend


def _why_not_triton(rows: Float[Tensor, "n d"]) -> str:
    if rows.dtype == torch.float64:
        return "its kernels have no float64"
    most = MAX_SINGLE_WIDTH if rows.dtype == torch.float32 else MAX_WIDTH
    if rows.shape[1] > most:
        return f"{rows.dtype} rows are {rows.shape[1]} wide and its kernels stop at {most}"
    if rows.is_cuda:
        return "" if importlib.util.find_spec("triton") else "the package triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"rows are on {rows.device} and its kernels need CUDA"
    return ""


def _in_autocast_dtype(
    rows: Float[Tensor, "n d"], hubs: Float[Tensor, "b d"], keys: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inside a GPU's autocast the tables are rounded to its dtype; a CPU would gain nothing.

    An operation of our own is not on autocast's lists, and `F.normalize` under autocast gives
    float32, so without this the half-precision kernels would never be taken.
    """
    if not rows.is_cuda or not torch.is_autocast_enabled("cuda"):
        return rows, hubs, keys
    dtype = torch.get_autocast_dtype("cuda")
    return rows.to(dtype), hubs.to(dtype), None if keys is None else keys.to(dtype)
