"""`lmcl eval MODEL --table LABELS`: a model on a labelled folder, without packing a set.

The table is read by the reader of `lmcl-shard build table`, images are scored as `lmcl score` does,
and the figures are those of an evaluation on another set: the same files, for the same report.
"""

import concurrent.futures
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from lmcl.config import load_run_config, locate_data
from lmcl.errors import LmclError
from lmcl.evaluation.metrics import Evaluation, evaluate
from lmcl.evaluation.predictions import Predictions, make_predictions
from lmcl.evaluation.results import to_pretty_json
from lmcl.evaluation.scope import Scope
from lmcl.evaluation.seen_images import SeenImages, find_seen_images
from lmcl.inference.scorer import ImageScore, PreparedImage, Scorer, open_scorer
from lmcl.models.named import find_model
from lmcl.utils.files import write_atomic
from shards import ScoreScale
from shards.datasets.pictures import read_picture
from shards.datasets.registry import SourceOptions, fetch_source, open_source
from shards.errors import ShardError
from shards.processes import usable_cores
from shards.progress import progress_bar
from shards.sample import DataSet, Sample
from shards.source_files import read_regular
from shards.text import is_url, printable, redact_url

_PART = "all"


@dataclass(frozen=True, kw_only=True)
class TableAsked:
    """A labelled folder."""

    table: str
    """Path or URL."""
    images: str | None = None
    """Folder or URL of the images; None: beside the table."""
    options: SourceOptions = field(default_factory=SourceOptions)
    """Of the reader: scale, columns, what unlabelled images mean."""


@dataclass(frozen=True, kw_only=True)
class EvaluatedTable:
    """Figures of a model on a labelled folder."""

    evaluation: Evaluation
    scope: Scope
    path: Path
    """The predictions file."""
    notes: tuple[str, ...]
    """How the table was read, a line each."""


def evaluate_table(
    model: str | Path, asked: TableAsked, *, output: Path | None, progress: bool
) -> EvaluatedTable:
    """Predictions and figures of a model on the images that a table names.

    Images that the model learned from or was chosen on, byte for byte, are left out, where a list
    of them or its run's set is there to tell.

    Args:
        model: A run folder, a model folder, an exported file, or `starter`.
        asked: The table and its images.
        output: Folder that gets `predictions/<table>-all.csv`; None: the run folder, or
            `runs/eval-<table>` for a model without one.
        progress: Show a bar on a terminal.

    Raises:
        LmclError: If the model is not there, or an image cannot be scored.
        ShardError: If the table cannot be read, or names images that are not there.
    """
    dataset = _open(asked)
    scorer = open_scorer(model)
    name = re.sub(r"[^\w.-]+", "_", Path(redact_url(asked.table)).stem) or "table"
    samples = list(dataset.samples())
    seen = _seen_by(model)
    scored = list(_scores(scorer, samples, seen, title=f"evaluating {name}", progress=progress))
    kept = [(s, found) for s, found in zip(samples, scored, strict=True) if found is not None]
    if not kept:
        raise LmclError(
            f"{printable(redact_url(asked.table))}: all {len(samples)} of its images are training "
            "images of the run; name a table of others",
            exit_code=3,
        )
    score = dataset.score
    assert score is not None  # the reader of tables has one always
    table = _predictions(kept, score, scorer.scale)
    evaluation = evaluate(table.prediction, table.mos, mos_std=table.mos_std, group=table.group)
    scope = Scope(
        tested_on=name,
        part=_PART,
        trained_on=scorer.training_set,
        scale=score,
        trained_scale=scorer.scale,
        images=len(kept),
        left_out=len(samples) - len(kept),
        left_out_known=seen.is_known,
        across=True,
    )
    path = _folder(Path(model), output, name) / "predictions" / f"{name}-{_PART}.csv"
    table.write_csv(path)
    tree: dict[str, Any] = {"schema": 1, "set": name, "part": _PART, **evaluation.to_json()}
    tree |= {"trained_on": scorer.training_set, "decode": scorer.recipe}
    tree["scope"] = msgspec.to_builtins(scope)
    write_atomic(path.with_suffix(".metrics.json"), to_pretty_json(tree))
    return EvaluatedTable(evaluation=evaluation, scope=scope, path=path, notes=dataset.notes)


