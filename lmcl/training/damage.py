"""Damage head: learn from damaged copies what noise, blocks or lost levels take off a score.

Photographs that people scored are seldom damaged on purpose, so a model knows little of what
impulse noise or coarse quantisation do. Copies in the train part teach it and cost .02 of SRCC on
photographs nobody damaged; a head beside a finished model, which has to leave those alone, costs a
tenth of that (docs/decisions/0019).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from lmcl.models.quality_model import make_damage_head

DROPS = (0.0, 0.08, 0.2, 0.33, 0.48, 0.6)
"""How far below its photograph a copy of level 0 (itself) to 5 is wanted, in [0, 1] units [ours].
"""
_UNHURT_WEIGHT = 10.0
"""Of a photograph as it came against a copy: a head that hurts those is worse than none."""
_DROPOUT = 0.2
_STEPS = 3000
_BATCH = 256
_RATE = 3e-3
_QUIET = -3.0
"""Bias that the fit starts from: nearly nothing is taken off. From -1.5 it loses twice as much
order among photographs as they came (decision 0019)."""
_CORNER = 0.05
"""Of the Huber loss, in [0, 1] units."""


@dataclass(frozen=True, kw_only=True)
class DamageExamples:
    """What a damage head learns from: crops of photographs and of damaged copies of some."""

    summary: Float[Tensor, "n f"]
    """What the stem knows of each crop as a whole."""
    wanted: Float[Tensor, " n"]
    """What is to be taken off its score, in [0, 1] units; 0 of a photograph as it came."""
    weight: Float[Tensor, " n"]
    """How much it counts."""


def wanted_drop(
    score: Float[Tensor, " n"], undamaged: Float[Tensor, " n"], level: Int64[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """What is missing from a model's own drop on damaged copies: 0 or more, in [0, 1] units.

    Args:
        score: The model's scores of the copies.
        undamaged: Its scores of the same crops of the photographs they are copies of.
        level: 0 (the photograph itself) to 5.
    """
    drops = torch.tensor(DROPS, dtype=score.dtype)[level]
    return functional.relu(score - (undamaged - drops)) * (level > 0)


def join_examples(
    copies: Float[Tensor, "n f"], wanted: Float[Tensor, " n"], unhurt: Float[Tensor, "m f"]
) -> DamageExamples:
    """Copies with what is to be taken off them, and photographs that are to keep their scores."""
    return DamageExamples(
        summary=torch.cat([copies, unhurt]),
        wanted=torch.cat([wanted, torch.zeros(len(unhurt))]),
        weight=torch.cat([torch.ones(len(wanted)), torch.full((len(unhurt),), _UNHURT_WEIGHT)]),
    )


def fit_damage_head(examples: DamageExamples, *, hidden: int, seed: int) -> nn.Sequential:
    """A damage head that has learned; the same examples and seed give the same weights.

    Args:
        examples: At least one.
        hidden: Hidden width.
        seed: Of the first weights, the order of examples and the dropout.

    Source: ours (decision 0019).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = make_damage_head(examples.summary.shape[1], hidden)
        last = head[2]
        assert isinstance(last, nn.Linear)
        nn.init.constant_(last.bias, _QUIET)
        optimizer = torch.optim.AdamW(head.parameters(), lr=_RATE, weight_decay=1e-2)
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
        for _ in range(_STEPS):
            at = torch.randint(len(examples.wanted), (_BATCH,))
            weight = examples.weight[at]
            shown = functional.dropout(examples.summary[at], _DROPOUT)
            # Not `taken_off`: below what counts as slight it has no slope.
            said = functional.softplus(head(shown)[:, 0])
            cost = functional.smooth_l1_loss(
                said, examples.wanted[at], beta=_CORNER, reduction="none"
            )
            optimizer.zero_grad()
            torch.autograd.backward((cost * weight).sum() / weight.sum())
            optimizer.step()
            rate.step()
    return head.requires_grad_(False).eval()
