"""Distributed sampler: a pure function of (seed, epoch, step, rank, world size).

The global order of an epoch is one permutation of the split. It does not know how many ranks there
are: they deal its positions among themselves, so another world size sees the same order.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from pipeline.counter_rng import fold_key, random_bits

# Below, a table is sorted once per epoch (80 ms, 4 MB for a million); above, positions are permuted
# one batch at a time by a pseudorandom permutation, which needs no memory at all.
TABLE_LIMIT = 1 << 20
_ROUNDS = 10


def check_place(step: int, *, steps: int, rank: int, world_size: int) -> None:
    """Refuse a step or a rank that a sampler's epoch does not have.

    Raises:
        ValueError: Names what was asked and what there is.
    """
    if not 0 <= step < steps:
        raise ValueError(f"step {step} was asked of an epoch of {steps} steps")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} was asked of a world of {world_size}")


@dataclass(frozen=True, kw_only=True)
class DistributedSampler:
    """Which samples of a split belong to which step of which rank."""

    samples: int
    """Samples in the split, at least 1."""
    batch_size: int
    """Images per rank and step."""
    world_size: int = 1
    """Ranks that take part."""
    seed: int = 0
    """The data order's seed; unused without shuffling."""
    shuffle: bool = True
    """False keeps the split's own order (evaluation)."""

    def __post_init__(self) -> None:
        for name, value in (
            ("samples", self.samples),
            ("batch_size", self.batch_size),
            ("world_size", self.world_size),
        ):
            if value < 1:
                raise ValueError(f"{name} of an order is {value}; it must be at least 1")

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
        """Positions in the split that `rank` takes in `step`, and which of them are no padding.

        Ranks take turns (rank, rank + world_size, ...), so that the last step's padding is spread
        over all of them. Padding repeats samples from the beginning of the epoch's order.

        Raises:
            ValueError: If the step or the rank does not exist.
        """
        check_place(step, steps=self.steps, rank=rank, world_size=self.world_size)
        first = step * self.batch_size * self.world_size + rank
        positions = first + self.world_size * np.arange(self.batch_size, dtype=np.int64)
        valid = positions < self.samples
        positions %= self.samples
        if not self.shuffle:
            return positions, valid
        return permute(positions, self.samples, key=fold_key(self.seed, epoch)), valid


@dataclass(frozen=True, kw_only=True)
class SetDraw:
    """Which images of several sets an epoch goes over, if each gives another share of its own.

    Sets give images in proportion to n^exponent, as many as leaves none short: the one that is
    short first gives all of its images, every other one another draw each epoch, without
    repeats.
    """

    sizes: tuple[int, ...]
    """Images of each set, which stand together in the order of the sets."""
    exponent: float
    """In [0, 1]; 1: all of them."""
    seed: int

    @property
    def counts(self) -> tuple[int, ...]:
        """Images of each set in an epoch."""
        weights = [size**self.exponent for size in self.sizes]
        unit = min(size / weight for size, weight in zip(self.sizes, weights, strict=True))
        return tuple(
            min(size, max(1, round(unit * weight)))
            for size, weight in zip(self.sizes, weights, strict=True)
        )

    def positions(self, epoch: int) -> Int64[np.ndarray, " n"]:
        """Rising positions of an epoch's images among those of all sets."""
        found, first = [], 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            key = fold_key(fold_key(self.seed, epoch), number)
            chosen = permute(np.arange(count, dtype=np.int64), size, key=key)
            found.append(first + np.sort(chosen))
            first += size
        return np.concatenate(found)


def images_by_rank(images: int, world_size: int) -> tuple[int, ...]:
    """How many of a step's images each rank has, padding left out, as `DistributedSampler` deals.

    Args:
        images: Images of the step over all ranks, `DistributedSampler.images`.
        world_size: Number of ranks, which take turns.
    """
    return tuple(len(range(rank, images, world_size)) for rank in range(world_size))


def permute(positions: NDArray[np.int64], n: int, *, key: int) -> NDArray[np.int64]:
    """Where each position of [0, n) goes under the permutation that `key` names."""
    if n <= TABLE_LIMIT:
        return _sorted_table(n, key)[positions].astype(np.int64)
    return permute_by_rounds(positions, n, key=key)


@functools.lru_cache(maxsize=4)
def _sorted_table(n: int, key: int) -> NDArray[np.int32]:
    # No two of the sorted values are equal (random_bits is a bijection), so the result is a
    # permutation that does not depend on the sorting algorithm.
    return np.argsort(random_bits(key, np.arange(n, dtype=np.uint64))).astype(np.int32)


def permute_by_rounds(positions: NDArray[np.int64], n: int, *, key: int) -> NDArray[np.int64]:
    """The same as a Feistel network, in the time and memory of the given positions alone.

    A position is written as (left, right) in [0, a) x [0, b) with a * b >= n; each round adds to
    one half a pseudorandom function of the other, which can be undone whatever the function is.
    Results beyond n (a fraction of about 2 / sqrt(n)) walk on along their cycle until they fall
    below it.

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, sections 4 and 5.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    out = positions.astype(np.int64)
    todo = np.arange(out.size)
    while todo.size:
        out[todo] = _feistel(out[todo], a, b, key)
        todo = todo[out[todo] >= n]
    return out


def _feistel(positions: NDArray[np.int64], a: int, b: int, key: int) -> NDArray[np.int64]:
    left, right = np.divmod(positions, b)
    for number in range(_ROUNDS):
        round_key = fold_key(key, number)
        left = (left + _below(random_bits(round_key, right), a)) % a
        right = (right + _below(random_bits(~round_key & ((1 << 64) - 1), left), b)) % b
    return left * b + right


def _below(bits: NDArray[np.uint64], bound: int) -> NDArray[np.int64]:
    return (bits % np.uint64(bound)).astype(np.int64)
