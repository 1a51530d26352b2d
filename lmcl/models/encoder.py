"""Crops become tokens: any timm ViT by name, or a convolutional stem under a few ViT blocks.

Every encoder gives CLS first and then the patch tokens of a square map, after its final norm, and
can say where CLS looked in its last layers. Attention weights are computed only when asked for:
the training forward keeps the fused attention.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmcl.errors import ConfigError
from lmcl.models.attention import ClsAttentionRecorder, fused_attention
from lmcl.models.stem import PixelsOrFeatures
from lmcl.utils.validators import check_bounds

STEM_WIDTH, STEM_HEADS = 192, 3
"""Of the blocks above a convolutional stem, unless the configuration says otherwise."""
SQUEEZENET = "squeezenet1_1"
"""The one stem of `hybrid` that is torchvision's; timm has none of the kind."""
_NORM_AFTER_POOLING = ("eva_giant_patch14_", "eva02_", "beit3_")
"""Beginnings of the names of models with CLS whose last norm is behind the pooling in timm."""
Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder, and where its first weights come from."""

    name: str = "deit3_small_patch16_224"
    """Any timm vision transformer; `hybrid`: the model that `encoder.stem` names, read at several
    depths, under a short vision transformer; `conv-vit`: a small convolutional stem, to be trained
    from scratch. `squeezenet-vit` is the earlier name of `hybrid` on `squeezenet1_1`."""
    stem: str = ""
    """Of `hybrid`: any timm model that `features_only` can take apart (ResNet, ConvNeXt, Swin,
    EfficientNet, ViT), or `squeezenet1_1`."""
    levels: tuple[str, ...] = ()
    """Of `hybrid`: names of the depths that are read, as in timm's `feature_info` (`blocks.4`,
    `stages.2`); empty: all of them."""
    weights: str = ""
    """Empty: random. A file (.safetensors, .pth; .npz with torchvision's names for SqueezeNet),
    `timm` for the named model's weights from the hub, or the name of an installed package of
    weights (docs/training.md). With `hybrid` they are those of its stem."""
    normalize: Literal["model", "imagenet", "half", "clip"] | tuple[Triple, Triple] = "model"
    """Means and deviations pixels are normalised with. `model`: the named model's own, from timm's
    `pretrained_cfg`; `imagenet`; `half`: .5 and .5; `clip`; or two triples of RGB in [0, 1]."""
    final_norm: bool = True
    """Whether CLS and patches pass the last norm where timm puts it behind the pooling (EVA,
    EVA-02). Models and runs of versions without this field keep theirs unnormalised."""
    width: int | None = None
    """Token width; None: as the timm model is named, 192 otherwise."""
    depth: int | None = None
    """Transformer layers; None: as the timm model is named, 3 otherwise."""
    heads: int | None = None
    """Attention heads; None: as the timm model is named, 3 otherwise."""
    patch: int | None = None
    """Patch side in pixels; None: as the timm model is named, 16 otherwise. SqueezeNet's cells can
    have 16 or 32; those of other `hybrid` stems as many as their last level or a multiple."""
    drop_path: float = 0.0
    """Stochastic depth while training: share of crops for which the last block is left out; earlier
    blocks less, evenly down to 0 at the first. .1 to .2 where few images train a large ViT."""
    frozen: int = 0
    """How much of a `hybrid` stem keeps its weights: so many of its levels, first to last (of
    SqueezeNet's 13 modules). What all of them give can be kept (`runtime.cells`)."""

    def __post_init__(self) -> None:
        check_bounds(
            "encoder",
            self,
            least={"width": 1, "depth": 1, "heads": 1, "patch": 1, "frozen": 0},
            most={"width": 16384, "depth": 1024, "heads": 1024, "patch": 1024, "frozen": 1024},
        )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"encoder.drop_path must lie in [0, 1), got {self.drop_path}")
        self._check_stem()
        self._check_normalize()
        width, heads = self.token_width, self.heads or (STEM_HEADS if self.has_stem else None)
        if width is not None and heads is not None and width % heads:
            raise ValueError(
                f"encoder.heads is {heads}, which does not divide encoder.width = {width}; set "
                f"encoder.width to a multiple of {heads}"
            )
        if self.has_stem and (self.width or STEM_WIDTH) % 4:
            raise ValueError(
                f"encoder.width is {self.width}, and the positions of {self.name} are sines and "
                "cosines along two axes; set it to a multiple of 4"
            )

    def _check_stem(self) -> None:
        if (self.name == "hybrid") != bool(self.stem):
            raise ValueError(
                f"encoder.name = {self.name!r} and encoder.stem = {self.stem!r} do not fit; "
                "`hybrid` needs a stem (resnet18, say, or squeezenet1_1), and no other encoder "
                "takes one"
            )
        if self.levels and (self.name != "hybrid" or self.stem == SQUEEZENET):
            raise ValueError(
                "encoder.levels is for encoder.name = 'hybrid' on a timm model; leave it empty"
            )

    def _check_normalize(self) -> None:
        if isinstance(self.normalize, str):
            return
        mean, std = self.normalize
        if not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(
                f"encoder.normalize is {self.normalize}; it must be means and deviations of three "
                "channels, finite numbers, deviations above 0"
            )
        if max(mean) > 1 or min(mean) < 0:
            raise ValueError(
                f"encoder.normalize is {self.normalize}; pixels are in [0, 1] before they are "
                "normalised, and so are their means: divide both triples by 255 where they are of "
                "pixels from 0 to 255"
            )

    @property
    def has_stem(self) -> bool:
        """Whether its tokens are a stem's cells, with a few blocks of ours above them."""
        return self.name in ("hybrid", "squeezenet-vit", "conv-vit")

    @property
    def is_squeezenet(self) -> bool:
        """Whether its stem is torchvision's SqueezeNet, under either name."""
        return self.name == "squeezenet-vit" or self.stem == SQUEEZENET

    @property
    def timm_name(self) -> str | None:
        """The timm model whose weights it takes; None if it has none."""
        if self.is_squeezenet or self.name == "conv-vit":
            return None
        return self.stem or self.name

    @property
    def token_width(self) -> int | None:
        """Width of the tokens, where it is known without asking timm."""
        return self.width or (STEM_WIDTH if self.has_stem else None)


def encoder_as_written(config: EncoderConfig, table: Mapping[str, object]) -> EncoderConfig:
    """An encoder read from a file of any version: fields it did not have mean what they did.

    Args:
        config: As parsed, with today's defaults.
        table: What the file says.
    """
    is_concerned = config.name.startswith(_NORM_AFTER_POOLING) and "clip" not in config.name
    if is_concerned and "final_norm" not in table:
        return replace(config, final_norm=False)
    return config


class Encoder(nn.Module):
    """What student and teacher see with; subclasses fill in `tokens` and `layers`."""

    width: int

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens after the final norm; CLS first, patches in reading order."""
        raise TypeError(f"{type(self).__name__} is abstract; use make_encoder")

    def tokens_and_summary(
        self, pixels: PixelsOrFeatures
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n f"] | None]:
        """Tokens, and `summary` numbers of each crop as a whole if a pretrained stem has any."""
        return self.tokens(pixels), None

    @property
    def summary(self) -> int:
        """Numbers that a stem knows of a crop as a whole; 0 without one."""
        return 0

    def layers(self) -> Sequence[nn.Module]:
        """The transformer blocks, first to last."""
        raise TypeError(f"{type(self).__name__} is abstract; use make_encoder")

    def attentions(self) -> Sequence[nn.Module]:
        """The attention modules of all layers, first to last."""
        return [layer.attn for layer in self.layers()]  # type: ignore[misc]

    @property
    def prefix(self) -> int:
        """How many tokens stand before the patches inside the layers (CLS and registers)."""
        return 1

    @property
    def has_cls(self) -> bool:
        """Whether the layers have a CLS token; without one saliency is pooled attention."""
        return True

    def cls_attention(self, pixels: PixelsOrFeatures, *, layers: int) -> Float[Tensor, "n g g"]:
        """CLS -> patch attention, mean over heads and the last `layers` layers.

        In a model without CLS it is pooled attention: the mean over all patches of where they look.

        Returns:
            Non-negative maps over the g x g patch tokens, float32; register tokens are left out.

        Source: [Local Manifold Learning, 2024], saliency; the mean over heads is ours.
        """
        modules = self.attentions()
        if layers > len(modules):
            raise ConfigError(
                f"saliency.layers is {layers}, but the encoder has {len(modules)} layers; "
                f"set saliency.layers to at most {len(modules)}"
            )
        with fused_attention(modules), ClsAttentionRecorder(pooled=not self.has_cls) as seen:
            self.tokens(pixels)
        patches = torch.stack(seen.rows[-layers:]).mean(dim=0)[:, self.prefix :]
        grid = round(patches.shape[1] ** 0.5)
        return patches.reshape(-1, grid, grid)
