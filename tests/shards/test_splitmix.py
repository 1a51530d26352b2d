import numpy as np

from shards.splitmix import finalise


def test_the_values_are_those_of_the_published_generator() -> None:
    """The first outputs of SplitMix64 from seed 0 are finalised multiples of the golden gamma."""
    gamma = 0x9E3779B97F4A7C15
    counters = np.array([(k * gamma) % 2**64 for k in (1, 2, 3)], dtype=np.uint64)
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert finalise(counters).tolist() == expected


def test_it_is_a_bijection() -> None:
    assert np.unique(finalise(np.arange(100_000, dtype=np.uint64))).size == 100_000
