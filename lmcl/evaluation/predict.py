"""Predictions and saliency maps of a model over a part of a set, complete and without repeats."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray

from lmcl.distributed import RankContext
from lmcl.errors import LmclError
from lmcl.evaluation.calibration import image_spread, pooled_deviation
from lmcl.models.preprocess import Preprocessing, autocast, preprocess
from lmcl.models.quality_model import QualityModel, StudentOutput
from lmcl.models.saliency import SaliencyConfig, best_window, window_to_box
from pipeline.backends.select import DecodeChoice
from pipeline.batch import CropBatch
from pipeline.boxes import CropConfig, scaled_sizes
from pipeline.loader import Loader, Mode
from pipeline.saliency_table import SaliencyTable
from shards.progress import progress_bar
from shards.read import ShardSet

Output = TypeVar("Output")


@runtime_checkable
class CropLoader(Protocol):
    """What training and evaluation need of a loader; `pipeline.loader.Loader` is one."""

    choice: DecodeChoice
    """Which decoder was taken, and why."""
    wait_s: float
    """Seconds spent waiting for batches so far."""

    @property
    def recipe(self) -> str:
        """Decoder and version (docs/loader.md)."""

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""

    def epoch(
        self, epoch: int, *, start: int = 0, saliency: SaliencyTable | None = None
    ) -> Iterator[CropBatch]:
        """The batches of one epoch from step `start` on."""

    def close(self) -> None:
        """Give back threads and files."""


@runtime_checkable
class CropSource(Protocol):
    """Where crops for evaluation and saliency come from: decoded pixels, or kept features."""

    @property
    def shard_set(self) -> ShardSet:
        """The set the images are of."""

    def open_loader(
        self, ids: NDArray[np.int64], *, crops: CropConfig, mode: Mode, batch_size: int
    ) -> CropLoader:
        """A loader over `ids` in order, `batch_size` images a rank and step."""


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """Crops decoded from a shard set."""

    shard_set: ShardSet
    context: RankContext

    def open_loader(
        self, ids: NDArray[np.int64], *, crops: CropConfig, mode: Mode, batch_size: int
    ) -> CropLoader:
        """A loader over `ids` in order; no batch is larger than a rank's share of them."""
        context = self.context
        return Loader(
            self.shard_set,
            ids,
            crops=crops,
            # Padding costs as much as images do.
            batch_size=min(batch_size, -(-len(ids) // context.world_size)),
            mode=mode,
            seed=0,
            rank=context.rank,
            world_size=context.world_size,
            device=context.device,
            decode=context.decode,
        )


@dataclass(frozen=True, kw_only=True)
class PartPredictions:
    """Predictions of a model on a part, sorted by id."""

    ids: NDArray[np.int64]
    """[n]"""
    score: NDArray[np.float64]
    """[n] mean over the evaluation crops, [0, 1] units, higher = better."""
    embedding: NDArray[np.float32]
    """[n, d] unit-length mean over the crops."""
    crops: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    """[n, v] quality of every crop, in the order of `evaluation_boxes`; empty if not known."""
    deviation: NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))
    """[n] predicted deviation of the ratings, [0, 1] units; empty of a model that gives none."""
    decode: str = ""
    """The decode recipe (docs/loader.md); two scores are comparable if it is the same for both."""

    @property
    def spread(self) -> NDArray[np.float64]:
        """[n] how far each score may be off, for intervals: see `calibration.image_spread`."""
        return image_spread(self.crops, self.deviation if len(self.deviation) else None)

    def take(self, keep: NDArray[np.bool_]) -> "PartPredictions":
        """Some of the images, by a mask."""
        return replace(
            self,
            ids=self.ids[keep],
            score=self.score[keep],
            embedding=self.embedding[keep],
            crops=self.crops[keep] if len(self.crops) else self.crops,
            deviation=self.deviation[keep] if len(self.deviation) else self.deviation,
        )


@dataclass(frozen=True, kw_only=True)
class SaliencyMaps:
    """Salient crops and CLS attention of a part, sorted by id."""

    ids: NDArray[np.int64]
    """[n]"""
    boxes: NDArray[np.int32]
    """[n, 4] salient crop (y, x, h, w)."""
    attention: NDArray[np.float32]
    """[n, g, g] CLS attention; empty if not asked for."""


@runtime_checkable
class SaliencyModel(Protocol):
    """CLS attention over whole images: a teacher's, or an encoder's."""

    def __call__(self, pixels: torch.Tensor, /, *, layers: int) -> torch.Tensor:
        """Attention maps [b, g, g] of normalised views [b, 3, s, s]."""


