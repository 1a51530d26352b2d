"""Widths and column splits: pure functions of sizes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import tuning


@pytest.mark.parametrize(
    ("d", "widths"),
    [(16, (16, 0)), (24, (32, 0)), (48, (32, 16)), (80, (64, 16)), (256, (256, 0)),
     (384, (256, 128)), (768, (512, 256))],
)  # fmt: skip
def test_a_width_is_one_or_two_powers_of_two(d, widths) -> None:
    assert tuning.split_width(d) == widths


@given(d=st.integers(1, tuning.MAX_WIDTH))
def test_padding_is_never_more_than_to_the_next_power_of_two(d) -> None:
    first, second = tuning.split_width(d)
    assert d <= first + second < max(2 * d, 17)
    assert first & (first - 1) == 0
    assert second & (second - 1) == 0


@given(
    rows=st.integers(1, 700),
    columns=st.integers(1, 2000),
    processors=st.sampled_from([6, 108, 132]),
)
def test_splits_never_leave_a_program_without_columns(rows, columns, processors) -> None:
    splits = tuning.choose_splits(rows, columns, processors=processors)
    assert 1 <= splits <= min(16, columns)


@pytest.mark.parametrize("m", [1280, 5120, 10240, 20480])
def test_splits_keep_most_of_an_h200_busy(m) -> None:
    row_tiles, column_tiles = m // 128, m // 64
    splits = tuning.choose_splits(row_tiles, column_tiles, processors=132)
    waves = -(-row_tiles * splits // 132)
    assert row_tiles * splits / (waves * 132) >= (0.55 if m == 1280 else 0.84)


@pytest.mark.parametrize("width", [256, 384])
def test_tiles_meet_once_where_the_model_says_that_it_pays(width) -> None:
    tile = tuning.make_plan(width, "bf16", 90).sums
    paying = [
        m
        for m in (320, 640, 1280, 2560, 5120, 10240, 20480, 40960)
        if tuning.is_once_cheaper(-(-m // tile.rows), tile, processors=132)
    ]
    assert paying == [5120, 10240, 20480, 40960]


@pytest.mark.parametrize("row_tiles", [*range(1, 9), 40, 41])
def test_every_pair_of_row_tiles_meets(row_tiles) -> None:
    tile = tuning.Tile(rows=16, columns=16, warps=4, stages=2)
    shared = tuning.shared_distances(row_tiles)
    met = []
    for one in range(row_tiles):
        for distance in range(tuning.steps_once(row_tiles, tile)):
            other = (one + distance) % row_tiles
            met.append((one, other))
            if 0 < distance <= shared:
                met.append((other, one))
    assert sorted(met) == [(a, b) for a in range(row_tiles) for b in range(row_tiles)]


def test_a_large_batch_is_not_split() -> None:
    assert tuning.choose_splits(81920 // 128, 81920 // 64, processors=132) == 1
