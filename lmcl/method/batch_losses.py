"""Losses over the images of a step together: their correlation, and the order of every pair.

They are taken over the images of all ranks, in float64 and in the order in which the images were
dealt, so their value and gradient do not depend on how many ranks there are.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lmcl.utils.kernels import gather_of_all_ranks

_TINY = 1e-8
"""Keeps the root's slope finite where a pair is as wrong as can be, as in UNIQUE's code."""


def gather_images(
    score: Float[Tensor, "k h"], mos: Float[Tensor, " k"], images_by_rank: tuple[int, ...]
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Scores (means over crops) and labels of the images of all ranks, in the order of the deal.

    Gradients flow into this rank's own scores. Every rank must call it, one without images too.

    Args:
        score: Of the random crops of this rank's images.
        mos: Their labels, in [0, 1] units.
        images_by_rank: Images of every rank (`pipeline.sampler.images_by_rank`).
    """
    own = score.double().mean(dim=1)
    table, first = gather_of_all_ranks(
        torch.stack([own.detach(), mos.double()], dim=1), images_by_rank
    )
    every = table[:, 0].index_copy(0, first + torch.arange(len(own), device=own.device), own)
    dealt = _deal_order(images_by_rank, every.device)
    return every[dealt], table[dealt, 1]


def plcc_loss(score: Float[Tensor, " n"], mos: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """(1 - r) / 2 for Pearson's r of scores and labels; 0 where either of them does not vary.

    Source: [Li, Jiang, Jiang, 2020], "Norm-in-Norm Loss with Faster Convergence and Better
    Performance for Image Quality Assessment" (the PLCC-induced loss).
    """
    x, y = score - score.mean(), mos - mos.mean()
    spread = (x.square().sum() * y.square().sum()).sqrt()
    is_defined = spread.detach() > 0
    # Where the root is 0 its slope is infinite, and infinity times 0 is no number.
    safe = torch.where(is_defined, x.square().sum() * y.square().sum(), 1.0).sqrt()
    found: Tensor = torch.where(is_defined, (1 - (x * y).sum() / safe) / 2, score.sum() * 0.0)
    return found


def fidelity_loss(
    score: Float[Tensor, " n"], mos: Float[Tensor, " n"], *, scale: float
) -> Float[Tensor, ""]:
    """1 - sqrt(p q) - sqrt((1 - p)(1 - q)) over all pairs of images, on average.

    p and q are the probabilities that the first image of a pair is the better one, of the labels
    and of the scores, by Thurstone's model, case V.

    Args:
        score: Of the images.
        mos: Their labels.
        scale: Deviation of one image's quality, in [0, 1] units: how far apart two images are when
            raters agree on their order. UNIQUE takes each image's own; ours is one number on both
            sides, so that the loss is 0 where differences are right.

    Source: [Tsai, Liu, Qin, Chen, Ma, 2007], "FRank" (fidelity); [Zhang, Ma, Zhai, Yang, 2021],
    "Uncertainty-aware blind image quality assessment in the laboratory and wild" (UNIQUE).
    """
    i, j = _pairs(score)
    if not len(i):
        return score.sum() * 0.0
    width = math.sqrt(2) * scale
    p, q = (torch.special.ndtr((value[i] - value[j]) / width) for value in (mos, score))
    both = (p * q + _TINY).sqrt() + ((1 - p) * (1 - q) + _TINY).sqrt()
    found: Tensor = (1 - both).mean()
    return found


def margin_loss(
    score: Float[Tensor, " n"], mos: Float[Tensor, " n"], *, scale: float
) -> Float[Tensor, ""]:
    """max(0, scale - how far the better image is ahead), over all pairs with unequal labels.

    Source: [Liu, van de Weijer, Bagdanov, 2017], "RankIQA" (pairwise hinge).
    """
    i, j = _pairs(score)
    sign = (mos[i] - mos[j]).sign()
    short: Tensor = (scale - sign * (score[i] - score[j])).clamp(min=0) * sign.abs()
    found: Tensor = short.sum() / sign.abs().sum().clamp(min=1)
    return found


def _pairs(score: Tensor) -> tuple[Tensor, Tensor]:
    i, j = torch.triu_indices(len(score), len(score), offset=1, device=score.device)
    return i, j


def _deal_order(images_by_rank: tuple[int, ...], device: torch.device) -> Tensor:
    """Rows in rank order -> the order in which ranks took turns."""
    world = len(images_by_rank)
    ranks = [torch.arange(images) * world + rank for rank, images in enumerate(images_by_rank)]
    return torch.cat(ranks).argsort().to(device)
