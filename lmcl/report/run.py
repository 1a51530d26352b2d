"""What a run folder holds, read with tolerance: an absent piece is named, never invented.

The folder may be a stranger's. Its files are read by `run_files`; every text of it becomes one line
of visible characters without the secrets of a URL, before anything else sees it.
"""

import dataclasses
import io
import itertools
import json
import math
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.evaluation.predictions import Predictions, read_predictions
from lmcl.evaluation.scope import Scope, parse_scope
from lmcl.evaluation.threshold import THRESHOLDS, ThresholdRule, parse_rules
from lmcl.report.floor import Probe, read_probe
from lmcl.report.run_files import (
    MAX_TABLE_BYTES,
    RunFileError,
    list_run_files,
    open_run_file,
    read_run_file,
)
from lmcl.utils.files import require_run_folder
from shards.score_scale import UNKNOWN_SCALE, Kind, ScoreScale
from shards.text import printable, redact_url

_PARTS = ("test", "val", "train")
_LOGGED = (
    "epoch",
    "step",
    "loss",
    "l1",
    "plcc_loss",
    "rank_loss",
    "distribution_loss",
    "contrastive",
    "intra_share",
    "positive_similarity",
    "intra_similarity",
    "lr",
    "images_per_s",
    "val_srcc",
    "val_plcc",
)
"""The values of the training log that the page draws."""

_MOST_TABLES = 100
"""Predictions files of a run."""
_MOST_RULES = 8
"""Thresholds that are drawn."""
_MOST_SETTINGS = 2000
_MOST_LIST_ITEMS = 100
_DEEPEST = 20
_MOST_LOG_BYTES_A_LINE = 1 << 16
_MOST_CHARACTERS = 500
_MOST_EMBEDDING_BYTES = 1 << 29
_LARGEST = 1e30
"""A logged value beyond it is not drawn."""


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
    thumbs: frozenset[str]
    """Names of the files in `thumbs/`; `<id>.jpg` is an image's thumbnail."""
    attention: frozenset[str]
    """Names of the files in `attention/`; `<id>.png` is an image's attention map."""
    rules: tuple[ThresholdRule, ...]
    """Thresholds of the model folder."""
    probe: Probe
    """What `lmcl probe` left."""
    missing: tuple[str, ...]
    """Sentences about what the folder does not hold, or holds and is not read."""

    @property
    def headline(self) -> Predictions:
        """Predictions of the headline part."""
        return self.predictions[self.part]

    @property
    def set_name(self) -> str:
        """Name of the data set, `unknown set` if the protocol does not say."""
        return self.protocol.get("set", "") or "unknown set"


def read_run(root: Path) -> RunData:
    """Read a run folder.

    Raises:
        LmclError: If the folder or its predictions are missing (4) or cannot be read (3).
    """
    require_run_folder(root)
    missing: list[str] = []
    protocol = _flatten(_read_json(root, "protocol.json", missing, "the protocol box"))
    names = _prediction_names(root, protocol.get("part", ""), missing)
    predictions = {name: _read_table(root, name) for name in names}
    part = _headline_part(predictions, protocol.get("part", ""))
    run = RunData(
        root=root,
        name=printable(root.resolve().name),
        part=part,
        predictions=predictions,
        scopes={name: scope for name in names if (scope := _read_scope(root, name))},
        scale=_scale(protocol),
        config=_flatten(_read_toml(root, missing)),
        environment=_flatten(_read_json(root, "environment.json", missing, "the machine")),
        protocol=protocol,
        curves=_read_log(root, missing),
        reported=_reported(_read_json(root, "metrics.json", missing, "the trainer's own figures")),
        embedding=_read_embedding(root, predictions[part], missing),
        thumbs=_picture_names(root, "thumbs", missing),
        attention=_picture_names(root, "attention", missing),
        rules=_read_rules(root, missing),
        probe=read_probe(root),
        missing=(),
    )
    return dataclasses.replace(run, missing=(*missing, *_missing_pictures(run)))


def _read_rules(root: Path, missing: list[str]) -> tuple[ThresholdRule, ...]:
    """The thresholds of the model folder; most runs have none."""
    name = f"model/{THRESHOLDS}"
    try:
        return tuple(parse_rules(read_run_file(root, name)).values())[:_MOST_RULES]
    except RunFileError as error:
        if not error.is_missing:
            missing.append(f"{name} {error.reason}: its thresholds cannot be shown")
    except ValueError as error:
        missing.append(f"{name} is damaged ({printable(error)}): its thresholds cannot be shown")
    return ()


