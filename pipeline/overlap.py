"""How much the crops of an image overlap, on the device the boxes lie on."""

from jaxtyping import Float32, Int
from torch import Tensor


def box_iou(boxes: Int[Tensor, "b v 4"]) -> Float32[Tensor, "b v v"]:
    """Intersection over union of every two crops of one image, 1 on the diagonal."""
    corner, extent = boxes[..., :2].float(), boxes[..., 2:].float()
    end = corner + extent
    low = corner.unsqueeze(2).maximum(corner.unsqueeze(1))
    high = end.unsqueeze(2).minimum(end.unsqueeze(1))
    shared = (high - low).clamp_min(0).prod(-1)
    area = extent.prod(-1)
    return shared / (area.unsqueeze(2) + area.unsqueeze(1) - shared)
