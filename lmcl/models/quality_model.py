"""The student: an encoder, the attention-panel decoder and the quality head.

The teacher is a copy of the same module (lmcl/method/teacher.py). Scores are in [0, 1] units of the
training set's own range, higher = better; nothing squashes them, so they may leave that range.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from lmcl.errors import ConfigError
from lmcl.models.encoder import Encoder, EncoderConfig
from lmcl.models.factory import make_encoder
from lmcl.models.set_scales import SetScales
from lmcl.models.stem import PixelsOrFeatures, at_least_float32
from lmcl.models.vit import TimmEncoder
from lmcl.utils.validators import check_bounds

_MIDDLE = 0.5
"""What the panel says before it has learned anything: the middle of the scale [ours]."""
_SLIGHT = 0.12
"""Damage below this, in [0, 1] units, takes nothing off: a photograph as it came from its camera is
judged as without the head (decision 0019)."""
_DOUBT = -1.5
"""Bias of a damage head that has not learned yet: its softplus is about .2."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The attention-panel decoder."""

    queries: int = 6
    """Learned queries added to CLS [family]: the panel's members."""
    heads: int = 6
    """Attention heads of the decoder layer; must divide the encoder's width."""
    direct: int = 0
    """Hidden width of a perceptron that scores a crop from what a pretrained stem knows of it as a
    whole, beside the panel and past the transformer; a score is the mean of both (decision 0016).
    0: the panel alone. `hybrid` encoders only."""
    bins: int = 0
    """0: the head says a score. 2 or more: a distribution over so many equal ranges of [0, 1],
    whose mean is the score and whose deviation is predicted too; 10 to 20 are usual."""
    damage: int = 0
    """Hidden width of a head that takes off every score what somebody did to the picture: noise,
    blocks, lost levels; from what a pretrained stem knows of a crop as a whole (decision 0019).
    `make starter` teaches it on damaged copies; training goes on with it. 0: none. `hybrid`
    encoders only."""

    def __post_init__(self) -> None:
        check_bounds(
            "decoder",
            self,
            least={"queries": 1, "heads": 1, "direct": 0, "bins": 0, "damage": 0},
            most={"queries": 4096, "heads": 1024, "direct": 16384, "bins": 1024, "damage": 16384},
        )
        if self.bins == 1:
            raise ValueError("decoder.bins = 1 is no distribution; set 0, or 2 or more")
        if self.bins and self.direct:
            raise ValueError(
                f"decoder.bins = {self.bins} makes the panel say a distribution, and "
                f"decoder.direct = {self.direct} puts a second score beside it; set one of them "
                "to 0"
            )
        if self.bins and self.damage:
            raise ValueError(
                f"decoder.bins = {self.bins} makes the panel say a distribution, and "
                f"decoder.damage = {self.damage} takes a number off a score; set one of them to 0"
            )


def check_heads(decoder: DecoderConfig, width: int) -> None:
    """Refuse a decoder whose heads do not share the encoder's width evenly.

    Raises:
        ValueError: Names both.
    """
    if width % decoder.heads:
        raise ValueError(
            f"decoder.heads is {decoder.heads}, and the encoder's tokens are {width} wide; set it "
            f"to a divisor of {width}"
        )


class StudentOutput(NamedTuple):
    """What one forward pass says about every crop."""

    embedding: Float[Tensor, "n d"]
    """Unit-length CLS embeddings, float32."""
    score: Float[Tensor, " n"]
    """Quality in [0, 1] units, higher = better, float32."""
    readouts: Float[Tensor, "n r"] | None = None
    """What `score` is the mean of, where more than the panel judges (`decoder.direct`)."""
    logits: Float[Tensor, "n k"] | None = None
    """Of the distribution whose mean the score is; None of a head that says a score."""

    @property
    def deviation(self) -> Float[Tensor, " n"] | None:
        """Of each crop's distribution, in [0, 1] units; None of a head that says a score."""
        if self.logits is None:
            return None
        apart = _centres(self.logits) - self.score[:, None]
        return (self.logits.softmax(dim=-1) * apart.square()).sum(dim=-1).sqrt()


