"""Rows of all ranks in the forward pass, eight bytes a row in the backward; a rank may hold none.

With row i's log-sum-exp and upstream weight known, every rank forms the full gradient of its own
rows from columns it already holds, so no gradient of a column ever travels (docs/kernels.md).
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankLayout:
    """How the rows and images of one step are laid out over the ranks."""

    rows: tuple[int, ...]
    """Rows of each rank."""
    images: int
    """Images on all ranks."""
    rank: int
    """This process."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def offset(self) -> int:
        """Global index of this rank's first row."""
        return sum(self.rows[: self.rank])

    @property
    def total(self) -> int:
        """Rows on all ranks."""
        return sum(self.rows)


def is_distributed() -> bool:
    """True if there is more than one rank to gather from."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def find_rank_layout(rows: int, images: int, *, device: torch.device, gather: bool) -> RankLayout:
    """Rows and images of each rank; one small gather, joined by ranks that hold nothing."""
    if not (gather and is_distributed()):
        return RankLayout(rows=(rows,), images=images, rank=0)
    own = torch.tensor([rows, images], device=device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    table = torch.stack(every).tolist()
    return RankLayout(
        rows=tuple(count for count, _ in table),
        images=sum(count for _, count in table),
        rank=dist.get_rank(),
    )


def gather_rows(local: Tensor, layout: RankLayout) -> Tensor:
    """Rows of all ranks in rank order; without gradient.

    Args:
        local: This rank's rows, [n, ...]; n may differ between ranks and be 0.
        layout: Who holds how many.
    """
    if layout.world_size == 1 or layout.total == 0:
        return local
    padded = local.new_zeros(max(layout.rows), *local.shape[1:])
    padded[: local.shape[0]] = local
    every = [torch.empty_like(padded) for _ in layout.rows]
    dist.all_gather(every, padded)
    return torch.cat([part[:count] for part, count in zip(every, layout.rows, strict=True)])


def sum_over_ranks(values: Tensor, layout: RankLayout) -> Tensor:
    """Elementwise sum over the ranks; the argument is left as it is."""
    if layout.world_size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total)
    return total


class GatherWithGradient(torch.autograd.Function):
    """Rows of all ranks whose gradient is summed over the ranks.

    Only the reference needs it: it moves a gradient for every column, which is what the other
    backends avoid.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, layout: RankLayout) -> Tensor:  # noqa: D102
        ctx.layout = layout
        return gather_rows(local, layout).clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: D102
        layout: RankLayout = ctx.layout
        total = sum_over_ranks(gradient.contiguous(), layout)
        return total[layout.offset : layout.offset + layout.rows[layout.rank]], None
