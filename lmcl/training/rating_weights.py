"""The raters' spread as weights: images whose score is better known count more in the regression.

A score is a mean of ratings; its error is their deviation over the root of their number. An image
weighs 1 / (error^2 + floor^2), the floor standing for what a model is off by beyond the raters.
"""

import logging
import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lmcl.errors import ConfigError
from lmcl.method.objective import ObjectiveConfig
from lmcl.report.discrimination import ratings_of
from shards.read import ShardSet
from shards.splits.split import Split
from shards.text import printable

logger = logging.getLogger(__name__)


def rating_weights(
    objective: ObjectiveConfig, shard_set: ShardSet, split: Split
) -> Float[Tensor, " n"] | None:
    """The weight of every image of the set in the regression; None if all weigh the same.

    Returns:
        One number for each row of the sample table, 1 on average over the train part, and 0
        outside it.

    Raises:
        ConfigError: If the set does not say how far an image's ratings lie apart, or it is not
            known of how many a score is the mean.
    """
    if objective.image_weight == "equal":
        return None
    score, train = shard_set.score, np.unique(split.part("train"))
    where = f"objective.image_weight = {objective.image_weight!r}: {printable(shard_set.root)}"
    spread = shard_set.samples.mos_std[train]
    unknown = train[~np.isfinite(spread) | (spread < 0)]
    if score is None or len(unknown):
        raise ConfigError(
            f"{where} has no deviation of the ratings for {len(unknown):,} of the {len(train):,} "
            f"images of the train part (ids {unknown[:5].tolist()}); build the set with a column "
            "of deviations (`std`, --std-column), or set objective.image_weight = 'equal'"
        )
    ratings = objective.ratings or ratings_of(shard_set.name)[0]
    if not ratings:
        raise ConfigError(
            f"{where}: it is not on file how many ratings a score of {printable(shard_set.name)} "
            "is the mean of; set objective.ratings (1: the deviations are those of the means "
            "themselves)"
        )
    error = spread / ((score.high - score.low) * math.sqrt(ratings))
    weight = 1 / (error**2 + objective.error_floor**2)
    weight /= weight.mean()
    logger.info(
        "images weigh %.3g to %.3g by their raters' spread (%d ratings a score, floor %g)",
        *(weight.min(), weight.max(), ratings, objective.error_floor),
    )
    found = torch.zeros(len(shard_set.samples))
    found[torch.from_numpy(train)] = torch.from_numpy(weight).float()
    return found