class QualityModel(nn.Module):
    """Encoder + attention panel + head (method.md, step 4).

    Args:
        encoder: Encoder configuration.
        decoder: Decoder configuration.
        crop_size: Side of the crops in pixels.
        view_size: Side of the whole-image view in pixels.
        sets: How many sets it learns from, if several.
    """

    def __init__(
        self,
        encoder: EncoderConfig,
        decoder: DecoderConfig,
        *,
        crop_size: int,
        view_size: int,
        sets: int = 0,
    ) -> None:
        super().__init__()
        self.encoder: Encoder = make_encoder(encoder, sizes=(crop_size, view_size))
        try:
            check_heads(decoder, self.encoder.width)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self.panel = AttentionPanel(self.encoder.width, decoder)
        self.direct = self._reads_summary("direct", decoder.direct)
        self.damage = self._reads_summary("damage", decoder.damage)
        self.scales = SetScales(sets) if sets > 1 else None
        self.answers_for: int | None = None
        """Number of the set whose scale all scores are on; None: the shared scale."""

    def forward(
        self, pixels: PixelsOrFeatures, sets: Int64[Tensor, " n"] | None = None
    ) -> StudentOutput:
        """Embeddings and scores of crops; both leave autocast in float32.

        Args:
            pixels: Crops.
            sets: Number of each one's set, whose scale its score is to be on; None: the shared one,
                or that of `answers_for`.
        """
        tokens, summary = self.encoder.tokens_and_summary(pixels)
        embedding = functional.normalize(at_least_float32(tokens[:, 0]), dim=-1)
        votes = self.panel(tokens)
        if self.panel.bins:
            mean = (votes.softmax(dim=-1) * _centres(votes)).sum(dim=-1)
            return StudentOutput(embedding, mean, logits=votes)
        base: Tensor | float = _MIDDLE
        with torch.autocast(tokens.device.type, enabled=False):
            if self.damage is not None and summary is not None:
                base = base - taken_off(self.damage, at_least_float32(summary))
            score = self._on_scale(base + votes[:, 0], sets)
            if self.direct is None or summary is None:
                return StudentOutput(embedding, score)
            direct = base + self.direct(at_least_float32(summary))[:, 0]
        readouts = torch.stack([score, self._on_scale(direct, sets)], dim=1)
        return StudentOutput(embedding, readouts.mean(dim=1), readouts)

    def _reads_summary(self, name: str, hidden: int) -> nn.Sequential | None:
        """The head of this name, from what a stem knows of a crop as a whole; None without width.

        Raises:
            ConfigError: If the encoder knows no such thing.
        """
        if not hidden:
            return None
        if not self.encoder.summary:
            raise ConfigError(
                f"decoder.{name} = {hidden} reads what a pretrained stem knows of a crop as a "
                "whole, and this encoder has none; take encoder.name = 'hybrid', or set "
                f"decoder.{name} = 0"
            )
        make = make_damage_head if name == "damage" else _make_direct
        return make(self.encoder.summary, hidden)

    def _on_scale(
        self, score: Float[Tensor, " n"], sets: Int64[Tensor, " n"] | None
    ) -> Float[Tensor, " n"]:
        """Shared scores on the scale that is asked for."""
        if self.scales is None or (sets is None and self.answers_for is None):
            return score
        if sets is None:
            sets = torch.full_like(score, self.answers_for or 0, dtype=torch.int64)
        found: Tensor = self.scales(score, sets)
        return found


def _make_direct(summary: int, hidden: int) -> nn.Sequential:
    """Perceptron from what a stem knows of a crop as a whole to its score."""
    first, last = nn.Linear(summary, hidden), nn.Linear(hidden, 1, bias=False)
    nn.init.normal_(first.weight, std=summary**-0.5)
    # As the panel's head: it begins by saying the middle of the scale.
    nn.init.normal_(last.weight, std=0.01)
    return nn.Sequential(first, nn.GELU(), last)


