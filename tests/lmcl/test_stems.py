import pytest
import torch

from lmcl.errors import ConfigError
from lmcl.stems import SqueezeLevels, small_stem


@pytest.mark.parametrize("size", [32, 64, 65, 96, 160, 161, 224, 226])
def test_every_level_has_the_cells_of_the_last_one(size: int) -> None:
    stem = SqueezeLevels(frozen=0).eval()
    pixels = torch.randn(1, 3, size, size)
    last = stem.layers(pixels)
    assert stem(pixels).shape == (1, last.shape[2] * last.shape[3], stem.channels)


def test_a_cell_holds_mean_and_root_mean_square_of_the_earlier_levels_under_it() -> None:
    torch.manual_seed(0)
    stem = SqueezeLevels(frozen=0).eval()
    pixels = torch.randn(1, 3, 96, 96)
    level = stem.layers[:5](pixels)[0].double()
    under = level[:, 4:11, 8:15].flatten(1)  # cell (1, 2) of 5 x 5: strides of four, seven wide
    truth = torch.cat([under.mean(dim=1), under.square().mean(dim=1).clamp_min(1e-4).sqrt()])
    seen = stem(pixels)[0, 1 * 5 + 2, :256].double()
    truth = torch.nn.functional.layer_norm(truth, (256,))
    torch.testing.assert_close(seen, truth, atol=1e-3, rtol=1e-3)


def test_pixels_of_one_cell_reach_its_features_only_nearby() -> None:
    stem = SqueezeLevels(frozen=0).eval()
    grey = torch.zeros(1, 3, 160, 160)
    marked = grey.clone()
    marked[:, :, :8, :8] = 3.0
    changed = (stem(marked) - stem(grey)).abs().amax(dim=2).reshape(9, 9)
    assert changed[0, 0] > 0.1
    assert changed[6:, 6:].max() == 0


def test_more_frozen_modules_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="the stem has 13 modules"):
        SqueezeLevels(frozen=14)


def test_a_patch_the_small_stem_cannot_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="2, 4, 8, 16 or 32"):
        small_stem(12)
