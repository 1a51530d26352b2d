"""PLCC and rank losses: by hand, at their edges, and the same whatever the number of ranks."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from lmcl.method import batch_losses
from lmcl.method.batch_losses import fidelity_loss, gather_images, margin_loss, plcc_loss
from pipeline.sampler import images_by_rank

SCORE = torch.tensor([0.3, 0.1, 0.8, 0.55, 0.4], dtype=torch.float64)
MOS = torch.tensor([0.2, 0.3, 0.9, 0.5, 0.5], dtype=torch.float64)


def fidelity(score: torch.Tensor, mos: torch.Tensor) -> torch.Tensor:
    return fidelity_loss(score, mos, scale=0.2)


def margin(score: torch.Tensor, mos: torch.Tensor) -> torch.Tensor:
    return margin_loss(score, mos, scale=0.2)


def test_the_plcc_loss_is_half_of_what_pearsons_r_lacks() -> None:
    r = stats.pearsonr(SCORE.numpy(), MOS.numpy()).statistic
    assert float(plcc_loss(SCORE, MOS)) == pytest.approx((1 - r) / 2, rel=1e-12)
    assert float(plcc_loss(2 * MOS + 1, MOS)) == pytest.approx(0, abs=1e-12)


def test_the_fidelity_loss_is_that_of_thurstones_probabilities() -> None:
    costs = []
    for i in range(5):
        for j in range(i + 1, 5):
            p, q = (stats.norm.cdf(float(v[i] - v[j]) / (math.sqrt(2) * 0.2)) for v in (MOS, SCORE))
            costs.append(1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q)))
    assert float(fidelity(SCORE, MOS)) == pytest.approx(np.mean(costs), abs=1e-6)
    assert float(fidelity(MOS + 0.3, MOS)) == pytest.approx(0, abs=1e-6)


def test_the_margin_loss_is_over_pairs_of_unequal_labels() -> None:
    pairs = [(i, j) for i in range(5) for j in range(5) if MOS[i] > MOS[j]]
    costs = [max(0.0, 0.2 - float(SCORE[i] - SCORE[j])) for i, j in pairs]
    assert float(margin(SCORE, MOS)) == pytest.approx(np.mean(costs), rel=1e-12)


@pytest.mark.parametrize("loss", [plcc_loss, fidelity, margin])
@pytest.mark.parametrize(
    ("score", "mos"),
    [([0.5, 0.5, 0.5], [0.1, 0.2, 0.3]), ([0.1, 0.2, 0.3], [0.5] * 3), ([0.4], [0.1]), ([], [])],
    ids=["equal-scores", "equal-labels", "one", "none"],
)
def test_where_nothing_can_be_compared_the_gradient_is_finite(
    loss: Callable[..., torch.Tensor], score: list[float], mos: list[float]
) -> None:
    values = torch.tensor(score, dtype=torch.float64, requires_grad=True)
    found = loss(values, torch.tensor(mos, dtype=torch.float64))
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(values.grad).all()


@pytest.mark.parametrize("loss", [plcc_loss, fidelity, margin])
@pytest.mark.parametrize("images", [5, 6, 7])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_value_and_gradient_are_the_same_bits_on_any_number_of_ranks(
    monkeypatch: pytest.MonkeyPatch, loss: Callable[..., torch.Tensor], images: int, world: int
) -> None:
    generator = torch.Generator().manual_seed(images)
    scores = torch.rand(images, 3, generator=generator)
    mos = torch.rand(images, generator=generator)
    alone = scores.clone().requires_grad_()
    truth = loss(*gather_images(alone, mos, (images,)))
    truth.backward()
    counts = images_by_rank(images, world)
    tables = [
        torch.stack([scores[rank::world].double().mean(dim=1), mos[rank::world].double()], dim=1)
        for rank in range(world)
    ]
    for rank in range(world):
        first = sum(counts[:rank])
        monkeypatch.setattr(
            batch_losses,
            "gather_of_all_ranks",
            lambda local, told, first=first: (torch.cat(tables), first),
        )
        own = scores[rank::world].clone().requires_grad_()
        found = loss(*gather_images(own, mos[rank::world], counts))
        found.backward()
        assert torch.equal(found, truth)
        assert torch.equal(own.grad, alone.grad[rank::world])