def predict(
    model: QualityModel,
    source: CropSource,
    ids: NDArray[np.int64],
    *,
    crops: CropConfig,
    preprocessing: Preprocessing,
    context: RankContext,
    batch_size: int,
    title: str,
) -> PartPredictions:
    """Predictions for every image of a part from its evaluation crops, the same on every rank.

    Raises:
        LmclError: If the gathered predictions are not exactly the part (exit code 3).
    """
    model.eval()
    found = []
    batches = source.open_loader(ids, crops=crops, mode="eval", batch_size=batch_size)
    with closing(batches) as loader:
        for batch, output in _outputs(model, loader, preprocessing, context, title):
            images = len(batch.ids)
            crop_scores = output.score.double().reshape(images, -1)
            score = crop_scores.mean(dim=1)
            mean = output.embedding.float().reshape(images, -1, output.embedding.shape[-1]).mean(1)
            embedding = torch.nn.functional.normalize(mean, dim=-1)
            rows = (batch.ids, score, embedding, crop_scores, _deviation(output, crop_scores))
            found.append(tuple(column[batch.valid].cpu().numpy() for column in rows))
        recipe = loader.recipe
    part_ids, scores, embeddings, crop_table, deviation = _gather(found, ids, context, title)
    return PartPredictions(
        ids=part_ids,
        score=scores,
        embedding=embeddings,
        crops=crop_table,
        deviation=deviation[:, 0] if deviation.shape[1] else np.zeros(0),
        decode=recipe,
    )


def _deviation(output: StudentOutput, crops: torch.Tensor) -> torch.Tensor:
    """Deviation of each image's ratings, `[b, 1]`; `[b, 0]` of a model that gives none."""
    of_crops = output.deviation
    if of_crops is None:
        return crops.new_zeros(len(crops), 0)
    found = pooled_deviation(
        of_crops.double().reshape(crops.shape).cpu().numpy(), crops.cpu().numpy()
    )
    return torch.from_numpy(found)[:, None].to(crops.device)


def compute_saliency(
    model: SaliencyModel,
    source: CropSource,
    ids: NDArray[np.int64],
    *,
    saliency: SaliencyConfig,
    crops: CropConfig,
    preprocessing: Preprocessing,
    context: RankContext,
    keep_attention: bool,
    title: str,
) -> SaliencyMaps:
    """Saliency pass: the salient box of every image of a part, the same on every rank.

    One squeezed view of each image is dealt to the ranks, and the boxes are gathered once.

    Raises:
        LmclError: If the gathered boxes are not exactly the part (exit code 3).

    Source: [Local Manifold Learning, 2024], section on the teacher's visual saliency.
    """

    def attend(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels, layers=saliency.layers)

    view = CropConfig(size=saliency.view, salient=False)
    samples, size = source.shard_set.samples, saliency.batch_size
    found = []
    batches = source.open_loader(ids, crops=view, mode="global", batch_size=size)
    with closing(batches) as loader:
        for batch, output in _outputs(attend, loader, preprocessing, context, title):
            keep = batch.valid.cpu()
            maps = output.float().cpu()[keep]
            shown = batch.ids.cpu()[keep].numpy()
            boxes = window_to_box(
                best_window(maps, saliency.window).numpy(),
                scaled_sizes(samples.height[shown], samples.width[shown], crops),
                grid=maps.shape[-1],
                window=saliency.window,
                size=crops.size,
            )
            kept = maps.numpy() if keep_attention else np.zeros((len(maps), 0, 0), np.float32)
            found.append((shown, boxes, kept))
    part_ids, boxes, attention = _gather(found, ids, context, title)
    return SaliencyMaps(ids=part_ids, boxes=boxes, attention=attention)


def _outputs(
    network: Callable[[torch.Tensor], Output],
    loader: CropLoader,
    preprocessing: Preprocessing,
    context: RankContext,
    title: str,
) -> Iterator[tuple[CropBatch, Output]]:
    """Each batch of a pass and what the network makes of it, without gradients."""
    bar = progress_bar(
        loader.epoch(0),
        total=loader.steps,
        desc=title,
        unit="batch",
        leave=False,
        off=not context.progress,
    )
    for batch in bar:
        with torch.no_grad(), autocast(context.device, preprocessing.precision):
            output = network(preprocess(batch.crops, preprocessing))
        yield batch, output


def _gather(
    found: Sequence[tuple[NDArray[Any], ...]],
    asked: NDArray[np.int64],
    context: RankContext,
    title: str,
) -> tuple[NDArray[Any], ...]:
    """Columns of all ranks, ids first, sorted by id once they are known to be what was asked."""
    gathered = gather_object(found) if context.world_size > 1 else found
    columns = [np.concatenate(parts) for parts in zip(*gathered, strict=True)]
    unique, first = np.unique(columns[0], return_index=True)
    if not np.array_equal(unique, np.unique(asked)):
        missing = np.setdiff1d(asked, unique)
        raise LmclError(
            f"{title}: {len(asked)} images were asked for, {len(unique)} came back; missing ids "
            f"{missing[:5].tolist()}; run `lmcl-shard verify --deep` on the set",
            exit_code=3,
        )
    return tuple(column[first] for column in columns)
