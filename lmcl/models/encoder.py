"""Crops become tokens: any timm ViT by name, or a convolutional stem under a few ViT blocks.

Every encoder gives CLS first and then the patch tokens of a square map, after its final norm, and
can say where CLS looked in its last layers. Attention weights are computed only when asked for:
the training forward keeps the fused attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmcl.errors import ConfigError
from lmcl.models.attention import ClsAttentionRecorder, fused_attention
from lmcl.models.stem import PixelsOrFeatures
from lmcl.utils.validators import check_bounds

STEM_WIDTH, STEM_HEADS = 192, 3
"""Of the blocks above a convolutional stem, unless the configuration says otherwise."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Which encoder, and where its first weights come from."""

    name: str = "deit3_small_patch16_224"
    """Any timm vision transformer, `squeezenet-vit` (ImageNet SqueezeNet 1.1 convolutions, read at
    three depths, as the patch embedding) or `conv-vit` (a small convolutional stem, to be trained
    from scratch)."""
    weights: str = ""
    """Empty: random. A file (.safetensors, .pth; .npz with torchvision's names for the SqueezeNet
    part), or `timm` for the named model's weights from the hub."""
    width: int | None = None
    """Token width; None: as the timm model is named, 192 otherwise."""
    depth: int | None = None
    """Transformer layers; None: as the timm model is named, 3 otherwise."""
    heads: int | None = None
    """Attention heads; None: as the timm model is named, 3 otherwise."""
    patch: int | None = None
    """Patch side in pixels; None: as the timm model is named, 16 otherwise. `squeezenet-vit` can
    have 16 or 32."""
    frozen: int = 0
    """How many of the stem's first modules keep their weights (`squeezenet-vit` only); all 13 of
    them can be run once and kept (`runtime.cells`)."""

    def __post_init__(self) -> None:
        check_bounds(
            "encoder",
            self,
            least={"width": 1, "depth": 1, "heads": 1, "patch": 1, "frozen": 0},
            most={"width": 16384, "depth": 1024, "heads": 1024, "patch": 1024, "frozen": 1024},
        )
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

    @property
    def has_stem(self) -> bool:
        """Whether convolutions make its tokens, rather than a timm model."""
        return self.name in ("squeezenet-vit", "conv-vit")

    @property
    def token_width(self) -> int | None:
        """Width of the tokens, where it is known without asking timm."""
        return self.width or (STEM_WIDTH if self.has_stem else None)


class Encoder(nn.Module):
    """What student and teacher see with; subclasses fill in `tokens` and `layers`."""

    width: int

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens after the final norm; CLS first, patches in reading order."""
        raise TypeError(f"{type(self).__name__} is abstract; use make_encoder")

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

    def cls_attention(self, pixels: PixelsOrFeatures, *, layers: int) -> Float[Tensor, "n g g"]:
        """CLS -> patch attention, mean over heads and the last `layers` layers.

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
        with fused_attention(modules), ClsAttentionRecorder() as seen:
            self.tokens(pixels)
        patches = torch.stack(seen.rows[-layers:]).mean(dim=0)[:, self.prefix :]
        grid = round(patches.shape[1] ** 0.5)
        return patches.reshape(-1, grid, grid)
