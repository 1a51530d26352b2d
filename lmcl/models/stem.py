"""Convolutions in front of a short vision transformer: pixels become one feature vector a cell.

A `LevelStem` reads pretrained layers at several depths, as what a codec, a lens or a sensor did to
a picture is gone from the last one (docs/decisions/0006): `SqueezeLevels` those of SqueezeNet,
`lmcl.models.timm_stem` those of any timm model. `small_stem` learns from scratch.
"""

from abc import ABC, abstractmethod

import torch
import torchvision
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from lmcl.errors import ConfigError

PixelsOrFeatures = Float[Tensor, "n 3 s s"] | Float[Tensor, "n cells features"]
"""What an encoder takes: normalised pixels, or its frozen stem's cells (lmcl.features.cache)."""

_TAPS = {4: (128, 7, 4), 7: (256, 3, 2), 12: (512, 1, 1)}
"""Module of SqueezeNet 1.1 -> its channels, and the window and stride in its own pixels whose means
lie on the cells of the last level: those of the pools that stand between."""
LEAST_SQUARE = 1e-4
"""Where nothing fires the square root would have no slope."""


class LevelStem(nn.Module, ABC):
    """Pretrained layers read at several depths: features of every cell, level by level.

    Subclasses give `layers`, a `norms` entry for each level, and `cells`.
    """

    widths: tuple[int, ...]
    """Features of a cell, level by level."""
    summary_hidden = 512
    """Hidden width of what is made of a crop as a whole (`ConvVit`)."""
    layers: nn.Module
    norms: nn.ModuleList

    @property
    def channels(self) -> int:
        """Features of a cell over all levels."""
        return sum(self.widths)

    @property
    def summary(self) -> int:
        """Features of a crop as a whole."""
        return 2 * self.channels

    @property
    @abstractmethod
    def is_frozen(self) -> bool:
        """Whether no layer ever learns, so that `cells` of a crop never change."""

    @property
    @abstractmethod
    def key(self) -> object:
        """How cells are read off the layers; part of a feature cache's file name."""

    @abstractmethod
    def cells(self, pixels: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n t c"]:
        """Features of every cell before the norms: all that the layers have to say."""

    def forward(self, shown: PixelsOrFeatures) -> tuple[Tensor, Tensor]:
        """Features [n, t, c] of every cell in reading order, and [n, s] of the crop as a whole.

        The latter are means and deviations over the cells, each level and statistic on its own
        scale (docs/decisions/0009).
        """
        cells = shown if shown.ndim == 3 else self.cells(shown)
        levels = torch.split(at_least_float32(cells), list(self.widths), dim=-1)
        patches = [norm(level) for norm, level in zip(self.norms, levels, strict=True)]
        whole = []
        for level in levels:
            variance, mean = torch.var_mean(level, dim=1, correction=0)
            deviation = variance.clamp_min(LEAST_SQUARE).sqrt()
            whole += [functional.layer_norm(one, one.shape[-1:]) for one in (mean, deviation)]
        return torch.cat(patches, dim=-1), torch.cat(whole, dim=-1)


class SqueezeLevels(LevelStem):
    """ImageNet SqueezeNet 1.1 at three depths: means and root mean squares under each last cell.

    Root mean squares rather than deviations: after a ReLU they say the same beside the mean, and no
    difference of two near numbers is lost in bfloat16.

    Args:
        frozen: How many of the first modules keep their weights; no graph is kept for them, as
            their activations are most of the memory.
        patch: Preprocessing a side under a cell: 16 as the last level has them, or 32, four in one.
    """

    widths = tuple(count * (2 if window > 1 else 1) for count, window, _ in _TAPS.values())
    layers: nn.Sequential

    def __init__(self, *, frozen: int, patch: int = 16) -> None:
        super().__init__()
        if patch not in (16, 32):
            raise ConfigError(f"encoder.patch for squeezenet-vit must be 16 or 32, got {patch}")
        self.merges = patch == 32
        # weights=None: torchvision would otherwise go to the network.
        self.layers = torchvision.models.squeezenet1_1(weights=None).features
        if frozen > len(self.layers):
            raise ConfigError(
                f"encoder.frozen is {frozen}, but the stem has {len(self.layers)} modules"
            )
        self.frozen = frozen
        self.layers[:frozen].requires_grad_(False)
        # A norm each: otherwise the level with the largest activations drowns the others.
        self.norms = nn.ModuleList(CropNorm(width) for width in self.widths)

    @property
    def is_frozen(self) -> bool:
        """Whether no convolution ever learns, so that `cells` of a crop never change."""
        return self.frozen == len(self.layers)

    @property
    def key(self) -> bool:
        """As earlier versions spelled it, so that their feature caches are found."""
        return self.merges

    def cells(self, pixels: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n t c"]:
        """Features of every cell before the norms: all that the convolutions have to say."""
        levels, x = [], pixels
        for place, layer in enumerate(self.layers):
            with torch.set_grad_enabled(torch.is_grad_enabled() and place >= self.frozen):
                x = layer(x)
            if place in _TAPS:
                _, window, stride = _TAPS[place]
                levels.append(_under_cells(x, window, stride, merges=self.merges))
        return torch.cat(levels, dim=1).flatten(2).transpose(1, 2)


class CropNorm(nn.Module):
    """Features of all cells of a crop on one scale, then a scale and a shift a feature.

    A norm over each cell alone would hide which cells are busy and which are flat: .755 -> .777 on
    held-out photographs, with the summary's means and deviations (docs/decisions/0009).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, cells: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
        """Mean 0 and deviation 1 over cells and features, before scale and shift."""
        variance, mean = torch.var_mean(cells, dim=(1, 2), keepdim=True, correction=0)
        return (cells - mean) * torch.rsqrt(variance + 1e-5) * self.weight + self.bias


class Cells(nn.Module):
    """A stack of layers whose output map is read cell by cell.

    Args:
        layers: Preprocessing -> [n, channels, g, g].
        channels: Of the last layer.
    """

    summary = 0
    """It has nothing to say of a crop but what its cells say."""

    def __init__(self, layers: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.layers = layers
        self.channels = channels

    def forward(self, pixels: Float[Tensor, "n 3 s s"]) -> tuple[Tensor, None]:
        """Features [n, t, c] of every cell, in reading order."""
        return self.layers(pixels).flatten(2).transpose(1, 2), None


def small_stem(patch: int) -> Cells:
    """Convolutions from full resolution down to one cell per `patch` x `patch` pixels.

    The first one keeps the resolution: the grid of a codec and single wrong pixels are gone after
    half of it (docs/experiments.md).

    Raises:
        ConfigError: If the patch is not a power of two from 2 to 32.
    """
    steps = patch.bit_length() - 1
    if patch != 2**steps or not 2 <= patch <= 32:
        raise ConfigError(f"encoder.patch for conv-vit must be 2, 4, 8, 16 or 32, got {patch}")
    layers = [*_convolution(3, 16, stride=1), nn.MaxPool2d(2)]
    channels = 16
    for step in range(1, steps):
        out = min(16 * 2**step, 96)
        layers += _convolution(channels, out, stride=2)
        channels = out
    return Cells(nn.Sequential(*layers), channels)


def at_least_float32(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """Out of autocast's half precision; float64 stays what it is."""
    return values if values.dtype == torch.float64 else values.float()


def _under_cells(
    x: Float[Tensor, "n c h w"], window: int, stride: int, *, merges: bool
) -> Float[Tensor, "n k g g"]:
    """The map itself if it has the cells already, else mean and root mean square under each."""

    def merged(cells: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c g g"]:
        return functional.avg_pool2d(cells, 2, ceil_mode=True) if merges else cells

    if window == 1:
        return merged(x)
    mean = merged(functional.avg_pool2d(x, window, stride, ceil_mode=True))
    square = merged(functional.avg_pool2d(x * x, window, stride, ceil_mode=True))
    return torch.cat([mean, square.clamp_min(LEAST_SQUARE).sqrt()], dim=1)


def _convolution(channels: int, out: int, *, stride: int) -> list[nn.Module]:
    # Statistics over the batch: without them, or with a norm over each crop, learning takes
    # several times as many steps on the demo (docs/experiments.md).
    return [
        nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out),
        nn.GELU(),
    ]
