"""Soft labels: the ratings of each image as a distribution over equal ranges of the scale.

A normal distribution with the score as its mean and the deviation of the ratings, integrated over
each range; what lies outside the scale counts in the ranges at its ends.

Source: [Zeng, Zhang, Bovik, 2018], "Blind Image Quality Assessment with a Probabilistic Quality
Representation" (PQR); [Diaz, Marathe, 2019], "Soft Labels for Ordinal Regression".
"""

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import ndtr
from torch import Tensor

from lmcl.method.objective import ObjectiveConfig
from lmcl.training.rating_weights import unit_deviations
from shards.read import ShardSet
from shards.splits.split import Split
from shards.text import printable


def soft_labels(
    objective: ObjectiveConfig, bins: int, shard_set: ShardSet, split: Split
) -> Float[Tensor, "n k"] | None:
    """The distribution of every image of the train part; None if the head gives a plain score.

    Returns:
        A row for each row of the sample table, 1 in sum; 0 outside the train part.

    Raises:
        ConfigError: If the set does not say how far an image's ratings lie apart, or says what
            cannot be, and no deviation is set.
    """
    if not bins or shard_set.score is None:
        return None
    train = np.unique(split.part("train"))
    if objective.deviation is not None:
        spread = np.full(len(train), objective.deviation)
    else:
        spread = unit_deviations(
            shard_set,
            train,
            f"decoder.bins = {bins} learns the ratings' distribution: {printable(shard_set.root)}",
            "set objective.deviation to one number for all (in [0, 1] units, such as 0.15), or "
            "decoder.bins = 0",
        )
    found = torch.zeros(len(shard_set.samples), bins, dtype=torch.float32)
    labels = distribution(shard_set.unit_mos()[train], spread, bins)
    found[torch.from_numpy(train)] = torch.from_numpy(labels).float()
    return found


def distribution(
    mean: Float[np.ndarray, " n"], deviation: Float[np.ndarray, " n"], bins: int
) -> Float[np.ndarray, "n k"]:
    """Shares of normal distributions in equal ranges of [0, 1], the outer ones without an end.

    A deviation below half a range is taken as that: a label between two ranges stays between them.
    """
    width = np.maximum(deviation, 0.5 / bins)[:, None]
    edges = np.arange(1, bins) / bins
    below = ndtr((edges[None] - mean[:, None]) / width)
    ends = np.zeros((len(mean), 1)), np.ones((len(mean), 1))
    found: Float[np.ndarray, "n k"] = np.diff(np.concatenate([ends[0], below, ends[1]], axis=1))
    return found
