import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmcl.errors import ConfigError
from lmcl.models.saliency import best_window, make_table, window_to_box


def brute_force(attention: torch.Tensor, window: int) -> tuple[int, int]:
    grid = attention.shape[-1]
    sums = {
        (y, x): float(attention[y : y + window, x : x + window].double().sum())
        for y in range(grid - window + 1)
        for x in range(grid - window + 1)
    }
    return max(sums, key=lambda place: (round(sums[place], 12), -place[0], -place[1]))


@given(seed=st.integers(0, 10_000), grid=st.integers(1, 14), data=st.data())
def test_the_best_window_is_the_one_a_full_search_finds(
    seed: int, grid: int, data: st.DataObject
) -> None:
    window = data.draw(st.integers(1, grid))
    attention = torch.rand(1, grid, grid, generator=torch.Generator().manual_seed(seed))
    assert tuple(best_window(attention, window)[0].tolist()) == brute_force(attention[0], window)


def test_ties_go_to_the_first_window_in_reading_order() -> None:
    assert best_window(torch.ones(1, 6, 6), 3).tolist() == [[0, 0]]


def test_a_window_larger_than_the_map_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match="at most 4"):
        best_window(torch.ones(1, 4, 4), 5)


@given(
    height=st.integers(8, 600),
    width=st.integers(8, 600),
    size=st.integers(1, 224),
    row=st.integers(0, 6),
    column=st.integers(0, 6),
)
def test_a_salient_crop_lies_inside_its_image(
    height: int, width: int, size: int, row: int, column: int
) -> None:
    window_at, extent = np.array([[row, column]]), np.array([[height, width]])
    y, x, h, w = window_to_box(window_at, extent, grid=14, window=8, size=size)[0]
    assert (h, w) == (size, size)
    assert 0 <= y <= max(height - size, 0)
    assert 0 <= x <= max(width - size, 0)


def test_the_crop_is_centred_on_the_window_at_native_resolution() -> None:
    box = window_to_box(np.array([[3, 4]]), np.array([[1400, 2800]]), grid=14, window=8, size=224)
    assert box.tolist() == [[700 - 112, 1600 - 112, 224, 224]]


def test_repeats_of_an_image_make_one_row() -> None:
    boxes = np.array([[0, 0, 8, 8], [1, 1, 8, 8], [0, 0, 8, 8]], dtype=np.int32)
    table = make_table(np.array([7, 3, 7]), boxes)
    assert table.ids.tolist() == [3, 7]
    assert table.boxes.tolist() == [[1, 1, 8, 8], [0, 0, 8, 8]]
