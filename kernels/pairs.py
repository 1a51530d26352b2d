"""Which columns belong to a row's own group: tables sorted by group, groups as intervals of them.

Sorting is stable and by ids of all ranks, so a group may be scattered over rows and over ranks.
Nothing here reads a value back, except `is_sorted` on a CPU.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels.distributed import RankLayout, gather_rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The rows of one table, q or k, on this rank and on all ranks, sorted by their group."""

    layout: RankLayout
    order: Int[Tensor, " n"] | None
    """Sorts the local rows; None if they need no sorting."""
    all_order: Int[Tensor, " m"] | None
    """Sorts the rows of all ranks; None likewise."""
    group: Int[Tensor, " n"] | None
    """Groups of the local rows, sorted; None without groups."""
    all_group: Int[Tensor, " m"] | None
    """Groups of the rows of all ranks, sorted."""

    def local(self, values: Tensor) -> Tensor:
        """Values of the local rows in sorted order."""
        return values if self.order is None else values[self.order]

    def everywhere(self, values: Tensor) -> Tensor:
        """Values of the rows of all ranks in sorted order; travels between ranks."""
        whole = gather_rows(values, self.layout)
        return whole if self.all_order is None else whole[self.all_order]

    def restore(self, values: Tensor) -> Tensor:
        """Sorted values of the local rows in the caller's order."""
        if self.order is None:
            return values
        return torch.zeros_like(values).index_copy(0, self.order, values)

    def positions(self, device: torch.device) -> Int[Tensor, " n"]:
        """Where each local row, in sorted order, stands among the sorted rows of all ranks."""
        offset, count = self.layout.offset, self.layout.rows[self.layout.rank]
        place = torch.arange(self.layout.total, device=device)
        if self.all_order is not None:
            place = torch.empty_like(place).index_copy_(0, self.all_order, place)
        return self.local(place[offset : offset + count])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pairs:
    """The own group of each row as an interval of columns, and the weights inside it."""

    first: Int[Tensor, " n"]
    """First column of the row's group."""
    end: Int[Tensor, " n"]
    """First column after it; equal to `first` where no column is of the group."""
    itself: Int[Tensor, " n"] | None
    """Column that is the row itself, which counts in no sum; None if rows and columns differ."""
    place: Int[Tensor, " n"]
    """Which member of its group, as a column, the row is."""
    weight: float
    """Of columns of the own group; not read where there are tables."""
    forth: Float[Tensor, "n c"] | None
    """Weight that a row gives to the c-th column of its group."""
    back: Float[Tensor, "m c"] | None
    """Weight that a column, as a row, gives to the c-th member of the same group."""

    def most(self) -> int:
        """The most columns of any row's own group; reads a value."""
        return int((self.end - self.first).max()) if self.first.numel() else 0


def make_side(group: Int[Tensor, " n"] | None, layout: RankLayout) -> Side:
    """Sort the rows of one table by group, here and over the ranks."""
    if group is None:
        return Side(layout=layout, order=None, all_order=None, group=None, all_group=None)
    everyone = gather_rows(group, layout)
    order, all_order = _sorting(group), _sorting(everyone)
    return Side(
        layout=layout,
        order=order,
        all_order=all_order,
        group=group if order is None else group[order],
        all_group=everyone if all_order is None else everyone[all_order],
    )


def find_pairs(
    rows: Side,
    columns: Side,
    *,
    weight: float,
    device: torch.device,
    forth: Tensor | None = None,
    back: Tensor | None = None,
) -> Pairs:
    """Intervals of the local rows of one side in the rows of all ranks of the other.

    Args:
        rows: Whose rows are walked.
        columns: Whose rows they meet; the same object if rows meet one another.
        weight: Of pairs inside a group.
        device: Where to put what is found.
        forth: Weights of the local rows, in the caller's order.
        back: Weights of the rows of all ranks, sorted.
    """
    count = rows.layout.rows[rows.layout.rank]
    if rows.group is None or columns.all_group is None or rows.all_group is None:
        none = torch.zeros(count, dtype=torch.int64, device=device)
        return Pairs(
            first=none, end=none, itself=None, place=none, weight=1.0, forth=None, back=None
        )
    positions = rows.positions(device)
    return Pairs(
        first=torch.searchsorted(columns.all_group, rows.group),
        end=torch.searchsorted(columns.all_group, rows.group, right=True),
        itself=positions if rows is columns else None,
        place=positions - torch.searchsorted(rows.all_group, rows.group),
        weight=weight,
        forth=None if forth is None else rows.local(forth),
        back=back,
    )


def _sorting(group: Int[Tensor, " n"]) -> Int[Tensor, " n"] | None:
    """What sorts the ids; None if they are sorted, which only a CPU says without waiting."""
    if group.device.type == "cpu" and bool((group[1:] >= group[:-1]).all()):
        return None
    return group.argsort(stable=True)
