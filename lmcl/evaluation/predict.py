"""A model and a part of a set become predictions by sample id, complete and without repeats."""

import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from tqdm import tqdm

from lmcl.distributed import RankContext
from lmcl.errors import LmclError
from lmcl.features.cache import FeatureCache, FeatureLoader
from lmcl.models.preprocess import Preprocessing, autocast, preprocess
from lmcl.models.quality_model import QualityModel
from lmcl.models.saliency import SaliencyConfig, best_window, window_to_box
from pipeline.boxes import CropConfig, scaled_sizes
from pipeline.loader import Loader, Mode
from shards.read import ShardSet

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PartPredictions:
    """What a model says about a part, sorted by id."""

    ids: NDArray[np.int64]
    """[n]"""
    score: NDArray[np.float64]
    """[n] mean over the evaluation crops, [0, 1] units, higher = better."""
    embedding: NDArray[np.float32]
    """[n, d] unit-length mean over the crops."""
    decode: str = ""
    """The decode recipe (docs/loader.md); two scores are comparable if it is the same for both."""


@dataclass(frozen=True, kw_only=True)
class SaliencyMaps:
    """Where a model looks, sorted by id."""

    ids: NDArray[np.int64]
    """[n]"""
    boxes: NDArray[np.int32]
    """[n, 4] salient crop (y, x, h, w)."""
    attention: NDArray[np.float32]
    """[n, g, g] CLS attention; empty if not asked for."""


@runtime_checkable
class SaliencyModel(Protocol):
    """Something that gives CLS attention over whole images: a teacher, or an encoder."""

    def __call__(self, pixels: torch.Tensor, /, *, layers: int) -> torch.Tensor:
        """Attention maps [b, g, g] of normalised views [b, 3, s, s]."""


def predict(
    model: QualityModel,
    shard_set: ShardSet,
    ids: NDArray[np.int64],
    *,
    crops: CropConfig,
    preprocessing: Preprocessing,
    context: RankContext,
    batch_size: int,
    title: str,
    bank: FeatureCache | None = None,
) -> PartPredictions:
    """Score every image of a part by its deterministic crops; every rank gets the whole result.

    Where `bank` has the cells of the images' evaluation crops, no pixels are read.

    Raises:
        LmclError: If the gathered predictions are not exactly the part (exit code 3).
    """
    model.eval()
    found: list[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float32]]] = []
    with _loader(shard_set, ids, crops, "eval", batch_size, context, bank) as loader:
        recipe = loader.recipe
        for batch in _bar(loader, title, context):
            with torch.no_grad(), autocast(context.device, preprocessing.precision):
                output = model(preprocess(batch.crops, preprocessing))
            images = len(batch.ids)
            score = output.score.double().reshape(images, -1).mean(dim=1)
            mean = output.embedding.float().reshape(images, -1, output.embedding.shape[-1]).mean(1)
            embedding = torch.nn.functional.normalize(mean, dim=-1)
            keep = batch.valid
            found.append(
                (
                    batch.ids[keep].cpu().numpy(),
                    score[keep].cpu().numpy(),
                    embedding[keep].cpu().numpy(),
                )
            )
    gathered = gather_object(found) if context.world_size > 1 else found
    all_ids = np.concatenate([item[0] for item in gathered])
    order = _complete(all_ids, ids, title)
    return PartPredictions(
        ids=all_ids[order],
        score=np.concatenate([item[1] for item in gathered])[order],
        embedding=np.concatenate([item[2] for item in gathered])[order],
        decode=recipe,
    )


def compute_saliency(
    looker: SaliencyModel,
    shard_set: ShardSet,
    ids: NDArray[np.int64],
    *,
    saliency: SaliencyConfig,
    crops: CropConfig,
    preprocessing: Preprocessing,
    context: RankContext,
    keep_attention: bool,
    title: str,
    bank: FeatureCache | None = None,
) -> SaliencyMaps:
    """The saliency pass: one squeezed view of every image, dealt to all ranks, gathered once.

    Raises:
        LmclError: If the gathered boxes are not exactly the part (exit code 3).
    """
    view = CropConfig(size=saliency.view, max_side=crops.max_side, salient=False)
    samples = shard_set.samples
    found: list[tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]] = []
    with _loader(shard_set, ids, view, "global", saliency.batch_size, context, bank) as loader:
        for batch in _bar(loader, title, context):
            with torch.no_grad(), autocast(context.device, preprocessing.precision):
                maps = looker(preprocess(batch.crops, preprocessing), layers=saliency.layers)
            keep = batch.valid.cpu()
            maps = maps.float().cpu()[keep]
            shown = batch.ids.cpu()[keep].numpy()
            boxes = window_to_box(
                best_window(maps, saliency.window).numpy(),
                scaled_sizes(samples.height[shown], samples.width[shown], crops.max_side),
                grid=maps.shape[-1],
                window=saliency.window,
                size=crops.size,
            )
            kept = maps.numpy() if keep_attention else np.zeros((len(maps), 0, 0), np.float32)
            found.append((shown, boxes, kept))
    gathered = gather_object(found) if context.world_size > 1 else found
    all_ids = np.concatenate([item[0] for item in gathered])
    order = _complete(all_ids, ids, title)
    return SaliencyMaps(
        ids=all_ids[order],
        boxes=np.concatenate([item[1] for item in gathered])[order],
        attention=np.concatenate([item[2] for item in gathered])[order],
    )


def _loader(
    shard_set: ShardSet,
    ids: NDArray[np.int64],
    crops: CropConfig,
    mode: Mode,
    batch_size: int,
    context: RankContext,
    bank: FeatureCache | None,
) -> Loader | FeatureLoader:
    loader = Loader(
        shard_set,
        ids,
        crops=crops,
        # A batch no larger than the part: padding costs as much as images do.
        batch_size=min(batch_size, -(-len(ids) // context.world_size)),
        mode=mode,
        seed=0,
        rank=context.rank,
        world_size=context.world_size,
        backend=context.backend,
        device=context.device,
        num_threads=context.threads,
    )
    return FeatureLoader(loader, bank, salient=False, device=context.device) if bank else loader


def _bar(loader: Loader | FeatureLoader, title: str, context: RankContext) -> tqdm:
    return tqdm(
        loader.epoch(0),
        total=loader.steps,
        desc=title,
        unit="batch",
        leave=False,
        disable=None if context.progress else True,
    )


def _complete(found: NDArray[np.int64], asked: NDArray[np.int64], title: str) -> NDArray[np.int64]:
    """Positions that sort `found` by id, once it is known to be exactly what was asked for."""
    unique, first = np.unique(found, return_index=True)
    if not np.array_equal(unique, np.unique(asked)):
        missing = np.setdiff1d(asked, unique)
        raise LmclError(
            f"{title}: {len(asked)} images were asked for, {len(unique)} came back; missing ids "
            f"{missing[:5].tolist()}; run `lmcl-shard verify --deep` on the set",
            exit_code=3,
        )
    return first
