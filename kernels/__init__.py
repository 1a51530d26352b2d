"""The fused contrastive loss: rows, groups and weights; nothing of images."""

from kernels.contrastive import manifold_contrastive_loss
from kernels.precision import Chip, LossPlan, announce, plan_loss, read_chip
from kernels.types import LossOutput

__all__ = [
    "Chip",
    "LossOutput",
    "LossPlan",
    "announce",
    "manifold_contrastive_loss",
    "plan_loss",
    "read_chip",
]
