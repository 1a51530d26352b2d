"""Rows of all ranks in the forward pass, eight bytes a row in the backward; a rank may hold none.

With row i's log-sum-exp and upstream weight known, every rank forms the full gradient of its own
rows from columns it already holds, so no gradient of a column ever travels (docs/kernels.md).
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.types import LossInputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankLayout:
    """How the rows and images of one step are laid out over the ranks."""

    rows: tuple[int, ...]
    """Rows of each rank."""
    images: int
    """Images on all ranks."""
    rank: int
    """This process."""
    process_group: Any = None
    """Who takes part; None: every process."""

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


def find_rank_layout(inputs: LossInputs) -> RankLayout:
    """Rows and images of each rank: as the caller says, or by one small gather.

    The gather reads its answer back, so the host waits for a GPU; ranks that hold nothing join it.

    Raises:
        ValueError: If the caller's sizes are those of another number of ranks or, where values are
            checked, not what the ranks hold.
    """
    options = inputs.options
    own = (inputs.rows.shape[0], inputs.images)
    if not (options.gather and is_distributed()):
        return RankLayout(rows=(own[0],), images=own[1], rank=0)
    world, rank = dist.get_world_size(), dist.get_rank()
    many = len(options.rank_sizes) // 2
    told = tuple(zip(options.rank_sizes[:many], options.rank_sizes[many:], strict=True))
    sizes = told if told and not options.validate else _ask_ranks(own, inputs.rows.device)
    if told and (many != world or told[rank] != own or told != sizes):
        raise ValueError(
            f"rank_sizes says (rows, images) {list(told)}, but rank {rank} of {world} holds {own}"
            f"{f' and all hold {list(sizes)}' if sizes != told else ''}; leave rank_sizes out, and "
            "the ranks ask one another"
        )
    return RankLayout(
        rows=tuple(rows for rows, _ in sizes), images=sum(count for _, count in sizes), rank=rank
    )


def _ask_ranks(
    own: tuple[int, ...], device: torch.device, process_group: Any = None
) -> tuple[tuple[int, ...], ...]:
    table = torch.tensor(own, device=device)
    every = [torch.empty_like(table) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(every, table, group=process_group)
    return tuple(tuple(sizes) for sizes in torch.stack(every).tolist())


def ask_layouts(
    counts: tuple[int, ...], device: torch.device, process_group: Any
) -> tuple[RankLayout, ...]:
    """One layout for each of several counts of rows: by one small gather, which waits for a GPU.

    Args:
        counts: How many rows of each kind this process holds.
        device: Where the gather takes place.
        process_group: Who takes part; None: this process alone.

    Raises:
        ValueError: If this process is none of the group.
        TypeError: If it is no group.
    """
    if process_group is None:
        return tuple(RankLayout(rows=(count,), images=0, rank=0) for count in counts)
    _check_member(process_group)
    sizes = _ask_ranks(counts, device, process_group)
    rank = dist.get_rank(process_group)
    return tuple(
        RankLayout(rows=rows, images=0, rank=rank, process_group=process_group)
        for rows in zip(*sizes, strict=True)
    )


def _check_member(process_group: Any) -> None:
    # What torch.distributed.new_group gives to those whom it leaves out.
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            "process_group: asked for a group that this process is a member of, got one that was "
            "made without it; call on the members only, or pass None for this process alone"
        )
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group: asked for a group of torch.distributed, got "
            f"{type(process_group).__name__}; pass torch.distributed.group.WORLD, what new_group "
            "returned, or the get_group() of a mesh"
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
    dist.all_gather(every, padded, group=layout.process_group)
    return torch.cat([part[:count] for part, count in zip(every, layout.rows, strict=True)])


def gather_of_all_ranks(local: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, int]:
    """Rows of all ranks in rank order, without gradient, and where this rank's own begin.

    Args:
        local: This rank's rows, [n, ...]; n may be 0.
        counts: Rows of each rank, the same on all; (n,) in one process.
    """
    rank = dist.get_rank() if len(counts) > 1 else 0
    layout = RankLayout(rows=counts, images=0, rank=rank)
    return gather_rows(local, layout), layout.offset


def sum_over_ranks(values: Tensor, layout: RankLayout) -> Tensor:
    """Elementwise sum over the ranks; the argument is left as it is."""
    if layout.world_size == 1:
        return values
    total = values.clone()
    dist.all_reduce(total, group=layout.process_group)
    return total


def mean_over_ranks(per_row: Tensor, pairs: Tensor, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """Loss and figures of all ranks.

    Args:
        per_row: Loss, intra share, cosine to the hub, sum of cosines inside the image; [4, n].
        pairs: Number of ordered pairs of crops of one image, [].
        layout: Rows of each rank.
    """
    sums = torch.cat([per_row.sum(1), pairs.to(per_row).reshape(1)])
    return means_of_sums(sum_over_ranks(sums, layout), layout)


def means_of_sums(whole: Tensor, layout: RankLayout) -> tuple[Tensor, Tensor]:
    """Loss and figures of all ranks, of the five sums over their rows."""
    rows = max(layout.total, 1)
    figures = torch.cat([whole[1:3] / rows, whole[3:4] / whole[4:].clamp(min=1)])
    return whole[0] / rows, figures


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