def _prediction_names(root: Path, asked: str, missing: list[str]) -> list[str]:
    """Names of the predictions files without `.csv`, those of the run's own parts first."""
    files, others = list_run_files(root, "predictions")
    names = sorted(name.removesuffix(".csv") for name in files if name.endswith(".csv"))
    if not names:
        links = " but links or the like, which a report does not follow" if others else ""
        raise LmclError(
            f"{printable(root)}: no predictions/*.csv{links}, so there is nothing to report; "
            "finish the run with `lmcl train --resume auto` or evaluate it with "
            f"`lmcl eval {printable(root)}`",
            exit_code=4,
        )
    if others:
        missing.append(f"{_counted(others, 'name')} in predictions/ that is no file, not followed")
    first = [name for name in (asked, *_PARTS) if name in names]
    kept = list(dict.fromkeys([*first, *names]))[:_MOST_TABLES]
    if len(names) > len(kept):
        missing.append(f"predictions/ holds {len(names)} files: {len(kept)} are shown")
    return sorted(kept)


def _read_table(root: Path, name: str) -> Predictions:
    """One predictions file, its texts made visible."""
    file = f"predictions/{name}.csv"
    with open_run_file(root, file, limit_bytes=MAX_TABLE_BYTES) as source:
        table = read_predictions(root / file, source)
    texts = {
        field: _visible(getattr(table, field))
        for field in ("path", "group", "distortion", "subset", "part")
    }
    return dataclasses.replace(table, **texts)


def _visible(column: NDArray[Any]) -> NDArray[Any]:
    return np.array([printable(text, _MOST_CHARACTERS) for text in column], dtype=object)


def _read_scope(root: Path, name: str) -> Scope | None:
    """What `lmcl eval` wrote down about a predictions file; None if it did not."""
    file = f"predictions/{name}.metrics.json"
    try:
        scope = parse_scope(read_run_file(root, file), root / file)
    except RunFileError as error:
        if error.is_missing:
            return None
        raise
    if scope is None:
        return None
    splits = tuple(
        dataclasses.replace(s, name=printable(s.name), hash=printable(s.hash)) for s in scope.splits
    )
    return dataclasses.replace(
        scope,
        splits=splits,
        tested_on=_shown(scope.tested_on),
        part=_shown(scope.part),
        trained_on=_shown(scope.trained_on),
        protocol=_shown(scope.protocol),
        mapping=_shown(scope.mapping),
    )


def _shown(text: str) -> str:
    return printable(redact_url(text))


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
    except (KeyError, ValueError, OverflowError):
        return UNKNOWN_SCALE


def _read_json(root: Path, name: str, missing: list[str], what: str) -> dict[str, Any]:
    content = _read_optional(root, name, missing, f"{what} cannot be shown")
    if content is None:
        return {}
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = printable(error)
        missing.append(f"{name} is no JSON ({reason}): {what} cannot be shown")
        return {}
    return found if isinstance(found, dict) else {"value": found}


def _read_toml(root: Path, missing: list[str]) -> dict[str, Any]:
    content = _read_optional(root, "config.toml", missing, "the configuration cannot be shown")
    if content is None:
        return {}
    try:
        return tomllib.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = printable(error)
        missing.append(f"config.toml is no TOML ({reason}): the configuration cannot be shown")
        return {}


def _read_optional(root: Path, name: str, missing: list[str], consequence: str) -> bytes | None:
    """A file that the report can do without; None, and a sentence, if it is not read."""
    try:
        return read_run_file(root, name)
    except RunFileError as error:
        missing.append(f"{name} {error.reason}: {consequence}")
        return None


def _read_log(root: Path, missing: list[str]) -> Curves:
    try:
        stream = open_run_file(root, "log.jsonl", limit_bytes=MAX_TABLE_BYTES)
    except RunFileError as error:
        missing.append(f"log.jsonl {error.reason}: there are no training curves")
        return Curves(steps={}, epochs={})
    entries: dict[str, list[dict[str, float]]] = {"step": [], "epoch": []}
    strange, was_strange = 0, False
    with stream:
        for line in _lines(stream):
            strange += was_strange
            entry = _log_entry(line)
            was_strange = entry is None
            if entry is not None and entry.get("event") in entries:
                entries[entry["event"]].append(_numbers(entry))
    # The last line may have been half written when a run was killed; that is nobody's fault.
    if strange:
        missing.append(
            f"log.jsonl holds {strange} lines that are no entries of a training log: the curves "
            "lack them"
        )
    return Curves(steps=_columns(entries["step"]), epochs=_columns(entries["epoch"]))


def _lines(stream: Any) -> Iterator[bytes]:
    """Lines, cut where they are longer than an entry of a log can be."""
    return iter(lambda: stream.readline(_MOST_LOG_BYTES_A_LINE), b"")


