import pytest
import torch

from lmcl.errors import ConfigError
from lmcl.models.stem import SqueezeLevels, small_stem


@pytest.mark.parametrize("size", [32, 64, 65, 96, 160, 161, 224, 226])
def test_every_level_has_the_cells_of_the_last_one(size: int) -> None:
    stem = SqueezeLevels(frozen=0).eval()
    pixels = torch.randn(1, 3, size, size)
    last = stem.layers(pixels)
    assert stem.cells(pixels).shape == (1, last.shape[2] * last.shape[3], stem.channels)


def test_a_cell_holds_mean_and_root_mean_square_of_the_earlier_levels_under_it() -> None:
    torch.manual_seed(0)
    stem = SqueezeLevels(frozen=0).eval()
    pixels = torch.randn(1, 3, 96, 96)
    level = stem.layers[:5](pixels)[0].double()
    under = level[:, 4:11, 8:15].flatten(1)  # cell (1, 2) of 5 x 5: strides of four, seven wide
    truth = torch.cat([under.mean(dim=1), under.square().mean(dim=1).clamp_min(1e-4).sqrt()])
    seen = stem.cells(pixels)[0, 1 * 5 + 2, :256].double()
    torch.testing.assert_close(seen, truth, atol=1e-5, rtol=1e-5)


def test_a_merged_cell_holds_mean_and_root_mean_square_of_four() -> None:
    torch.manual_seed(0)
    fine, coarse = SqueezeLevels(frozen=0).eval(), SqueezeLevels(frozen=0, patch=32).eval()
    coarse.load_state_dict(fine.state_dict())
    pixels = torch.randn(1, 3, 96, 96)
    four = fine.cells(pixels)[0].double().reshape(5, 5, -1)[2:4, 0:2].flatten(0, 1)
    seen = coarse.cells(pixels)[0].double().reshape(3, 3, -1)[1, 0]
    for at, width in ((0, 128), (256, 256)):
        mean, square = four[:, at : at + width], four[:, at + width : at + 2 * width]
        torch.testing.assert_close(seen[at : at + width], mean.mean(0), atol=1e-5, rtol=1e-5)
        # Squares below 1e-4 count as that, before merging or after it.
        torch.testing.assert_close(
            seen[at + width : at + 2 * width].square(),
            square.square().mean(0),
            atol=1e-4,
            rtol=1e-4,
        )
    torch.testing.assert_close(seen[768:], four[:, 768:].mean(0), atol=1e-5, rtol=1e-5)


def test_busy_cells_stay_apart_from_flat_ones_and_each_level_has_its_own_scale() -> None:
    torch.manual_seed(0)
    stem = SqueezeLevels(frozen=0).eval()
    cells = torch.rand(2, 9, stem.channels) * torch.arange(1, 10)[:, None]
    cells[..., : stem.widths[0]] *= 1000
    patches, _ = stem(cells)
    for level in torch.split(patches, list(stem.widths), dim=-1):
        torch.testing.assert_close(level.mean(dim=(1, 2)), torch.zeros(2), atol=1e-4, rtol=0)
        torch.testing.assert_close(
            level.var(dim=(1, 2), correction=0), torch.ones(2), atol=1e-3, rtol=0
        )
        assert torch.all(level.mean(dim=2).diff(dim=1) > 0)


def test_the_summary_is_means_and_deviations_over_the_cells() -> None:
    torch.manual_seed(0)
    stem = SqueezeLevels(frozen=0).eval()
    cells = torch.rand(2, 9, stem.channels)
    _, whole = stem(cells)
    assert whole.shape == (2, stem.summary)
    level = cells[..., 256:768].double()
    for at, truth in ((512, level.mean(1)), (1024, level.std(1, correction=0))):
        scaled = (truth - truth.mean(1, keepdim=True)) / truth.std(1, correction=0, keepdim=True)
        torch.testing.assert_close(whole[:, at : at + 512].double(), scaled, atol=2e-3, rtol=2e-3)


def test_a_single_cell_has_a_summary_and_a_gradient() -> None:
    stem = SqueezeLevels(frozen=0)
    patches, whole = stem(torch.randn(2, 3, 32, 32))
    (patches.sum() + whole.square().sum()).backward()
    assert torch.isfinite(whole).all()
    assert all(torch.isfinite(value.grad).all() for value in stem.layers.parameters())


def test_a_cell_side_the_stem_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="16 or 32, got 8"):
        SqueezeLevels(frozen=0, patch=8)


def test_pixels_of_one_cell_reach_its_features_only_nearby() -> None:
    stem = SqueezeLevels(frozen=0).eval()
    grey = torch.zeros(1, 3, 160, 160)
    marked = grey.clone()
    marked[:, :, :8, :8] = 3.0
    changed = (stem.cells(marked) - stem.cells(grey)).abs().amax(dim=2).reshape(9, 9)
    assert changed[0, 0] > 0.01
    assert changed[6:, 6:].max() == 0


def test_more_frozen_modules_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="the stem has 13 modules"):
        SqueezeLevels(frozen=14)


def test_a_patch_the_small_stem_cannot_cut_is_refused() -> None:
    with pytest.raises(ConfigError, match="2, 4, 8, 16 or 32"):
        small_stem(12)
