"""SplitMix64's finaliser, from which order, boxes and splits draw without a stream of numbers."""

from typing import cast

import numpy as np
from numpy.typing import NDArray


def finalise(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection on 64-bit integers whose output looks random; any shape.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, with the
    constants of Stafford's variant 13.
    """
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return cast(NDArray[np.uint64], bits ^ (bits >> np.uint64(31)))