def _log_entry(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_entry = isinstance(entry, dict) and isinstance(entry.get("event", ""), str)
    return entry if is_entry else None


def _numbers(entry: Mapping[str, Any]) -> dict[str, float]:
    """The logged values that are numbers of a sensible size."""
    named = ((name, entry.get(name)) for name in _LOGGED)
    return {
        name: float(value)
        for name, value in named
        if isinstance(value, int | float) and abs(value) <= _LARGEST
    }


def _columns(entries: list[dict[str, float]]) -> dict[str, NDArray[np.float64]]:
    names = dict.fromkeys(itertools.chain.from_iterable(entries))
    return {
        name: np.array([entry.get(name, math.nan) for entry in entries], dtype=np.float64)
        for name in names
    }


def _reported(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in metrics.items() if isinstance(v, float)}


def _read_embedding(
    root: Path, predictions: Predictions, missing: list[str]
) -> NDArray[np.float32]:
    nothing = np.zeros((0, 0), dtype=np.float32)
    try:
        content = read_run_file(root, "embeddings.npz", limit_bytes=MAX_TABLE_BYTES)
    except RunFileError as error:
        missing.append(f"embeddings.npz {error.reason}: there is no map of the embeddings")
        return nothing
    try:
        ids, embedding = _embedding_arrays(content)
    except (ValueError, KeyError, OSError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        missing.append(
            f"embeddings.npz cannot be read ({printable(error)}): there is no map of them"
        )
        return nothing
    row_of = {int(key): row for row, key in enumerate(ids)}
    if any(int(key) not in row_of for key in predictions.id):
        missing.append("embeddings.npz lacks images of this part: there is no map of them")
        return nothing
    return np.asarray(embedding[[row_of[int(key)] for key in predictions.id]])


def _embedding_arrays(content: bytes) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Ids and embeddings; whatever is not of their kind is a ValueError."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, not an archive of several")
        archive = zipfile.ZipFile(io.BytesIO(content))
        sizes = {info.filename: info.file_size for info in archive.infolist()}
        for name in ("id.npy", "embedding.npy"):
            if sizes.get(name, 0) > _MOST_EMBEDDING_BYTES:
                raise ValueError(f"{name} has {sizes[name]:,} bytes")
        ids, embedding = file["id"], file["embedding"]
    if ids.dtype.kind not in "iu" or embedding.dtype.kind != "f":
        raise ValueError(f"ids are {ids.dtype}, embeddings {embedding.dtype}")
    if embedding.ndim != 2 or ids.shape != embedding.shape[:1]:
        raise ValueError(f"ids {ids.shape} do not fit embeddings {embedding.shape}")
    with np.errstate(over="ignore"):
        embedding = embedding.astype(np.float32)
    if not np.all(np.isfinite(embedding)):
        raise ValueError("not all values are finite")
    return ids.astype(np.int64), embedding


def _picture_names(root: Path, folder: str, missing: list[str]) -> frozenset[str]:
    names, others = list_run_files(root, folder)
    if others:
        missing.append(
            f"{folder}/ holds {_counted(others, 'link')} or the like: a report does not follow them"
        )
    return names


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _missing_pictures(run: RunData) -> list[str]:
    ids = [int(i) for i in run.headline.id]
    found = []
    if not any(f"{i}.jpg" in run.thumbs for i in ids):
        found.append("thumbs/ is missing: the page cannot show images")
    if not any(f"{i}.png" in run.attention for i in ids):
        found.append("attention/ is missing: attention cannot be laid over the images")
    if not np.any(run.headline.height > 0):
        found.append("image sizes are not in the predictions: salient boxes cannot be drawn")
    return found


def _flatten(tree: Mapping[str, Any]) -> dict[str, str]:
    """A tree of settings as `train.seed` -> `123`, bounded, without secrets of URLs."""
    return dict(itertools.islice(_leaves(tree, "", 0), _MOST_SETTINGS))


def _leaves(value: object, key: str, depth: int) -> Iterator[tuple[str, str]]:
    is_list_of_trees = isinstance(value, list) and any(isinstance(v, list | dict) for v in value)
    if not isinstance(value, dict) and not is_list_of_trees:
        yield key, _plain(value)
    elif depth < _DEEPEST:
        below = value.items() if isinstance(value, dict) else enumerate(cast(list[Any], value))
        for name, leaf in below:
            path = f"{key}.{name}" if key else str(name)
            yield from _leaves(leaf, printable(redact_url(path)), depth + 1)
    else:
        yield key, "…"


def _plain(value: object) -> str:
    if isinstance(value, list):
        more = ", …" if len(value) > _MOST_LIST_ITEMS else ""
        items = ", ".join(_plain(v) for v in value[:_MOST_LIST_ITEMS])
        return printable(items, _MOST_CHARACTERS) + more
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return printable(value, _MOST_CHARACTERS)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return printable(redact_url(text), _MOST_CHARACTERS)
