"""What a run says in the end: which epoch, why there is no figure, how few images there are."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmcl.config import Config
from lmcl.training.setup import fit
from shards.read import open_set
from shards.splits.split import load_split, split_from_ids, write_split

Tiny = Callable[..., Config]


@pytest.fixture
def odd_set(demo_set: Path, tmp_path: Path) -> Path:
    """The demo set with splits whose val and test parts have no correlation."""
    folder = tmp_path / "odd"
    shutil.copytree(demo_set, folder)
    shard_set = open_set(folder)
    split = load_split(shard_set, "70-10-20-seed123-00")
    mos = shard_set.unit_mos()
    first = int(split.train[0])
    alike = np.array([i for i in split.train if abs(mos[i] - mos[first]) < 1e-9])[:3]
    parts = {
        "one-val": (split.train, split.val[:1], split.test),
        "one-test": (split.train, split.val, split.test[:1]),
        "constant": (alike, split.val, split.test),
    }
    for number, (name, ids) in enumerate(parts.items()):
        write_split(folder, split_from_ids(shard_set, name, number, ids, note="odd"))
    return folder


def test_a_validation_without_a_correlation_is_said_in_log_protocol_and_last_line(
    odd_set: Path, tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = tiny(f"data.root='{odd_set}'", "data.split=one-val")
    said = fit(config, tmp_path / "run", progress=False).summary()
    why = "no epoch has an SRCC on the val part (one image has no correlation)"
    assert "the val part is one image, which has no SRCC" in caplog.text
    assert "validation SRCC is not defined (one image has no correlation)" in caplog.text
    assert "nan" not in caplog.text.lower()
    protocol = json.loads((tmp_path / "run" / "protocol.json").read_text())
    assert protocol["selection"] == f"epoch 2 of 2, the last one: {why}"
    assert why in said
    assert "caution: 10 images are few" in said
    epochs = [
        entry
        for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()
        if (entry := json.loads(line))["event"] == "epoch"
    ]
    assert [entry["val_srcc"] for entry in epochs] == [None, None]


def test_a_figure_that_is_not_defined_is_explained_and_the_chosen_epoch_named(
    odd_set: Path, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(
        f"data.root='{odd_set}'",
        "data.split=one-test",
        "train.epochs=1",
        "objective.contrastive_weight=0.0",
        "crops.salient=false",
    )
    said = fit(config, tmp_path / "run", progress=False).summary().splitlines()
    assert said[-2] == (
        "test: SRCC and PLCC are not defined: one image has no correlation (1 image), weights of "
        "epoch 1 of 1, the highest SRCC on the val part"
    )
    step = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    # Switched off is not zero.
    names = ("contrastive", "intra_share", "intra_similarity", "positive_similarity")
    assert [step[name] for name in names] == [None] * 4
    assert step["loss"] == step["l1"]
