"""The fused contrastive loss: rows, groups and weights; nothing of images."""

from kernels.contrastive import LossOutput, manifold_contrastive_loss

__all__ = ["LossOutput", "manifold_contrastive_loss"]
