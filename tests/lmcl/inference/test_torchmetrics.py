import pickle

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


def test_the_metric_can_be_cloned_and_tracked(scorer) -> None:
    from lmcl.inference.torchmetrics import ImageQuality

    batch = torch.randint(0, 256, (2, 3, 70, 80), dtype=torch.uint8)
    expected = pytest.approx(sum(scorer.score(batch)) / 2)
    first = torchmetrics.MetricCollection({"quality": ImageQuality(scorer)})
    other = first.clone(prefix="val_")
    other.update(batch)
    assert other.compute()["val_quality"] == expected
    tracker = torchmetrics.MetricTracker(ImageQuality(scorer), maximize=True)
    for _ in range(2):
        tracker.increment()
        tracker.update(batch)
    assert tracker.best_metric() == expected
    # Copies share the network: a step an epoch must not keep a network an epoch.
    assert other["val_quality"].scorer is scorer or other["quality"].scorer is scorer
    assert pickle.loads(pickle.dumps(ImageQuality(scorer))).scorer.score(batch) == scorer.score(
        batch
    )
