"""The raters' spread as weights: images whose score is better known count more in the regression.

A score is a mean of ratings; its error is their deviation over the root of their number. An image
weighs 1 / (error^2 + floor^2), the floor standing for what a model is off by beyond the raters.
"""

import logging
import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmcl.errors import ConfigError
from lmcl.method.objective import ObjectiveConfig
from lmcl.report.discrimination import ratings_of
from shards.read import ShardSet
from shards.score_scale import MOST_SPREAD
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
    train = np.unique(split.part("train"))
    where = f"objective.image_weight = {objective.image_weight!r}: {printable(shard_set.root)}"
    spread = unit_deviations(shard_set, train, where, "set objective.image_weight = 'equal'")
    ratings = objective.ratings or ratings_of(shard_set.name)[0]
    if not ratings:
        raise ConfigError(
            f"{where}: it is not on file how many ratings a score of {printable(shard_set.name)} "
            "is the mean of; set objective.ratings (1: the deviations are those of the means "
            "themselves)"
        )
    error = spread / math.sqrt(ratings)
    weight = 1 / (error**2 + objective.error_floor**2)
    weight /= weight.mean()
    logger.info(
        "images weigh %.3g to %.3g by their raters' spread (%d ratings a score, floor %g)",
        *(weight.min(), weight.max(), ratings, objective.error_floor),
    )
    found = torch.zeros(len(shard_set.samples))
    found[torch.from_numpy(train)] = torch.from_numpy(weight).float()
    return found


def unit_deviations(
    shard_set: ShardSet, train: Int[np.ndarray, " m"], where: str, way_out: str
) -> Float[np.ndarray, " m"]:
    """Deviations of the ratings of the train part's images, 1 being the whole scale.

    Args:
        shard_set: Of the images.
        train: Their ids.
        where: Field and set, for a message.
        way_out: What to set where they cannot be used.

    Raises:
        ConfigError: If some are missing, none differs from 0, or some are larger than ratings on
            the set's scale can lie apart: they are on another scale then.
    """
    spread, score = shard_set.samples.mos_std[train], shard_set.score
    unknown = train[~np.isfinite(spread) | (spread < 0)]
    if score is None or len(unknown):
        raise ConfigError(
            f"{where} has no deviation of the ratings for {len(unknown):,} of the {len(train):,} "
            f"images of the train part (ids {unknown[:5].tolist()}); build the set with a column "
            f"of deviations (`std`, --std-column), or {way_out}"
        )
    if len(train) and not spread.any():
        raise ConfigError(
            f"{where} has the deviation 0 for all {len(train):,} images of the train part, which "
            f"says nothing of its raters; build the set with their deviations, or {way_out}"
        )
    unit: Float[np.ndarray, " m"] = spread / (score.high - score.low)
    wide = train[unit > MOST_SPREAD]
    if len(wide):
        raise ConfigError(
            f"{where} has deviations that ratings between {score.low:g} and {score.high:g} cannot "
            f"have for {len(wide):,} of the {len(train):,} images of the train part (up to "
            f"{spread.max():g}; ids {wide[:5].tolist()}): they are on another scale than the "
            f"scores; correct the column and build the set again, or {way_out}"
        )
    return unit
