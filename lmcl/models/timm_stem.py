"""Any timm model as the stem of a hybrid encoder: its feature maps, read at several depths.

A level is one of the maps that timm's `features_only` gives, by its name there. Finer ones are
brought to the cells of the coarsest as the mean and the deviation under each cell; the deviation is
what noise, blur and the grid of a codec change.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers import Format, nhwc_to
from torch import Tensor, nn
from torch.nn import functional

from lmcl.errors import ConfigError
from lmcl.models.stem import LEAST_SQUARE, CropNorm, LevelStem, at_least_float32
from lmcl.models.vit import near_models
from shards.text import printable


@dataclass(frozen=True, kw_only=True)
class Level:
    """One depth of a timm model."""

    name: str
    """As in timm's `feature_info`: the module whose output it is."""
    channels: int
    reduction: int
    """Pixels a side under one position of its map."""


class TimmLevels(LevelStem):
    """A timm model read at several depths: mean and deviation of each level under each cell.

    Args:
        name: Model of timm that `features_only` can take apart.
        levels: Names of the depths to read; empty: all.
        frozen: How many of these levels keep their weights, first to last; of a frozen one batch
            norms keep their statistics too.
        patch: Pixels a side under a cell; None: as many as under the coarsest level's positions.
        sizes: Pixel sides of crops and views; multiples of the patch.
    """

    summary_hidden = 256

    def __init__(
        self,
        name: str,
        *,
        levels: Sequence[str],
        frozen: int,
        patch: int | None,
        sizes: Sequence[int],
    ) -> None:
        super().__init__()
        self.name = name
        self._create = partial(
            create_features, name, sizes, places=_find_levels(name, levels, sizes)
        )
        self.layers: Any = self.create_layers(pretrained=False)
        self.levels = tuple(map(_level, self.layers.feature_info.get_dicts()))
        self.patch = patch or self.levels[-1].reduction
        _check_patch(name, self.levels, self.patch, sizes)
        self.widths = tuple(
            level.channels * (2 if level.reduction < self.patch else 1) for level in self.levels
        )
        self.norms = nn.ModuleList(CropNorm(width) for width in self.widths)
        if frozen > len(self.levels):
            raise ConfigError(
                f"encoder.frozen is {frozen}, but {len(self.levels)} levels of {name} are read: "
                f"{', '.join(level.name for level in self.levels)}"
            )
        self.frozen = frozen
        self._freeze(sizes[0])
        self.train()

    @property
    def is_frozen(self) -> bool:
        """Whether no layer ever learns, so that `cells` of a crop never change."""
        return self.frozen == len(self.levels)

    @property
    def key(self) -> str:
        """Levels and cells."""
        return f"{self.patch} {self.levels}"

    def create_layers(self, **options: Any) -> Any:
        """Another network like `layers`; `options` are those of `timm.create_model`."""
        return self._create(**options)

    def train(self, mode: bool = True) -> "TimmLevels":
        """Training mode but for what is frozen: its norms and its dropout stay as they were."""
        super().train(mode)
        for module in self.layers.modules():
            own = list(module.parameters(recurse=False))
            if self.is_frozen or (own and not any(one.requires_grad for one in own)):
                module.training = False
        return self

    def cells(self, pixels: Float[Tensor, "n 3 s s"]) -> Float[Tensor, "n t c"]:
        """Features of every cell before the norms: all that the layers have to say."""
        grid = pixels.shape[-1] // self.patch
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.is_frozen):
            maps = self.layers(pixels)
            order = Format(getattr(self.layers, "output_fmt", Format.NCHW))
            if order != Format.NCHW:
                maps = [nhwc_to(one, Format.NCHW) for one in maps]
            parts = [
                _under_cells(one, grid, has_deviation=level.reduction < self.patch)
                for level, one in zip(self.levels, maps, strict=True)
            ]
        return torch.cat(parts, dim=1).flatten(2).transpose(1, 2)

    def _freeze(self, side: int) -> None:
        if self.is_frozen:
            self.layers.requires_grad_(False)
        elif self.frozen:
            for parameter in _parameters_below(self.layers, self.frozen, side):
                parameter.requires_grad_(False)