def make_damage_head(summary: int, hidden: int) -> nn.Sequential:
    """Perceptron from what a stem knows of a crop as a whole to its damage, before a softplus.

    Args:
        summary: Numbers that the stem knows of a crop.
        hidden: Hidden width.

    Source: ours (decision 0019).
    """
    first, last = nn.Linear(summary, hidden), nn.Linear(hidden, 1)
    nn.init.normal_(first.weight, std=summary**-0.5)
    # Wide enough not to settle on saying nothing (decision 0019).
    nn.init.normal_(last.weight, std=hidden**-0.5)
    nn.init.constant_(last.bias, _DOUBT)
    return nn.Sequential(first, nn.GELU(), last)


def taken_off(head: nn.Sequential, summary: Float[Tensor, "n f"]) -> Float[Tensor, " n"]:
    """What damage takes off each crop's score: 0 or more, in [0, 1] units.

    Args:
        head: Of `make_damage_head`.
        summary: What the stem knows of each crop as a whole.
    """
    return functional.relu(functional.softplus(head(summary)[:, 0]) - _SLIGHT)


class AttentionPanel(nn.Module):
    """Queries = learned members + CLS; they consult the patches and vote; the mean is the score.

    Source: [DEIQT, 2023], attention-panel decoder; head without bias as in the family's code.
    """

    def __init__(self, width: int, config: DecoderConfig) -> None:
        super().__init__()
        self.members = nn.Parameter(torch.randn(1, config.queries, width) * 0.02)
        self.layer = nn.TransformerDecoderLayer(
            width,
            config.heads,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.norm = nn.LayerNorm(width)
        self.bins = config.bins
        self.head = nn.Linear(width, config.bins or 1, bias=False)
        self.use_math_attention = False
        # Votes that start far apart cost the first hundred steps (decision 0006).
        nn.init.normal_(self.head.weight, std=0.01)

    def forward(self, tokens: Float[Tensor, "n t d"]) -> Float[Tensor, "n k"]:
        """The members' mean vote on each crop from its tokens, CLS first: a number, or logits."""
        queries = self.members + tokens[:, :1]
        with sdpa_kernel(SDPBackend.MATH) if self.use_math_attention else nullcontext():
            opinions = self.norm(self.layer(queries, tokens[:, 1:]))
        with torch.autocast(tokens.device.type, enabled=False):
            votes = self.head(at_least_float32(opinions))
        return votes.mean(dim=1)  # type: ignore[no-any-return]


def _centres(logits: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
    """Middles of the ranges of a distribution, in [0, 1]."""
    bins = logits.shape[-1]
    return (torch.arange(bins, device=logits.device, dtype=logits.dtype) + 0.5) / bins


def select_attention_impl(
    model: QualityModel, device: torch.device, precision: torch.dtype
) -> None:
    """Spell attention out in half precision on a CPU, else keep it fused; same up to rounding.

    PyTorch's fused backward pass on a CPU takes 2.7 times as long in bfloat16; in float32 it is the
    faster one and keeps no attention maps (decision 0006).
    """
    is_spelled_out = device.type == "cpu" and precision != torch.float32
    model.panel.use_math_attention = is_spelled_out
    for attention in model.encoder.attentions():
        attention.fused_attn = not is_spelled_out  # type: ignore[assignment]


def to_bfloat16(model: QualityModel, device: torch.device) -> None:
    """For scoring: the weights of a timm encoder, and all between them, in bfloat16.

    On a CPU a tenth faster than autocast, which casts weights and norms in every pass (decision
    0406). Other encoders are left to autocast; the panel always is.
    """
    select_attention_impl(model, device, torch.bfloat16)
    if isinstance(model.encoder, TimmEncoder):
        model.encoder.bfloat16()


def enable_gradient_checkpointing(encoder: Encoder) -> None:
    """Gradient checkpointing: the backward pass runs each transformer block forward once more.

    The convolutional stem is left alone: its batch norms would count every batch twice.

    Source: [Chen, Xu, Zhang, Guestrin, 2016], "Training Deep Nets with Sublinear Memory Cost".
    """
    for block in encoder.layers():
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
