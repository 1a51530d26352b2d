"""Contrastive losses without an (n, m) matrix: rows, groups and weights; nothing of images."""

from kernels.contrastive import manifold_contrastive_loss
from kernels.grouped import ComputeOptions, grouped_logsumexp, two_sided_logsumexp
from kernels.losses import clip_loss, info_nce_loss, supcon_loss
from kernels.precision import Chip, LossPlan, announce, plan_loss, read_chip
from kernels.types import LossOutput

__all__ = [
    "Chip",
    "ComputeOptions",
    "LossOutput",
    "LossPlan",
    "announce",
    "clip_loss",
    "grouped_logsumexp",
    "info_nce_loss",
    "manifold_contrastive_loss",
    "plan_loss",
    "read_chip",
    "supcon_loss",
    "two_sided_logsumexp",
]
