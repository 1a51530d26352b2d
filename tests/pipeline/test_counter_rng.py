import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.counter_rng import fold_key, random_bits, scale_bits

keys = st.integers(0, 2**64 - 1)


def test_bits_are_the_same_on_every_machine_and_version() -> None:
    bits = random_bits(fold_key(1, 2), np.arange(3))
    assert bits.tolist() == [14396389703305204032, 11233716658416432448, 3844821520205204678]


@given(key=keys)
def test_no_two_counters_share_their_bits(key: int) -> None:
    assert np.unique(random_bits(key, np.arange(1000))).size == 1000


def test_the_order_and_number_of_key_parts_matter() -> None:
    assert len({fold_key(), fold_key(0), fold_key(0, 0), fold_key(0, 1), fold_key(1, 0)}) == 5


@given(key=keys, bound=st.integers(1, 2**31))
def test_scaled_bits_lie_below_their_bound(key: int, bound: int) -> None:
    values = scale_bits(random_bits(key, np.arange(64)), np.full(64, bound))
    assert values.min() >= 0
    assert values.max() < bound


def test_scaled_bits_hit_every_value_equally_often() -> None:
    values = scale_bits(random_bits(fold_key(7), np.arange(70_000)), np.full(70_000, 7))
    counts = np.bincount(values, minlength=7)
    # Chi-squared with 6 degrees of freedom exceeds 22.5 once in a thousand.
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 22.5
