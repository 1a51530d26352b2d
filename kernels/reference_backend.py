"""The loss by its definition: masks, one big matrix, autograd, a gradient for every column."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kernels import validation
from kernels.distributed import GatherWithGradient, RankLayout, find_rank_layout, sum_over_ranks
from kernels.groups import find_groups, find_neighbours
from kernels.reference import ReferenceRows, reference_rows, same_image_masks
from kernels.types import LossInputs


def forward(inputs: LossInputs) -> tuple[Tensor, Tensor]:
    """Loss, differentiable any number of times, and figures [3] as in `Forward`; memory O(n m)."""
    rows, hubs, options = inputs.rows, inputs.hubs, inputs.options
    groups = find_groups(inputs.group, hubs=inputs.images, validate=options.validate)
    validation.check_overlap_width(inputs.overlap, groups.most())
    tau = float(inputs.temperature.detach())
    validation.check_temperature_value(tau, coldest=inputs.options.coldest)
    layout = find_rank_layout(inputs)
    columns = rows if inputs.keys is None else inputs.keys
    if layout.world_size > 1:
        columns = GatherWithGradient.apply(columns, layout)
    same, itself = same_image_masks(inputs.group, columns=layout.total, offset=layout.offset)
    near = find_neighbours(
        groups,
        intra_weight=options.weight,
        images=layout.images,
        overlap=inputs.overlap,
        dtype=rows.dtype,
    )
    weight = torch.zeros(same.shape, dtype=rows.dtype, device=rows.device)
    weight.scatter_(1, near.column + layout.offset, near.log_weight.exp())
    result = reference_rows(
        rows,
        columns,
        hubs[groups.image],
        same_image=same,
        itself=itself,
        intra_weight=weight,
        temperature=inputs.temperature.reshape(()).to(rows),
        include_positive=options.include_positive,
    )
    return _mean_over_ranks(result, (groups.size - 1).sum(), layout)


def _mean_over_ranks(
    result: ReferenceRows, pairs: Int[Tensor, ""], layout: RankLayout
) -> tuple[Tensor, Tensor]:
    rows = max(layout.total, 1)
    own: Float[Tensor, ""] = result.loss.sum()
    sums = [own, result.intra_share.sum(), result.positive.sum(), result.intra_sum.sum(), pairs]
    whole = sum_over_ranks(torch.stack(sums).detach(), layout)
    # The value is the mean of all ranks, the gradient this rank's part times the number of ranks.
    part = own * (layout.world_size / rows)
    mean = part + (whole[0] / rows - part.detach())
    return mean, torch.stack([whole[1] / rows, whole[2] / rows, whole[3] / whole[4].clamp(min=1)])
