"""The floor of a report: a ridge on frozen features, and the files it leaves (`lmcl probe`).

What an encoder knows before any training, read off in closed form; a trained model that is not
ahead of it has learned little. `probe.json` is written last, and names the predictions it is about.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.evaluation.metrics import LEAST_GROUPS
from lmcl.evaluation.predict import PartPredictions
from lmcl.evaluation.predictions import Predictions
from lmcl.evaluation.results import to_pretty_json
from lmcl.evaluation.ridge import RidgeChoice, choose_ridge, fit_scaling, predict_ridge
from lmcl.evaluation.significance import Difference, srcc_difference
from lmcl.utils.files import write_atomic
from shards.read import ShardSet
from shards.splits.split import Split
from shards.text import printable

PROBE = "probe"
"""Folder of a run that holds what `lmcl probe RUN` leaves."""
PROBE_FILE = "probe.json"
PROBE_PREDICTIONS = "predictions.csv"
FEW_LABELS = 40
"""Training images below which the choice of the penalty is mostly chance."""
_LEAST_LABELS = 10


@dataclass(frozen=True, kw_only=True)
class ProbeFacts:
    """What a probe was: becomes the head of probe.json."""

    set: str
    set_sha256: str
    split: str
    split_hash: str
    part: str
    encoder: str
    """Name, with that of the stem of a hybrid."""
    weights: str
    """Where the frozen weights came from; `random` without any."""
    crops: str
    decode: str
    features: int
    """Numbers an image."""
    train: int
    """Images it was fitted on."""
    ridge: RidgeChoice
    """Kernel, penalty, and the error on held-out folds of the train part, in units of quality."""
    predictions_sha256: str = ""
    """Of the predictions file beside it."""
    schema: int = 1


def fit_probe(
    shard_set: ShardSet,
    split: Split,
    ids: NDArray[np.int64],
    features: NDArray[np.float32],
    part: str,
) -> tuple[PartPredictions, RidgeChoice]:
    """A ridge on the train part's features, and its predictions on another part.

    Penalty and kernel are chosen inside the train part; images of one group stay in one fold.

    Args:
        shard_set: The set.
        split: A split of it.
        ids: The images whose features are given, rising.
        features: `[n, f]`, in the order of `ids`.
        part: What is predicted.

    Raises:
        LmclError: If there is too little to learn from; exit code 3.
    """
    train, judged = np.unique(split.part("train")), np.unique(split.part(part))
    target, groups = shard_set.unit_mos()[train], shard_set.samples.group_key[train]
    _check_learnable(shard_set, split, target)
    if not len(judged):
        raise LmclError(
            f"{shard_set.root}, split {split.name!r}: the {part} part is empty; take another part "
            "(--part, or evaluation.part of a run), or a split that has one",
            exit_code=3,
        )
    rows = np.searchsorted(ids, train)
    try:
        scaling = fit_scaling(features[rows])
        known = scaling(features[rows])
        choice = choose_ridge(known, target, groups)
    except ValueError as error:
        raise LmclError(
            f"{shard_set.root}, split {split.name!r}: no ridge can be fitted on its train part: "
            f"{error}; take another split, encoder or set",
            exit_code=3,
        ) from error
    others = scaling(features[np.searchsorted(ids, judged)])
    score = predict_ridge(choice, known, target, others)
    nothing = np.zeros((len(judged), 0), np.float32)
    return PartPredictions(ids=judged, score=score, embedding=nothing), choice


def _check_learnable(shard_set: ShardSet, split: Split, target: NDArray[np.float64]) -> None:
    where = f"{shard_set.root}, split {split.name!r}"
    if len(target) < _LEAST_LABELS:
        raise LmclError(
            f"{where}: the train part has {len(target)} images, and a probe needs "
            f"{_LEAST_LABELS} (from {FEW_LABELS} on its choices are more than chance); take a "
            "split with more",
            exit_code=3,
        )
    unlabelled = int(np.sum(np.isnan(target)))
    if unlabelled:
        raise LmclError(
            f"{where}: {unlabelled} of the {len(target)} images of the train part have no score; "
            "leave them out of the split, or give them one",
            exit_code=3,
        )
    if np.ptp(target) == 0:
        raise LmclError(
            f"{where}: all {len(target)} scores of the train part are the same, so there is "
            "nothing to learn; look at the set with `lmcl-shard info`",
            exit_code=3,
        )


def write_probe(folder: Path, facts: ProbeFacts, table: Predictions, figures: Any) -> None:
    """Write predictions.csv, then probe.json, which names it by its hash.

    Args:
        folder: Where.
        facts: What was probed.
        table: The predictions.
        figures: As in metrics.json (`metrics_tree`).
    """
    path = folder / PROBE_PREDICTIONS
    table.write_csv(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    tree = msgspec.to_builtins(facts) | {"predictions_sha256": digest, "figures": figures}
    write_atomic(folder / PROBE_FILE, to_pretty_json(tree))


def parse_probe(content: bytes, path: Path) -> ProbeFacts:
    """The head of a probe.json.

    Raises:
        ValueError: If it is none.
    """
    try:
        found = msgspec.json.decode(content, type=ProbeFacts)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(f"{printable(path)}: {printable(error)}") from error
    if found.schema != 1:
        raise ValueError(f"{printable(path)}: is of version {found.schema}; update lmcl")
    return found


def difference_from_probe(model: Predictions, probe: Predictions) -> Difference:
    """How much higher a model's rank correlation is than the probe's, on the same images.

    Raises:
        ValueError: If the two are not predictions of the same images with the same scores.
    """
    same = np.array_equal(model.id, probe.id) and np.array_equal(
        model.mos, probe.mos, equal_nan=True
    )
    if not same:
        raise ValueError("it is about other images, or other scores of them")
    known = np.isfinite(model.mos) & np.isfinite(model.prediction) & np.isfinite(probe.prediction)
    groups = np.unique(model.group[known].astype(str), return_inverse=True)[1]
    if np.sum(known) < 2:
        return Difference(value=math.nan, interval=None, p=math.nan)
    found = srcc_difference(
        model.prediction[known], probe.prediction[known], model.mos[known], groups.reshape(-1)
    )
    # As for the figures themselves: a bootstrap over a few groups says nothing.
    has_interval = len(np.unique(groups)) >= LEAST_GROUPS
    return found if has_interval else replace(found, interval=None, p=math.nan)
