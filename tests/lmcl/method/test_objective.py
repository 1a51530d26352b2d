from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from lmcl.method.objective import ObjectiveConfig, Terms, objective
from lmcl.models.quality_model import StudentOutput

IMAGES, RANDOM, WIDTH = 3, 4, 8
CONFIG = ObjectiveConfig(backend="dense")


def output(views: int = RANDOM + 1, *, seed: int = 0) -> StudentOutput:
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(IMAGES * views, WIDTH, generator=generator)
    score = torch.rand(IMAGES * views, generator=generator)
    embedding = functional.normalize(raw, dim=-1).requires_grad_()
    return StudentOutput(embedding, score.requires_grad_())


def terms(out: StudentOutput, config: ObjectiveConfig = CONFIG, *, images: int = IMAGES) -> Terms:
    return objective(
        out,
        torch.tensor([0.1, 0.5, 0.9]),
        torch.tensor([7, 3, 5]),
        config,
        images=images,
        random=RANDOM,
        overlap=None,
        keys=None,
        rank_share=1.0,
    )


def by_hand(out: StudentOutput, *, temperature: float = 0.1) -> float:
    """method.md section 2 in plain loops, float64."""
    crops = out.embedding.detach().double().unflatten(0, (IMAGES, -1))
    rows, hubs = crops[:, :RANDOM].flatten(0, 1), crops[:, RANDOM]
    losses = []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        logits = torch.stack([rows[i] @ rows[j] / temperature for j in others])
        losses.append(torch.logsumexp(logits, 0) - rows[i] @ hubs[i // RANDOM] / temperature)
    return float(torch.stack(losses).mean())


def test_the_contrastive_term_is_the_papers() -> None:
    out = output()
    assert float(terms(out).contrastive) == pytest.approx(by_hand(out), rel=1e-5)


def test_l1_counts_random_crops_only() -> None:
    out = output()
    scores = out.score.detach().unflatten(0, (IMAGES, -1))[:, :RANDOM]
    expected = (scores - torch.tensor([[0.1], [0.5], [0.9]])).abs().mean()
    assert float(terms(out).l1) == pytest.approx(float(expected), rel=1e-6)


def test_the_terms_are_mixed_by_the_contrastive_weight() -> None:
    found = terms(output(), replace(CONFIG, contrastive_weight=0.25))
    expected = 0.75 * float(found.l1) + 0.25 * float(found.contrastive)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_without_the_contrastive_term_no_hub_is_needed() -> None:
    found = terms(output(RANDOM), replace(CONFIG, contrastive_weight=0.0))
    assert float(found.loss.detach()) == pytest.approx(float(found.l1))
    assert float(found.contrastive) == 0


def test_padding_counts_in_neither_term_and_gets_no_gradient() -> None:
    out = output()
    found = terms(out, images=2)
    found.loss.backward()
    padding = slice(2 * (RANDOM + 1), 3 * (RANDOM + 1))
    assert out.embedding.grad is not None
    assert out.embedding.grad[padding].abs().max() == 0
    assert out.score.grad is not None
    assert out.score.grad[padding].abs().max() == 0


def test_a_batch_of_nothing_but_padding_has_a_graph_and_no_gradient() -> None:
    out = output()
    found = terms(out, images=0)
    found.loss.backward()
    assert out.score.grad is not None
    assert out.score.grad.abs().max() == 0
    assert torch.isfinite(found.loss)


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"contrastive_weight": 1.5}, "contrastive_weight"), ({"temperature": 0.0}, "temperature")],
)
def test_impossible_weights_are_refused(changes: dict[str, float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ObjectiveConfig(**changes)
