import torch

from lmcl.models.quality_model import taken_off
from lmcl.training.damage import DROPS, DamageExamples, fit_damage_head, join_examples, wanted_drop


def _examples(seed: int = 0) -> DamageExamples:
    """Copies that differ from photographs in one of 24 numbers, by how much they are damaged."""
    draw = torch.Generator().manual_seed(seed)
    unhurt = torch.randn(400, 24, generator=draw)
    wanted = torch.rand(400, generator=draw) * 0.5 + 0.1
    copies = torch.randn(400, 24, generator=draw)
    copies[:, 3] = 4 + 8 * wanted
    return join_examples(copies, wanted, unhurt)


def test_a_damage_head_spares_photographs_it_has_not_seen_and_orders_damage() -> None:
    head = fit_damage_head(_examples(), hidden=8, seed=0)
    unseen = _examples(seed=1)
    found = taken_off(head, unseen.summary)
    copies = unseen.wanted > 0
    assert float(found[~copies].mean()) < 0.01
    assert float(found[copies].mean()) > 0.05
    ranks = torch.stack([found[copies], unseen.wanted[copies]]).argsort(dim=1).argsort(dim=1)
    assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.9


def test_the_same_seed_gives_the_same_head_and_leaves_the_callers_numbers_alone() -> None:
    state = torch.random.get_rng_state()
    one, two = (fit_damage_head(_examples(), hidden=4, seed=2) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    other = fit_damage_head(_examples(), hidden=4, seed=3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert not torch.equal(one[0].weight, other[0].weight)


def test_only_what_the_model_does_not_see_by_itself_is_wanted() -> None:
    level = torch.tensor([0, 1, 2, 3, 4, 5])
    undamaged = torch.full((6,), 0.8, dtype=torch.float64)
    score = torch.tensor([0.8, 0.8, 0.55, 0.4, 0.5, 0.1], dtype=torch.float64)
    found = wanted_drop(score, undamaged, level)
    expected = torch.tensor([0, 0.08, 0, 0, 0.18, 0], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert len(DROPS) == 6
