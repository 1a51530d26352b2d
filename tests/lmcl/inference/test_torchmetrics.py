import pytest
import torch

torchmetrics = pytest.importorskip("torchmetrics")


def test_the_metric_is_the_mean_score_and_lives_in_a_collection(scorer) -> None:
    from lmcl.inference.torchmetrics import ImageQuality

    batches = torch.randint(0, 256, (2, 3, 3, 70, 80), dtype=torch.uint8)
    together = torchmetrics.MetricCollection({"quality": ImageQuality(scorer)})
    for batch in batches:
        together.update(batch)
    expected = torch.tensor(scorer.score(list(batches.flatten(0, 1)))).mean()
    assert together.compute()["quality"] == pytest.approx(expected.item())
    together.reset()
    together.update(batches[0].float() / 255)
    first = torch.tensor(scorer.score(list(batches[0]))).mean()
    assert together.compute()["quality"] == pytest.approx(first.item())
