"""Adaptive crops while scoring: rounds of a few crops, each image until its mean is known.

Every forward pass of a round has one shape, whatever stands in the batch, and an image's crops are
judged by themselves: so its score does not depend on its neighbours.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from lmcl.evaluation.adaptive import AdaptiveRule, crop_order


class CropOutputs(NamedTuple):
    """What the network says of crops."""

    quality: Float[np.ndarray, "b v"]
    """In [0, 1] units, higher = better, float64."""
    embedding: Float[np.ndarray, "b v d"]
    """Unit-length, float32."""
    deviation: Float[np.ndarray, "b v"] | None = None
    """Predicted deviation of the ratings, [0, 1] units; None of a model that gives none."""


class SeenCrops(NamedTuple):
    """The crops of one image that were looked at."""

    places: NDArray[np.int64]
    """Their numbers among all crops of the image, in the order of looking."""
    quality: NDArray[np.float64]
    """`[k]`"""
    embedding: NDArray[np.float32]
    """`[k, d]`"""
    deviation: NDArray[np.float64] | None = None
    """`[k]`; None of a model that gives none."""


def look_at_all(outputs: CropOutputs) -> list[SeenCrops]:
    """What a network says of all crops of a batch's images."""
    places = np.arange(outputs.quality.shape[1])
    return [
        SeenCrops(places, quality, embedding, _row(outputs.deviation, row))
        for row, (quality, embedding) in enumerate(
            zip(outputs.quality, outputs.embedding, strict=True)
        )
    ]


def look_adaptively(
    rule: AdaptiveRule,
    crops: Sequence[Any],
    boxes: Sequence[NDArray[np.int32]],
    forward: Callable[[Sequence[Any]], CropOutputs],
) -> list[SeenCrops]:
    """Crops of each image of a batch, until the rule says enough.

    Args:
        rule: When that is.
        crops: Of each image, `[v, s, s, 3]`, arrays or tensors.
        boxes: Where they lie, `[v, 4]`.
        forward: The network, on as many crops of each of some images; fills its batch up itself.
    """
    orders = [crop_order(one) for one in boxes]
    count = len(orders[0]) if orders else 0
    seen: list[list[CropOutputs]] = [[] for _ in orders]
    active, done = list(range(len(orders))), 0
    for until in rule.counts(count):
        found = forward([crops[i][orders[i][done:until]] for i in active])
        for row, i in enumerate(active):
            deviation = _row(found.deviation, row)
            seen[i].append(CropOutputs(found.quality[row], found.embedding[row], deviation))
        done = until
        active = [i for i in active if not rule.is_enough(_quality(seen[i]), count)]
        if not active:
            break
    return [_joined(order, parts) for order, parts in zip(orders, seen, strict=True)]


def _row(deviation: NDArray[np.float64] | None, row: int) -> NDArray[np.float64] | None:
    return None if deviation is None else deviation[row]


def _quality(parts: Sequence[CropOutputs]) -> NDArray[np.float64]:
    return np.concatenate([part.quality for part in parts])


def _joined(order: NDArray[np.int64], parts: Sequence[CropOutputs]) -> SeenCrops:
    quality = _quality(parts)
    deviations = [part.deviation for part in parts if part.deviation is not None]
    return SeenCrops(
        places=order[: len(quality)],
        quality=quality,
        embedding=np.concatenate([part.embedding for part in parts]),
        deviation=np.concatenate(deviations) if deviations else None,
    )
