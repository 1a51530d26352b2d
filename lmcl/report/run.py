"""What a run folder holds, read with tolerance: an absent piece is named, never invented."""

import dataclasses
import json
import math
import tomllib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.evaluation.predictions import Predictions, read_predictions
from lmcl.evaluation.scope import Scope, read_scope
from shards.score_scale import UNKNOWN_SCALE, Kind, ScoreScale

_PARTS = ("test", "val", "train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """The training log as columns; NaN where a line did not have the value."""

    steps: Mapping[str, NDArray[np.float64]]
    """One array per name, one value per logged step, in order."""
    epochs: Mapping[str, NDArray[np.float64]]
    """The same per epoch."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RunData:
    """One run, as far as its folder tells."""

    root: Path
    name: str
    """Name of the folder."""
    part: str
    """The part the headline is about."""
    predictions: Mapping[str, Predictions]
    """By part, or by data set for cross-set evaluations."""
    scopes: Mapping[str, Scope]
    """Where `lmcl eval` wrote down what a predictions file is about; by its name."""
    scale: ScoreScale
    config: Mapping[str, str]
    """Flattened configuration: `train.seed` -> `123`."""
    environment: Mapping[str, str]
    """Flattened environment.json."""
    protocol: Mapping[str, str]
    """Flattened protocol.json."""
    curves: Curves
    reported: Mapping[str, float]
    """The figures metrics.json gives for the headline part."""
    embedding: NDArray[np.float32]
    """`[n, d]` in the order of the headline predictions; `[0, 0]` if there is none."""
    missing: tuple[str, ...]
    """Sentences about what the folder does not hold."""

    @property
    def headline(self) -> Predictions:
        """Predictions of the headline part."""
        return self.predictions[self.part]

    @property
    def set_name(self) -> str:
        """Name of the data set, `unknown set` if the protocol does not say."""
        return self.protocol.get("set", "") or "unknown set"

    def thumb(self, id: int) -> Path:
        """Where the thumbnail of an image would be."""
        return self.root / "thumbs" / f"{id}.jpg"

    def attention(self, id: int) -> Path:
        """Where its attention map would be."""
        return self.root / "attention" / f"{id}.png"


def read_run(root: Path) -> RunData:
    """Read a run folder.

    Raises:
        LmclError: If the folder or its predictions are missing (4) or cannot be read (3).
    """
    if not root.is_dir():
        raise LmclError(f"{root}: no such run folder; `lmcl train` makes one", exit_code=4)
    missing: list[str] = []
    files = _prediction_files(root)
    predictions = {file.stem: read_predictions(file) for file in files}
    scopes = {file.stem: scope for file in files if (scope := read_scope(file))}
    protocol = _flatten(_read_json(root / "protocol.json", missing, "the protocol box"))
    part = _headline_part(predictions, protocol.get("part", ""))
    run = RunData(
        root=root,
        name=root.resolve().name,
        part=part,
        predictions=predictions,
        scopes=scopes,
        scale=_scale(protocol),
        config=_flatten(_read_toml(root / "config.toml", missing)),
        environment=_flatten(_read_json(root / "environment.json", missing, "the machine")),
        protocol=protocol,
        curves=_read_log(root / "log.jsonl", missing),
        reported=_reported(_read_json(root / "metrics.json", missing, "the trainer's own figures")),
        embedding=_read_embedding(root / "embeddings.npz", predictions[part], missing),
        missing=(),
    )
    return dataclasses.replace(run, missing=(*missing, *_missing_pictures(run)))


def _prediction_files(root: Path) -> list[Path]:
    files = sorted((root / "predictions").glob("*.csv"))
    if not files:
        raise LmclError(
            f"{root}: no predictions/*.csv, so there is nothing to report; finish the run with "
            f"`lmcl train --resume auto` or evaluate it with `lmcl eval {root}`",
            exit_code=4,
        )
    return files


def _headline_part(predictions: Mapping[str, Predictions], asked: str) -> str:
    for part in (asked, *_PARTS):
        if part in predictions:
            return part
    return next(iter(predictions))


def _scale(protocol: Mapping[str, str]) -> ScoreScale:
    kind, direction = protocol.get("score.kind", ""), protocol.get("score.higher_is_better", "true")
    try:
        return ScoreScale(
            kind=cast(Kind, kind if kind in get_args(Kind) else ""),
            low=float(protocol["score.low"]),
            high=float(protocol["score.high"]),
            higher_is_better=direction != "false",
        )
    except (KeyError, ValueError):
        return UNKNOWN_SCALE


def _read_json(path: Path, missing: list[str], what: str) -> dict[str, Any]:
    if not path.is_file():
        missing.append(f"{path.name} is missing: {what} cannot be shown")
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LmclError(
            f"{path}: is no JSON ({error}); delete it and write it again with `lmcl eval`",
            exit_code=3,
        ) from error
    return found if isinstance(found, dict) else {"value": found}


def _read_toml(path: Path, missing: list[str]) -> dict[str, Any]:
    if not path.is_file():
        missing.append("config.toml is missing: the configuration cannot be shown")
        return {}
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        missing.append(f"config.toml is no TOML ({error}): the configuration cannot be shown")
        return {}


def _read_log(path: Path, missing: list[str]) -> Curves:
    if not path.is_file():
        missing.append("log.jsonl is missing: there are no training curves")
        return Curves(steps={}, epochs={})
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = [_log_entry(line) for line in lines]
    entries = [e for e in found if e is not None]
    # The last line may have been half written when a run was killed; that is nobody's fault.
    strange = sum(e is None for e in found[:-1])
    if strange:
        missing.append(
            f"log.jsonl holds {strange} lines that are no entries of a training log: the curves "
            "lack them"
        )
    return Curves(
        steps=_columns([e for e in entries if e.get("event") == "step"]),
        epochs=_columns([e for e in entries if e.get("event") == "epoch"]),
    )


def _log_entry(line: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _columns(entries: list[dict[str, Any]]) -> dict[str, NDArray[np.float64]]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    columns = {}
    for name in names:
        values = [entry.get(name) for entry in entries]
        if any(isinstance(v, int | float) for v in values):
            numbers = [float(v) if isinstance(v, int | float) else math.nan for v in values]
            columns[name] = np.array(numbers, dtype=np.float64)
    return columns


def _reported(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, float)}


def _read_embedding(
    path: Path, predictions: Predictions, missing: list[str]
) -> NDArray[np.float32]:
    nothing = np.zeros((0, 0), dtype=np.float32)
    if not path.is_file():
        missing.append("embeddings.npz is missing: there is no map of the embeddings")
        return nothing
    try:
        with np.load(path, allow_pickle=False) as file:
            ids, embedding = file["id"], file["embedding"].astype(np.float32)
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        missing.append(f"embeddings.npz cannot be read ({error}): there is no map of them")
        return nothing
    place = {int(key): row for row, key in enumerate(ids)}
    if any(int(key) not in place for key in predictions.id):
        missing.append("embeddings.npz lacks images of this part: there is no map of them")
        return nothing
    return np.asarray(embedding[[place[int(key)] for key in predictions.id]])


def _missing_pictures(run: RunData) -> list[str]:
    ids = [int(i) for i in run.headline.id]
    found = []
    if not any(run.thumb(i).is_file() for i in ids):
        found.append("thumbs/ is missing: the page cannot show images")
    if not any(run.attention(i).is_file() for i in ids):
        found.append("attention/ is missing: attention cannot be laid over the images")
    if not np.any(run.headline.height > 0):
        found.append("image sizes are not in the predictions: salient boxes cannot be drawn")
    return found


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = _plain(value)
    return flat


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)