def _open(asked: TableAsked) -> DataSet:
    options = asked.options
    if asked.images is not None and not is_url(asked.images):
        options = replace(options, images=Path(asked.images).expanduser())
    here, options = fetch_source(
        "table", asked.table, options, images=asked.images, tell=lambda line: None
    )
    return open_source("table", here, options)


def _folder(model: Path, output: Path | None, name: str) -> Path:
    if output is not None:
        return output
    return model if (model / "config.toml").is_file() else Path("runs") / f"eval-{name}"


def _seen_by(model: str | Path) -> SeenImages:
    """The images a model learned from or was chosen on, as far as is known."""
    path = Path(model) / "config.toml"
    config = locate_data(load_run_config(path), Path(model)) if path.is_file() else None
    return find_seen_images(find_model(model), config)


def _scores(
    scorer: Scorer, samples: Sequence[Sample], seen: SeenImages, *, title: str, progress: bool
) -> Iterator[ImageScore | None]:
    """The score of every sample in order; None for those that the model has seen."""

    def prepared(sample: Sample) -> PreparedImage | None:
        data = _bytes_of(sample)
        digest = np.frombuffer(hashlib.sha256(data).digest(), np.uint8)
        if seen.holds(digest[None]).item():
            return None
        return _named(sample, lambda: scorer.prepare(data))

    bar = progress_bar(total=len(samples), desc=title, unit="image", leave=False, off=not progress)
    with bar, concurrent.futures.ThreadPoolExecutor(usable_cores()) as pool:
        left = iter(samples)
        while batch := list(itertools.islice(left, scorer.batch_images)):
            crops = list(pool.map(prepared, batch))
            found = iter(scorer.predict([one for one in crops if one is not None]))
            for sample, one in zip(batch, crops, strict=True):
                yield None if one is None else _checked(sample, next(found))
            bar.update(len(batch))


def _checked(sample: Sample, found: ImageScore) -> ImageScore:
    if found.problem:
        raise LmclError(f"{printable(sample.path)}: {found.problem}", exit_code=5)
    return found


def _bytes_of(sample: Sample) -> bytes:
    if sample.problem:
        raise ShardError(f"{printable(sample.path)}: {sample.problem}", exit_code=3)
    if sample.embedded is not None:
        return read_picture(sample.file, sample.embedded)
    return read_regular(sample.file, offset=sample.offset, size=sample.size)


def _named(sample: Sample, prepare: Callable[[], PreparedImage]) -> PreparedImage:
    try:
        return prepare()
    except LmclError as error:
        raise LmclError(
            f"{printable(sample.path)}: {error}; figures are over all images of a table, so repair "
            "the file, or take its row out",
            exit_code=error.exit_code,
        ) from error


def _predictions(
    kept: Sequence[tuple[Sample, ImageScore]], score: ScoreScale, scale: ScoreScale
) -> Predictions:
    samples, found = zip(*kept, strict=True)
    unit = np.array([one.quality for one in found])
    unknown = float("nan")
    return make_predictions(
        id=np.arange(len(kept)),
        path=[one.path for one in samples],
        group=[one.group for one in samples],
        distortion=[one.distortion for one in samples],
        level=[-1 if one.level is None else one.level for one in samples],
        subset=[one.subset for one in samples],
        part=[one.part for one in samples],
        mos=[unknown if one.mos is None else one.mos for one in samples],
        mos_std=[unknown if one.mos_std is None else one.mos_std for one in samples],
        prediction=score.from_unit(unit),
        prediction_unit=unit,
        size=[one.full_size for one in found],
        deviation=[
            unknown
            if one.deviation is None
            else one.deviation * (score.high - score.low) / (scale.high - scale.low)
            for one in found
        ],
    )
