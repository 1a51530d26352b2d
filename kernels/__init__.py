"""The fused contrastive loss: rows, groups and weights; nothing of images."""

from kernels.contrastive import manifold_contrastive_loss
from kernels.types import LossOutput

__all__ = ["LossOutput", "manifold_contrastive_loss"]
