"""Which rows show the same image: intervals of rows, their neighbours and the neighbours' weights.

Rows are image-major, so an image is an interval of rows. Everything about pairs inside an image
fits in an (n, c) table, c being the most crops that any image has. Nothing here reads a value back
to the host except what says so: on a GPU the loss would wait for the encoder.
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

    starts: Int[Tensor, " b+1"]
    """First row of each image, and the number of rows."""
    image: Int[Tensor, " n"]
    """Position of each row's image, which is also the row of its hub."""
    first: Int[Tensor, " n"]
    """First row of the image that a row belongs to."""
    end: Int[Tensor, " n"]
    """First row after that image."""

    @property
    def size(self) -> Int[Tensor, " n"]:
        """Crops of the image that a row belongs to."""
        return self.end - self.first

    @property
    def counts(self) -> Int[Tensor, " b"]:
        """Crops of each image."""
        return self.starts.diff()

    def most(self) -> int:
        """The most crops of any image; reads a value."""
        return int(self.counts.max()) if self.counts.numel() else 0


def find_groups(group: Int[Tensor, " n"], *, hubs: int, validate: bool = True) -> Groups:
    """Runs of equal values as intervals.

    Args:
        group: Image of each row, rows of an image together.
        hubs: Number of images that is expected.
        validate: Check the values; reads two of them back.

    Raises:
        ValueError: If an image's rows are scattered, or hubs and images are not equally many.
    """
    if validate:
        check_runs(group, hubs=hubs)
    image = _starts_run(group).cumsum(0) - 1
    places = torch.arange(hubs + 1, device=group.device)
    starts = torch.searchsorted(image, places)
    image = image.clamp(max=hubs - 1)
    return Groups(starts=starts, image=image, first=starts[image], end=starts[image + 1])


def check_runs(group: Int[Tensor, " n"], *, hubs: int) -> None:
    """Refuse scattered images, and hubs that are not one an image; reads two values back.

    Raises:
        ValueError: As `find_groups` says.
    """
    in_order = group.sort().values
    images = (in_order[1:] != in_order[:-1]).sum() + min(group.shape[0], 1)
    runs, distinct = torch.stack([_starts_run(group).sum(), images]).tolist()
    if runs != distinct:
        raise ValueError(
            f"group: every image's rows must stand together, got {distinct} images in {runs} "
            "runs of rows; sort the rows by image first"
        )
    if runs != hubs:
        raise ValueError(
            f"hubs: asked for one row per image in group, got {hubs} hubs for {runs} images; "
            "pass the salient crop of each image once, in row order"
        )


def _starts_run(group: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    is_new = torch.ones(group.shape[0], dtype=torch.int64, device=group.device)
    is_new[1:] = group[1:] != group[:-1]
    return is_new


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
    """The table of pairs inside images; reads the most crops of an image.

    Args:
        groups: Intervals of the local rows.
        intra_weight: w_A, or "balanced".
        images: Images on all ranks, for "balanced".
        overlap: IoU of each row's crop with every crop of its image, or None for none.
        dtype: Of the weights.
    """
    most = groups.most()
    place = torch.arange(most, device=groups.image.device)
    row = torch.arange(groups.image.shape[0], device=groups.image.device)[:, None]
    column = groups.first[:, None] + place
    inside = place < groups.size[:, None]
    other = inside & (column != row)
    column = torch.where(inside, column, row)
    weight = row_weights(groups, intra_weight, images=images, dtype=dtype)[:, None]
    if overlap is not None:
        weight = weight * (1 - overlap[:, :most].to(dtype)).clamp(min=0)
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
    if isinstance(intra_weight, str):
        size = groups.size.to(dtype)
        return BALANCE * (images - 1) * size / (size - 1).clamp(min=1)
    return torch.full_like(groups.image, intra_weight, dtype=dtype)
