"""Calibrate a model: predictions on its val part, and on a sample of what it learned from.

People's scores are taken from the val part alone, which no step of training has seen; of the
training images only what the model says and where it puts them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray

from lmcl.config import load_run_config
from lmcl.distributed import RankContext, make_rank_context
from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import choose_rule, crop_order
from lmcl.evaluation.calibration import (
    NEAREST,
    Calibration,
    Distances,
    Meaning,
    as_kept,
    neighbour_distances,
    write_calibration,
)
from lmcl.evaluation.conformal import Conformal, fit_conformal
from lmcl.evaluation.data import open_data
from lmcl.evaluation.predict import CropSource, PartPredictions, PixelSource, predict
from lmcl.evaluation.sets import shared_truth
from lmcl.models.precision import choose_precision
from lmcl.models.preprocess import Preprocessing
from lmcl.models.pretrained import load_model
from lmcl.models.quality_model import QualityModel
from lmcl.models.training_images import read_training_images
from lmcl.utils.files import require_run_folder
from pipeline.boxes import CropConfig, evaluation_boxes, frame_sizes
from shards.joined import JoinedSet
from shards.read import ShardSet
from shards.splits.split import Split
from shards.text import printable

_SAMPLE_TITLE = "calibrating: a sample of the train part"
SAMPLE = 512
"""Training images that stand for all: their scores are the population, their embeddings the
neighbours. 512 embeddings of 384 numbers are 0.4 MB."""


def calibrate_run(run: Path, *, batch_size: int, progress: bool) -> Meaning:
    """Calibrate a finished run's model, and write it into the model folder.

    Raises:
        LmclError: If the run, its set or its split is not there, or the split is another one than
            the model was trained on (exit code 3).
    """
    require_run_folder(run)
    config, folder = load_run_config(run / "config.toml"), run / "model"
    released = load_model(folder)
    shard_set, split = open_data(config.data)
    known = read_training_images(folder)
    is_own = known is None or known.seen(shard_set.samples.sha256[split.train]).any()
    if split.hash != released.card.split_hash or not is_own:
        raise LmclError(
            f"{printable(run)}: the split {printable(split.name)} of {printable(shard_set.root)} "
            "is not the one the model was trained on, so it is not known which images it has not "
            "learned from; give the run its own set back (`data.root` or `data.sets` of its "
            "config.toml)",
            exit_code=3,
        )
    card = released.card
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    context = make_rank_context(accelerator, decode=config.runtime.decoding, progress=progress)
    precision = choose_precision(config.runtime.precision, context.device).dtype
    preprocessing = Preprocessing(mean=card.mean, std=card.std, precision=precision)
    source = PixelSource(shard_set=shard_set, context=context)

    def judge(ids: NDArray[np.int64], title: str) -> PartPredictions:
        return predict(
            released.model.to(context.device),
            source,
            ids,
            crops=card.crops,
            preprocessing=preprocessing,
            context=context,
            batch_size=batch_size,
            title=title,
        )

    sample = judge(sample_ids(split.part("train")), _SAMPLE_TITLE)
    val = judge(split.part("val"), "calibrating: the val part") if len(split.val) else None
    truth, scales = None, released.model.scales
    if isinstance(shard_set, JoinedSet) and scales is not None:
        truth = shared_truth(shard_set, scales)
    found = calibrate(shard_set, split, val=val, sample=sample, crops=card.crops, truth=truth)
    return write_calibration(folder, *found)


def predict_sample(
    model: QualityModel,
    source: CropSource,
    split: Split,
    *,
    crops: CropConfig,
    preprocessing: Preprocessing,
    context: RankContext,
    batch_size: int,
) -> PartPredictions:
    """Predictions on up to 512 images of the train part, evenly spaced over its ids."""
    return predict(
        model,
        source,
        sample_ids(split.part("train")),
        crops=crops,
        preprocessing=preprocessing,
        context=context,
        batch_size=batch_size,
        title=_SAMPLE_TITLE,
    )


def sample_ids(ids: NDArray[np.int64], most: int = SAMPLE) -> NDArray[np.int64]:
    """At most so many ids, evenly spaced in their rising order."""
    rising = np.unique(ids)
    places = np.unique(np.linspace(0, len(rising) - 1, min(most, len(rising))).round().astype(int))
    return np.asarray(rising[places])


def calibrate(
    shard_set: ShardSet,
    split: Split,
    *,
    val: PartPredictions | None,
    sample: PartPredictions,
    crops: CropConfig,
    truth: NDArray[np.float64] | None = None,
) -> tuple[Calibration, NDArray[np.float32]]:
    """What the model's scores mean, and the embeddings that new images are compared with.

    Args:
        shard_set: The set the model was trained on.
        split: Its split.
        val: Predictions on the val part; None if there is none.
        sample: Predictions on images of the train part.
        crops: Where the crops lie.
        truth: Every row's score in [0, 1] units of the model's answers; None: the set's own.
    """
    intervals, distances, rule = None, None, None
    if val is not None and len(val.ids):
        known = shard_set.unit_mos() if truth is None else truth
        intervals = _intervals(known[val.ids], val, sample, shard_set.samples.subset[val.ids])
        nearest = neighbour_distances(val.embedding, as_kept(sample.embedding))
        distances = Distances(k=NEAREST, of_val=tuple(np.sort(nearest).tolist()), sha256="")
        rule = choose_rule(in_order_of_looking(shard_set, val, crops))
    calibration = Calibration(
        training_set=shard_set.name,
        split=split.name,
        population=tuple(np.sort(sample.score).tolist()),
        intervals=intervals,
        distances=distances,
        crops=rule,
    )
    return calibration, sample.embedding


def _intervals(
    truth: NDArray[np.float64],
    val: PartPredictions,
    sample: PartPredictions,
    subset: NDArray[Any],
) -> Conformal | None:
    if not np.any(np.isfinite(truth)):
        return None
    return fit_conformal(
        val.score,
        truth,
        val.spread,
        floor=float(np.median(sample.spread)),
        edges_from=sample.score,
        groups=subset,
    )


def in_order_of_looking(
    shard_set: ShardSet, judged: PartPredictions, crops: CropConfig
) -> NDArray[np.float64]:
    """Crop qualities `[n, v]` of images, each in its `crop_order`."""
    samples, ids = shard_set.samples, judged.ids
    frames = frame_sizes(samples.height[ids], samples.width[ids], crops)
    boxes = evaluation_boxes(ids, frames, crops)
    order = np.stack([crop_order(one) for one in boxes])
    return np.take_along_axis(judged.crops, order, axis=1)
