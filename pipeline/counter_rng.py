"""Counter-based random numbers: 64 bits from (key, counter), with no state and no stream.

numpy promises the same *stream* only within a version (NEP 19), and a stream has to be read from
its start. Order and boxes must be the same on every machine, in every version, and for one image
without drawing those before it; hence a counter and a mixing function, ten lines, written here.
"""

import numpy as np
from jaxtyping import Shaped
from numpy.typing import NDArray

from shards.splitmix import finalise

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fold_key(*parts: int) -> int:
    """One 64-bit key from a sequence of integers; the order of the parts matters."""
    key = _GOLDEN
    for part in parts:
        # mix_bits in Python's own integers: for a single number ten times as fast as numpy.
        z = ((key ^ (part & _MASK)) + _GOLDEN) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        key = ((z ^ (z >> 31)) + _GOLDEN) & _MASK
    return key


def mix_bits(
    counter: Shaped[np.ndarray, "*axes"],
) -> Shaped[np.ndarray, "*axes"]:
    """One step of SplitMix64: a bijection on 64-bit integers whose output looks random."""
    return np.asarray(finalise(counter.astype(np.uint64) + np.uint64(_GOLDEN)))


def random_bits(key: int, counter: NDArray[np.integer]) -> NDArray[np.uint64]:
    """64 bits for each counter under `key`; for one key a bijection, so never two equal ones."""
    first = mix_bits(counter.astype(np.uint64) ^ np.uint64(key))
    return mix_bits(first ^ np.uint64((key * _GOLDEN) & _MASK))


def scale_bits(bits: NDArray[np.uint64], bound: NDArray[np.integer]) -> NDArray[np.int64]:
    """Integers in [0, bound) from 64-bit ones, for bounds up to 2**31; the bias is below 2**-32."""
    product = (bits >> np.uint64(32)) * bound.astype(np.uint64)
    return (product >> np.uint64(32)).astype(np.int64)
