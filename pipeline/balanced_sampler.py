"""Balanced sampler: images drawn evenly over ranges of their score, as a pure function.

Photographs crowd in the middle of the scale; a model that sees them as they come learns little of
the ends. Here every step takes equally many images of each of some equal ranges of the score (of a
range that has fewer, all of them). Inside an epoch a range is gone through in a random order from
one end to the other and again, so its images are seen equally often, up to one time. An epoch has
as many steps as without, so images of crowded ranges wait for other epochs.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray

from pipeline.counter_rng import fold_key
from pipeline.sampler import check_place, permute

_WITHIN_STEP = 0x57495448
"""Key of the order inside a step."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BalancedSampler:
    """Which samples of a split belong to which step of which rank; see `DistributedSampler`."""

    ranges: tuple[Int64[np.ndarray, " _"], ...]
    """Positions in the split of the images of each range; none is empty."""
    batch_size: int
    """Images per rank and step."""
    world_size: int = 1
    """Ranks that take part."""
    seed: int = 0
    """Of the order."""

    @property
    def samples(self) -> int:
        """Samples in the split, and draws of an epoch."""
        return int(self._sizes.sum())

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same for every rank; the last one may need padding."""
        return math.ceil(self.samples / (self.batch_size * self.world_size))

    def images(self, *, step: int) -> int:
        """Images of a step over all ranks, padding left out."""
        together = self.batch_size * self.world_size
        return min(together, self.samples - step * together)

    def batch(
        self, *, epoch: int, step: int, rank: int
    ) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        """Positions in the split that `rank` takes in `step`, and which of them are no padding."""
        dealt, valid = self._deal(step, rank)
        return self._of_step(epoch, step)[0][dealt], valid

    def repeats(self, *, epoch: int, step: int, rank: int) -> Int64[np.ndarray, " b"]:
        """How often each of `batch`'s images was drawn in this epoch before."""
        found: Int64[np.ndarray, " b"] = self._of_step(epoch, step)[1][self._deal(step, rank)[0]]
        return found

    def draws(self) -> Int64[np.ndarray, " k"]:
        """How often an epoch takes an image of each range, all of its images together."""
        last = self.steps - 1
        found: Int64[np.ndarray, " k"] = self._starts(last) + self._counts(last)
        return found

    @functools.cached_property
    def _sizes(self) -> Int64[np.ndarray, " k"]:
        return np.array([len(one) for one in self.ranges], dtype=np.int64)

    def _deal(self, step: int, rank: int) -> tuple[Int64[np.ndarray, " b"], Bool[np.ndarray, " b"]]:
        check_place(step, steps=self.steps, rank=rank, world_size=self.world_size)
        places = rank + self.world_size * np.arange(self.batch_size, dtype=np.int64)
        images = self.images(step=step)
        return places % images, places < images

    def _of_step(
        self, epoch: int, step: int
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Positions of all ranks' images in the order of the deal, and earlier draws of each."""
        positions, repeats = [], []
        starts, counts = self._starts(step), self._counts(step)
        for number, members in enumerate(self.ranges):
            walked = starts[number] + np.arange(counts[number], dtype=np.int64)
            order = _order(len(members), fold_key(self.seed, epoch, number))
            positions.append(members[order[walked % len(members)]])
            repeats.append(walked // len(members))
        images = self.images(step=step)
        dealt = _order(images, fold_key(self.seed, epoch, step, _WITHIN_STEP))
        return np.concatenate(positions)[dealt], np.concatenate(repeats)[dealt]

    def _counts(self, step: int) -> Int64[np.ndarray, " k"]:
        """Images of each range in a step: equally many, those left over to ranges in turn."""
        base, left, free = _share_out(self._sizes, self.images(step=step))
        counts = base.copy()
        counts[free[(step * left + np.arange(left)) % max(len(free), 1)]] += 1
        return counts

    def _starts(self, step: int) -> Int64[np.ndarray, " k"]:
        """Images of each range that the epoch's steps before this one took, which are full ones."""
        base, left, free = _share_out(self._sizes, self.images(step=0))
        starts = step * base
        turns = step * left - np.arange(len(free))
        starts[free] += np.maximum(0, -(-turns // max(len(free), 1)))
        return starts


def score_ranges(score: Float[np.ndarray, " n"], count: int) -> tuple[NDArray[np.int64], ...]:
    """Positions of the images in each of `count` equal ranges between the ends of their scores.

    Empty ranges are left out; equal scores are one range.
    """
    low, high = float(score.min()), float(score.max())
    width = (high - low) / count or 1.0
    number = np.minimum(((score - low) / width).astype(np.int64), count - 1)
    return tuple(np.flatnonzero(number == one) for one in np.unique(number))


def _share_out(
    sizes: Int64[np.ndarray, " k"], images: int
) -> tuple[Int64[np.ndarray, " k"], int, Int64[np.ndarray, " m"]]:
    """`images` over ranges, equally as far as they have so many.

    Returns:
        What each range gives, how many are left over, and which ranges have more; there are more
        of these than are left over.
    """
    given = np.zeros_like(sizes)
    left, free = images, np.arange(len(sizes))
    while len(free) and left >= len(free):
        given[free] += np.minimum(left // len(free), sizes[free] - given[free])
        left = images - int(given.sum())
        free = np.flatnonzero(given < sizes)
    return given, left, free


@functools.lru_cache(maxsize=128)
def _order(n: int, key: int) -> NDArray[np.int64]:
    return permute(np.arange(n, dtype=np.int64), n, key=key)