def _find_levels(name: str, levels: Sequence[str], sizes: Sequence[int]) -> tuple[int, ...]:
    """Places of the named depths among those that timm gives for a model.

    Raises:
        ConfigError: If timm has no such model, cannot take it apart, or has no such depth.
    """
    if not timm.is_model(name):
        near = near_models(name) or ["resnet18", "convnext_atto"]
        raise ConfigError(
            f"encoder.stem = {printable(name, 80)!r}: timm {timm.__version__} has no such model; "
            f"try one of {', '.join(near)}, or squeezenet1_1"
        )
    with torch.device("meta"):
        known = [level["module"] for level in create_features(name, sizes).feature_info.info]
    if len(set(known)) < len(known):
        raise ConfigError(
            f"encoder.stem = {name!r} has several branches, whose levels timm gives the same names "
            f"({', '.join(known)}); take a stem with one, such as resnet18 or convnext_atto"
        )
    unknown = [level for level in levels if level not in known]
    places = [known.index(level) for level in levels or known if level in known]
    if unknown or places != sorted(set(places)):
        what = f"no level {unknown[0]!r}" if unknown else "these levels in another order, each once"
        raise ConfigError(
            f"encoder.levels: {name} has {what}; they are, first to last: {', '.join(known)}"
        )
    return tuple(places)


def create_features(
    name: str,
    sizes: Sequence[int],
    *,
    places: Sequence[int] = (),
    **more: Any,
) -> Any:
    """`timm.create_model(name, features_only=True)` for pixels of these sides.

    Args:
        name: A model that timm has.
        sizes: Pixel sides it will be shown.
        places: Depths; empty: all.
        more: Further arguments of timm's, such as `pretrained`.

    Raises:
        ConfigError: If timm cannot take the model apart.
    """
    fixed = {"img_size": sizes[0]}
    if len(set(sizes)) > 1:
        fixed["dynamic_img_size"] = True
    # timm asks for five depths unless it knows better, and some models have fewer.
    depths: list[Sequence[int]] = [places] if places else [(), range(4), range(3)]
    said: Exception | None = None
    for indices in depths:
        for size in (fixed, {}):  # convolutions take no size, transformers need theirs
            chosen = {"out_indices": tuple(indices)} if indices else {}
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of models that timm has renamed
                    return timm.create_model(name, features_only=True, **size, **chosen, **more)
            except (RuntimeError, TypeError, AssertionError, IndexError, KeyError) as error:
                said = error
    raise ConfigError(
        f"encoder.stem = {name!r}: timm {timm.__version__} cannot give its feature maps at "
        f"{', '.join(map(str, sizes))} pixels ({printable(said, 200)}); take another model: "
        "resnet18, convnext_atto, tf_efficientnet_lite0"
    ) from said


def _level(info: dict[str, Any]) -> Level:
    return Level(
        name=str(info["module"]),
        channels=int(info["num_chs"]),
        reduction=int(info["reduction"]),
    )


def _check_patch(name: str, levels: Sequence[Level], patch: int, sizes: Sequence[int]) -> None:
    coarsest = levels[-1].reduction
    if patch % coarsest:
        raise ConfigError(
            f"encoder.patch is {patch}, but {levels[-1].name} of {name} has one position for "
            f"{coarsest} pixels a side; set it to a multiple of {coarsest}, or read finer levels "
            "only (encoder.levels)"
        )
    if any(size % patch for size in sizes):
        raise ConfigError(
            f"cells of {patch} pixels ({name}) do not fill the crop and the view, which have "
            f"{sizes[0]} and {sizes[-1]}; choose crops.size and saliency.view as multiples of "
            f"{patch}"
        )


def _under_cells(
    level: Float[Tensor, "n c h w"], grid: int, *, has_deviation: bool
) -> Float[Tensor, "n k g g"]:
    """Mean, and deviation where there is one, of the positions under each cell; float32."""
    values = at_least_float32(level)
    mean = _pooled(values, grid)
    if not has_deviation:
        return mean
    # The largest common part is taken off first: squares of near numbers would lose it.
    centre = mean.mean(dim=(2, 3), keepdim=True)
    square = _pooled((values - centre).square(), grid)
    variance = square - (mean - centre).square()
    return torch.cat([mean, variance.clamp_min(LEAST_SQUARE).sqrt()], dim=1)


def _pooled(values: Float[Tensor, "n c h w"], grid: int) -> Float[Tensor, "n c g g"]:
    side = values.shape[-1]
    if side == grid:
        return values
    if side % grid == 0:  # every exporter knows it
        return functional.avg_pool2d(values, side // grid)
    return functional.adaptive_avg_pool2d(values, grid)


def _parameters_below(layers: nn.Module, count: int, side: int) -> list[nn.Parameter]:
    """Parameters that the first `count` levels depend on: those that get a gradient from them."""
    device = next(layers.parameters()).device
    was_training = layers.training
    layers.eval()
    with torch.enable_grad():
        maps = layers(torch.zeros(1, 3, side, side, device=device))
        total = sum((one.float().sum() for one in maps[:count]), torch.zeros((), device=device))
        parameters = [one for one in layers.parameters() if one.requires_grad]
        found = torch.autograd.grad(total, parameters, allow_unused=True)
    layers.train(was_training)
    return [one for one, slope in zip(parameters, found, strict=True) if slope is not None]
