"""What the backends agree on: inputs of a step, results of a pass."""

import dataclasses
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

SHORTEST = 1e-12
"""Rows that are shorter count as rows of zeros, which no division makes one of length 1."""


class LossOutput(NamedTuple):
    """The loss, what it says of the embeddings (detached), and what it ran in."""

    loss: Float[Tensor, ""]
    """Mean over the rows of all ranks, nats; the same value on every rank."""
    intra_share: Float[Tensor, ""]
    """Mean share of the denominator that crops of the same image hold, in [0, 1]."""
    positive_similarity: Float[Tensor, ""]
    """Mean cosine of a row and its hub."""
    intra_similarity: Float[Tensor, ""]
    """Mean cosine of two crops of one image; 0 if no image has two."""
    backend: str
    """What ran: "triton", "chunked" or "dense"."""
    precision: str
    """What it multiplied in: "bf16", "fp16", "tf32", "fp32" or "fp64"."""
    reason: str
    """Why these two."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOptions:
    """The scalars of `manifold_contrastive_loss`, in the order of the operation's schema."""

    intra_weight: float
    balanced: bool
    include_positive: bool
    normalize: bool
    gather: bool
    rank_sizes: tuple[int, ...]
    """Rows of every rank, then images of every rank; empty: ranks ask one another."""
    validate: bool
    has_keys: bool
    """Rows are compared with a teacher's keys; the backward pass does not hold them any more."""
    backend: str
    precision: str
    """Of the products: "bf16", "fp16", "tf32", "fp32" or "fp64"."""
    coldest: float = 0.0
    """Bound of a temperature that came as a tensor."""

    @property
    def weight(self) -> float | str:
        """w_A as the tables of pairs want it."""
        return "balanced" if self.balanced else self.intra_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossInputs:
    """One step's inputs as every backend gets them; checked, of one dtype and one device."""

    rows: Float[Tensor, "n d"]
    hubs: Float[Tensor, "b d"]
    group: Int[Tensor, " n"]
    temperature: Float[Tensor, "..."]
    overlap: Float[Tensor, "n c"] | None
    keys: Float[Tensor, "n d"] | None
    """None for student keys, and in the backward pass."""
    options: LossOptions

    @property
    def images(self) -> int:
        """Images of this rank: one hub each."""
        return self.hubs.shape[0]


class Forward(NamedTuple):
    """Results of a forward pass, and what the backward pass needs of them."""

    loss: Tensor
    """Mean over the rows of all ranks."""
    figures: Tensor
    """Intra share, cosine to the hub, cosine inside images; means over all ranks, [3]."""
    stats: Tensor
    """Figures per row, [k, n]; each backend has its own k."""
    columns: Tensor
    """Columns if they are not the local rows themselves, [m, w]; else empty."""
    hubs: Tensor
    """Normalised or padded hubs, [b, w]; empty if they are the hubs that came in."""
    hub_length: Tensor
    """Lengths that the hubs were divided by, [b]; empty if they were not."""
    tables: Tensor
    """Images of the rows as the kernels read them, int32; empty where no kernel does."""
    d_rows: Tensor
    """Teacher keys: gradient by the rows before the upstream factor, [n, d]; else empty."""


def dtype_of_products(rows: Float[Tensor, "n d"]) -> torch.dtype:
    """Inside a GPU's autocast its dtype, for an operation of our own is not on autocast's lists."""
    if rows.is_cuda and torch.is_autocast_enabled("cuda") and rows.dtype != torch.float64:
        return torch.get_autocast_dtype("cuda")
    return rows.dtype


def divide_by_length(table: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """`F.normalize`, but a row of zeros has a gradient of zeros and not of its upstream / 1e-12."""
    length = torch.linalg.vector_norm(table, dim=1, keepdim=True)
    return table / torch.where(length > SHORTEST, length, torch.inf)
