"""What a run says in the end: which epoch, why there is no figure, how few images there are."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lmcl.config import Config
from lmcl.errors import ConfigError
from lmcl.training.probe import probe_run
from lmcl.training.setup import fit, plan
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
        "two-val": (split.train, split.val[:2], split.test),
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


@pytest.mark.parametrize(
    ("split", "said"),
    [
        ("one-val", "the val part is one image, which has no SRCC"),
        ("two-val", "the val part is 2 images: which epoch has the highest SRCC on so few"),
        ("one-test", "the test part, which the run is judged on, is one image"),
        ("constant", "the train part is one image, from whose score nothing can be learned"),
    ],
)
def test_parts_that_say_nothing_are_warned_of_by_a_dry_run(
    odd_set: Path, tiny: Tiny, tmp_path: Path, split: str, said: str
) -> None:
    config = tiny(f"data.root='{odd_set}'", f"data.split={split}", "train.batch_size=1")
    warned = [one for one in plan(config, tmp_path / "run").splitlines() if "warning: " in one]
    assert [said in one for one in warned] == [True]


def test_patience_is_refused_where_no_epoch_can_have_an_srcc(
    odd_set: Path, tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(f"data.root='{odd_set}'", "data.split=one-val", "train.patience=3")
    with pytest.raises(ConfigError, match="is one image and has none; set it to 0"):
        plan(config, tmp_path / "run")


def test_a_probe_without_a_figure_says_why_and_no_nan(odd_set: Path, tiny: Tiny) -> None:
    config = tiny(f"data.root='{odd_set}'", "data.split=one-test", "evaluation.probe=always")
    run = odd_set.parent / "run"
    said = fit(config, run, progress=False).summary()
    said += probe_run(run, output=None, progress=False).summary()
    assert said.count("SRCC and PLCC are not defined: one image has no correlation") >= 2
    assert "nan" not in said


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
