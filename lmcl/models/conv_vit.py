"""Hybrid encoder: a stem, convolutional or pretrained, under a short vision transformer."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lmcl.models.encoder import STEM_HEADS, STEM_WIDTH, Encoder, EncoderConfig
from lmcl.models.stem import Cells, LevelStem, PixelsOrFeatures

_BRANCH_SCALE = 0.1
"""LayerScale of the blocks above a stem: they start close to passing the stem's features on, which
is what little data can use at once (docs/decisions/0006)."""


class ConvVit(Encoder):
    """A stem whose cells are the patches of a short vision transformer.

    Positions are fixed two-dimensional sines, so any crop size can be used.
    """

    def __init__(self, stem: LevelStem | Cells, config: EncoderConfig) -> None:
        super().__init__()
        self.width = config.width or STEM_WIDTH
        self.stem = stem
        self.project = nn.Linear(stem.channels, self.width)
        self.about = (
            nn.Sequential(
                nn.Linear(stem.summary, stem.summary_hidden),
                nn.GELU(),
                nn.Linear(stem.summary_hidden, self.width),
            )
            if isinstance(stem, LevelStem)
            else None
        )
        self.cls = nn.Parameter(torch.randn(1, 1, self.width) * 0.02)
        # Sines of full size would drown the features at first; where a crop lies matters little.
        self.position_scale = nn.Parameter(torch.full((1,), 0.1))
        depth = config.depth or 3
        self.blocks = nn.ModuleList(
            Block(
                self.width,
                config.heads or STEM_HEADS,
                qkv_bias=True,
                init_values=_BRANCH_SCALE,
                drop_path=config.drop_path * block / max(depth - 1, 1),
            )
            for block in range(depth)
        )
        self.norm = nn.LayerNorm(self.width)

    @property
    def summary(self) -> int:
        """Numbers that its stem knows of a crop as a whole."""
        return self.stem.summary

    def tokens(self, pixels: PixelsOrFeatures) -> Float[Tensor, "n t d"]:
        """CLS and patch tokens."""
        return self.tokens_and_summary(pixels)[0]

    def tokens_and_summary(
        self, pixels: PixelsOrFeatures
    ) -> tuple[Float[Tensor, "n t d"], Float[Tensor, "n f"] | None]:
        """CLS and patch tokens, and what the stem knows of each crop as a whole, if it does."""
        cells, whole = self.stem(pixels)
        patches = self.project(cells)
        grid = round(patches.shape[1] ** 0.5)
        patches = patches + self.position_scale * _positions(grid, self.width, patches)
        # CLS starts with what is known of the crop: it is about this crop from the first step.
        about = self.about(whole)[:, None] if self.about else patches.mean(dim=1, keepdim=True)
        cls = self.cls.to(patches.dtype) + about
        out = torch.cat([cls, patches], dim=1)
        for block in self.blocks:
            out = block(out)
        return self.norm(out), whole

    def layers(self) -> Sequence[nn.Module]:
        """The blocks above the stem."""
        return list(self.blocks)


def _positions(grid: int, width: int, like: Tensor) -> Float[Tensor, "t d"]:
    table: Tensor = build_sincos2d_pos_embed(
        [grid, grid], dim=width, interleave_sin_cos=True, device=like.device, dtype=torch.float32
    )
    found: Tensor = table.to(like.dtype)
    return found
