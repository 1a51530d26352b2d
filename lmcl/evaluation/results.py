"""Results of an evaluation: the prediction table, metrics.json, pictures for the report."""

import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lmcl.evaluation.calibration import (
    CONFIDENCE,
    Calibration,
    prediction_interval,
)
from lmcl.evaluation.metrics import Evaluation, LogisticMapping, evaluate
from lmcl.evaluation.predict import PartPredictions, SaliencyMaps
from lmcl.evaluation.predictions import Predictions, make_predictions
from lmcl.utils.files import write_atomic
from pipeline.boxes import CropConfig, scaled_sizes
from pipeline.decode import decode_rgb
from shards import ScoreScale
from shards.read import ShardSet

_THUMB_SIDE = 192
_MOST_PICTURES = 2000


def make_prediction_table(
    shard_set: ShardSet,
    judged: PartPredictions,
    part: str,
    looked: SaliencyMaps | None,
    *,
    crops: CropConfig,
    calibration: Calibration | None = None,
) -> Predictions:
    """A part's predictions beside what the set knows of its images, with intervals if known."""
    rows, samples, score = judged.ids, shard_set.samples, shard_set.score
    lower, upper = None, None
    if calibration is not None and score is not None:
        lower, upper = prediction_interval(
            calibration, score, judged.score, judged.spread, confidence=CONFIDENCE
        )
    return make_predictions(
        id=rows,
        path=samples.path[rows],
        group=samples.group[rows],
        distortion=samples.distortion[rows],
        level=samples.level[rows],
        subset=samples.subset[rows],
        part=part,
        mos=samples.mos[rows],
        mos_std=samples.mos_std[rows],
        prediction=score.from_unit(judged.score) if score else judged.score,
        prediction_unit=judged.score,
        size=scaled_sizes(samples.height[rows], samples.width[rows], crops),
        box=looked.boxes if looked else None,
        lower=lower,
        upper=upper,
        deviation=_raw_deviation(judged, score),
    )


def _raw_deviation(judged: PartPredictions, score: ScoreScale | None) -> NDArray[np.float64] | None:
    """Predicted deviations in the set's own scale."""
    if not len(judged.deviation):
        return None
    return judged.deviation * (score.high - score.low if score else 1.0)


def write_pictures(
    folder: Path, shard_set: ShardSet, judged: PartPredictions, looked: SaliencyMaps
) -> None:
    """Thumbnails and attention maps for the report, and the embeddings it maps."""
    shown = judged.ids[:_MOST_PICTURES]
    for place, row in enumerate(shown):
        image = Image.fromarray(decode_rgb(shard_set.read_bytes(int(row))))
        image.thumbnail((_THUMB_SIDE, _THUMB_SIDE))
        write_atomic(folder / "thumbs" / f"{row}.jpg", _encoded(image, "JPEG"))
        if looked.attention.size:
            grey = Image.fromarray(_stretch(looked.attention[place]))
            write_atomic(folder / "attention" / f"{row}.png", _encoded(grey, "PNG"))
    buffer = io.BytesIO()
    np.savez(buffer, id=judged.ids, embedding=judged.embedding)
    write_atomic(folder / "embeddings.npz", buffer.getvalue())


def metrics_tree(
    shard_set: ShardSet,
    judged: dict[str, PartPredictions],
    evaluations: dict[str, Evaluation],
    part: str,
    *,
    mapping: LogisticMapping | None = None,
) -> dict[str, Any]:
    """metrics.json: the headline part's figures on top, then each part's, then each portion's."""
    found = judged[part]
    portions = {
        name: _by_portion(shard_set, found, values[found.ids], mapping)
        for name, values in (
            ("subsets", shard_set.samples.subset),
            ("distortions", shard_set.samples.distortion),
        )
    }
    return {
        "schema": 1,
        "set": shard_set.name,
        "part": part,
        **evaluations[part].to_json(),
        "parts": {name: value.to_json() for name, value in evaluations.items()},
        **portions,
    }


def evaluate_predictions(
    shard_set: ShardSet, judged: PartPredictions, *, mapping: LogisticMapping | None = None
) -> Evaluation:
    """Figures of predictions in the scale of the set they were made on.

    Args:
        shard_set: The set.
        judged: Predictions on some of its images.
        mapping: Fitted on others of them; else on these themselves.
    """
    samples, score = shard_set.samples, shard_set.score
    return evaluate(
        score.from_unit(judged.score) if score else judged.score,
        samples.mos[judged.ids],
        mos_std=samples.mos_std[judged.ids],
        group=samples.group[judged.ids],
        mapping=mapping,
    )


def _by_portion(
    shard_set: ShardSet,
    judged: PartPredictions,
    names: NDArray[Any],
    mapping: LogisticMapping | None,
) -> dict[str, dict[str, Any]]:
    found = {}
    for name in sorted({str(name) for name in names} - {""}):
        portion = judged.take(names == name)
        found[name] = evaluate_predictions(shard_set, portion, mapping=mapping).to_json()
    return found


def _stretch(attention: NDArray[np.float32]) -> NDArray[np.uint8]:
    spread = float(np.ptp(attention)) or 1.0
    grey: NDArray[np.uint8] = np.round((attention - attention.min()) / spread * 255).astype(
        np.uint8
    )
    return grey


def _encoded(image: Image.Image, codec: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, codec, quality=80)
    return buffer.getvalue()


def to_pretty_json(tree: object) -> bytes:
    """Indented JSON with a final line break, for files that people read too."""
    return msgspec.json.format(msgspec.json.encode(tree), indent=2) + b"\n"
