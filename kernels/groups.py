"""Which rows show the same image: intervals of rows, their neighbours and the neighbours' weights.

Rows are image-major, so an image is an interval [first, first + size) of rows. Everything about
pairs inside an image fits in an (n, c) table, c being the most crops that any image has.
"""

import dataclasses

import torch
from jaxtyping import Float, Int
from torch import Tensor

BALANCE = 0.06
"""kappa of `intra_weight="balanced"`: keeps the paper's balance at 16 images for every batch."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """The images of the local rows, as intervals."""

    counts: Int[Tensor, " b"]
    """Crops of each image."""
    image: Int[Tensor, " n"]
    """Position of each row's image, which is also the row of its hub."""
    first: Int[Tensor, " n"]
    """First row of the image that a row belongs to."""
    size: Int[Tensor, " n"]
    """Crops of the image that a row belongs to."""
    most: int
    """The most crops of any image; 0 without rows."""


def find_groups(group: Int[Tensor, " n"], *, hubs: int) -> Groups:
    """Runs of equal values as intervals.

    Raises:
        ValueError: If an image's rows are scattered, or hubs and images are not equally many.
    """
    values, image, counts = torch.unique_consecutive(group, return_inverse=True, return_counts=True)
    if values.shape[0] != values.unique().shape[0]:
        raise ValueError(
            "group: every image's rows must stand together, got an image whose rows are scattered "
            f"({values.shape[0]} runs, {values.unique().shape[0]} images); "
            "sort the rows by image first"
        )
    if values.shape[0] != hubs:
        raise ValueError(
            f"hubs: asked for one row per image in group, got {hubs} hubs for "
            f"{values.shape[0]} images; pass the salient crop of each image once, in row order"
        )
    ends = counts.cumsum(0)
    return Groups(
        counts=counts,
        image=image,
        first=(ends - counts)[image],
        size=counts[image],
        most=int(counts.max()) if counts.numel() else 0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Neighbours:
    """The crops of each row's own image as an (n, c) table."""

    column: Int[Tensor, "n c"]
    """Local row of each neighbour; padding repeats the row itself."""
    log_weight: Float[Tensor, "n c"]
    """Log of w_A (1 - IoU); -inf for the row itself, for padding and for excluded pairs."""
    log_weight_back: Float[Tensor, "n c"]
    """The same table seen from the neighbour: the weight it gives to this row."""


def find_neighbours(
    groups: Groups,
    *,
    intra_weight: float | str,
    images: int,
    overlap: Float[Tensor, "n c"] | None,
    dtype: torch.dtype,
) -> Neighbours:
    """The table of pairs inside images.

    Args:
        groups: Intervals of the local rows.
        intra_weight: w_A, or "balanced".
        images: Images on all ranks, for "balanced".
        overlap: IoU of each row's crop with every crop of its image, or None for none.
        dtype: Of the weights.
    """
    n = groups.image.shape[0]
    place = torch.arange(groups.most, device=groups.image.device)
    row = torch.arange(n, device=groups.image.device)[:, None]
    column = groups.first[:, None] + place
    inside = place < groups.size[:, None]
    other = inside & (column != row)
    column = torch.where(inside, column, row)
    weight = row_weights(groups, intra_weight, images=images, dtype=dtype)[:, None]
    if overlap is not None:
        weight = weight * (1 - overlap[:, : groups.most].to(dtype)).clamp(min=0)
    log_weight = torch.where(other, weight, 0.0).log()
    back = log_weight[column, (row - groups.first[:, None]).clamp(min=0)]
    return Neighbours(
        column=column,
        log_weight=log_weight,
        log_weight_back=torch.where(other, back, -torch.inf),
    )


def row_weights(
    groups: Groups, intra_weight: float | str, *, images: int, dtype: torch.dtype
) -> Float[Tensor, " n"]:
    """w_A of each row; "balanced" is kappa (T - 1) H / (H - 1): T images, H crops of this one."""
    size = groups.size.to(dtype)
    if isinstance(intra_weight, str):
        return BALANCE * (images - 1) * size / (size - 1).clamp(min=1)
    return torch.full_like(size, intra_weight)
