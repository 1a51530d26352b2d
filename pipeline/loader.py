"""The loader: batches of crops as a pure function of (seed, epoch, step, rank, world size)."""

import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray

from pipeline.backends.dali import DaliBackend
from pipeline.backends.dali_graph import decodes_rows_only
from pipeline.backends.row_decoder import RowDecoder
from pipeline.backends.select import (
    DecodeChoice,
    choose_decode,
    fill_machine_defaults,
    installed_dali,
    is_nvidia,
    resolve_device,
)
from pipeline.backends.torch_backend import TorchBackend
from pipeline.balanced_sampler import BalancedSampler, score_ranges
from pipeline.batch import BatchSets, CropBatch
from pipeline.boxes import (
    BoxRule,
    CropConfig,
    check_boxes,
    evaluation_boxes,
    frame_sizes,
    random_boxes,
    scaled_sizes,
)
from pipeline.decode_config import DEFAULT_DECODE, DecodeConfig
from pipeline.request import Decoded, Request, ViewSpec
from pipeline.saliency_table import SaliencyTable
from pipeline.sampler import DistributedSampler, SetDraw
from pipeline.shard_reader import ShardReader
from pipeline.validation import check_arguments, codecs_of, usable_ids
from shards.joined import JoinedSet
from shards.read import ShardSet

_log = logging.getLogger(__name__)

Mode = Literal["train", "eval", "global"]
Backend = DaliBackend | TorchBackend


@dataclass(kw_only=True)
class DecodeCounts:
    """Images of a loader so far, by who decoded them; padding counts as well."""

    gpu: int = 0
    cpu: int = 0
    """On the CPU, or on the CPU because the GPU's decoder does not take them."""


def decode_choice(shard_set: ShardSet, decode: DecodeConfig, device: torch.device) -> DecodeChoice:
    """Which decoder a loader of this set would take on this machine, and why.

    Raises:
        PipelineError: If the decoder asked for is not to be had here.
    """
    on_gpu = device.type == "cuda" and decode.decode != "cpu"
    return choose_decode(
        decode,
        device=device,
        dali=installed_dali(),
        nvidia=is_nvidia(),
        codecs=codecs_of(shard_set) if on_gpu else None,
    )


def draw_of_sets(
    joined: JoinedSet, ids: NDArray[np.int64], *, exponent: float, seed: int
) -> SetDraw:
    """How joined sets share an epoch.

    Args:
        joined: The sets.
        ids: Rising ids of all images there are to learn from.
        exponent: See `SetDraw`.
        seed: Of the draw.
    """
    sizes = np.bincount(joined.set_of(ids), minlength=len(joined.sets))
    return SetDraw(sizes=tuple(sizes.tolist()), exponent=exponent, seed=seed)


class Loader:
    """Iterates the crops of some samples of a shard set, epoch by epoch.

    * `train`: shuffled by (seed, epoch); random boxes by (seed, epoch, id), then the salient box if
      the config wants one and the epoch is given a table.
    * `eval`: in the order of `ids`, with boxes that depend on the image alone.
    * `global`: in the order of `ids`; the whole image, resized to `crops.size` without keeping its
      aspect; one view, whose box is the whole image.

    Every rank takes the same number of steps, every batch is full; `valid` marks the padding. A
    batch's crops are its own memory: they may be kept as long as wanted. One epoch may be under way
    at a time per loader; several loaders may live in one process.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        ids: NDArray[np.int64],
        *,
        crops: CropConfig,
        batch_size: int,
        mode: Mode,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: str | torch.device = "cpu",
        decode: DecodeConfig = DEFAULT_DECODE,
        on_error: Literal["fail", "skip"] = "fail",
        rule: BoxRule | None = None,
        balance: int = 0,
        share_exponent: float = 1.0,
    ) -> None:
        """Check the request; nothing is opened or decoded before the first epoch.

        Args:
            shard_set: Where the images are.
            ids: Which of them; in `eval` and `global` also their order.
            crops: Number, size and place of the crops.
            batch_size: Images per rank and step.
            mode: See the class.
            seed: Of order and boxes; unused in `eval` and `global`.
            rank: This process's number, below `world_size`.
            world_size: Processes that share the ids.
            device: Where the crops are wanted; "cuda" is the process's current GPU.
            decode: Which decoder, and its settings; see `choice` for what came of it.
            on_error: What to do about damaged images: `fail`, or `skip` to check all of `ids` by
                their checksums now and leave the damaged ones out, on every rank alike.
            rule: In `eval`: which boxes, `crops.evaluation` per image, in place of the config's.
            balance: In `train`: draw evenly over so many ranges of the score; 0: each image once.
            share_exponent: In `train` on joined sets: how they share an epoch (`SetDraw`).

        Raises:
            ValueError: If an argument makes no sense.
            PipelineError: If there is no sample, or one is not usable and `on_error` is `fail`; if
                the decoder asked for is not to be had here.
        """
        check_arguments(mode, on_error)
        self._set = shard_set
        self._crops = crops
        self._mode = mode
        self._seed = seed
        self._rank = rank
        self._device = resolve_device(device)
        self._decode = fill_machine_defaults(decode)
        self._rule = rule
        self._reader = ShardReader(shard_set)
        self.choice = decode_choice(shard_set, decode, self._device)
        """Which backend and decoder, their recipe, and why."""
        self.ids, self.skipped = usable_ids(shard_set, self._reader, ids, on_error)
        self._joined = shard_set if mode == "train" and isinstance(shard_set, JoinedSet) else None
        self._draw = None
        if self._joined is not None and share_exponent != 1:
            self._draw = draw_of_sets(self._joined, self.ids, exponent=share_exponent, seed=seed)
        self._drawn: tuple[int, NDArray[np.int64]] | None = None
        self._sampler: DistributedSampler | BalancedSampler
        if balance and mode == "train":
            self._sampler = BalancedSampler(
                ranges=score_ranges(shard_set.samples.mos[self.ids], balance),
                batch_size=batch_size,
                world_size=world_size,
                seed=seed,
            )
        else:
            self._sampler = DistributedSampler(
                samples=sum(self._draw.counts) if self._draw else len(self.ids),
                batch_size=batch_size,
                world_size=world_size,
                seed=seed,
                shuffle=mode == "train",
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} was asked of a world of {world_size}")
        self._backend: Backend | None = None
        self._spec: ViewSpec | None = None
        self._running: Generator[CropBatch, None, None] | None = None
        self.wait_s = 0.0
        self.decoded = DecodeCounts()
        _log.info("loader %s: decode %s (%s)", mode, self.recipe, self.choice.reason)

    @property
    def steps(self) -> int:
        """Steps of an epoch, the same on every rank."""
        return self._sampler.steps

    def __len__(self) -> int:
        return self.steps

    @property
    def recipe(self) -> str:
        """Decoder and version; see `pipeline.decode_config.same_pixels`."""
        return self.choice.recipe

    def epoch(
        self, epoch: int, *, start: int = 0, saliency: SaliencyTable | None = None
    ) -> Iterator[CropBatch]:
        """The batches of one epoch for this rank, from step `start` on.

        Args:
            epoch: Which; any number, in any order.
            start: First step; a run that goes on begins where it stopped.
            saliency: Salient boxes, used in `train` if the config wants them.

        Raises:
            ValueError: If there is no such step.
            PipelineError: If an image or a shard is not what the manifest says; names it.
        """
        if not 0 <= start <= self.steps:
            raise ValueError(f"start is step {start}, but an epoch has {self.steps} steps")
        self._leave_epoch()
        self._running = self._iterate(epoch, start, saliency if self._crops.salient else None)
        return self._running

    def _leave_epoch(self) -> None:
        # Two epochs cannot share the backend; starting one ends the other.
        if self._running is not None:
            self._running.close()
            self._running = None

    def _iterate(
        self, epoch: int, start: int, saliency: SaliencyTable | None
    ) -> Generator[CropBatch, None, None]:
        self._reader.recheck()
        backend = self._ready_backend(with_salient=saliency is not None)
        requests = (
            self.request(epoch, step, saliency=saliency) for step in range(start, self.steps)
        )
        ready = backend.run(requests)
        try:
            while True:
                began = time.perf_counter()
                decoded = next(ready, None)
                self.wait_s += time.perf_counter() - began
                if decoded is None:
                    break
                self._count(decoded)
                yield self.batch(
                    decoded.request, decoded.crops, epoch, gpu_decoded=decoded.gpu_decoded
                )
        finally:
            ready.close()
        if self.skipped.size:
            _log.warning(
                "%s: %d damaged images were left out of epoch %d: ids %s",
                self._set.name,
                self.skipped.size,
                epoch,
                ", ".join(str(sample) for sample in self.skipped[:8].tolist()),
            )

    def _count(self, decoded: Decoded) -> None:
        on_gpu = int(np.count_nonzero(decoded.gpu_decoded))
        self.decoded.gpu += on_gpu
        self.decoded.cpu += len(decoded.gpu_decoded) - on_gpu

    def request(self, epoch: int, step: int, *, saliency: SaliencyTable | None = None) -> Request:
        """What this rank takes in a step, without decoding anything; a pure function.

        Raises:
            PipelineError: If the saliency table lacks a sample or a box lies outside its image.
        """
        positions, valid = self._sampler.batch(epoch=epoch, step=step, rank=self._rank)
        ids = self._ids_of(epoch)[positions]
        table = self._set.samples
        heights, widths = table.height[ids], table.width[ids]
        sizes = scaled_sizes(heights, widths, None)
        if self._mode == "global":
            boxes = np.zeros((len(ids), 1, 4), dtype=np.int32)
            boxes[:, 0, 2:] = sizes
            return Request(step=step, ids=ids, valid=valid, sizes=sizes, targets=sizes, boxes=boxes)
        frames = frame_sizes(heights, widths, self._crops)
        return Request(
            step=step,
            ids=ids,
            valid=valid,
            sizes=sizes,
            targets=scaled_sizes(heights, widths, self._crops),
            boxes=self._boxes(ids, frames, epoch, saliency, self._repeats(epoch, step)),
        )

    def _repeats(self, epoch: int, step: int) -> Int64[np.ndarray, " b"] | None:
        """How often each image of a step was drawn in the epoch before; None: no image is twice."""
        if not isinstance(self._sampler, BalancedSampler):
            return None
        return self._sampler.repeats(epoch=epoch, step=step, rank=self._rank)

    def _ids_of(self, epoch: int) -> NDArray[np.int64]:
        """The ids an epoch goes over, in their order before shuffling."""
        if self._draw is None:
            return self.ids
        if self._drawn is None or self._drawn[0] != epoch:
            self._drawn = (epoch, self.ids[self._draw.positions(epoch)])
        return self._drawn[1]

    def _sets_of(self, request: Request, epoch: int) -> BatchSets | None:
        """Whose images those of a request are; None if they are all of one set."""
        if self._joined is None:
            return None
        ids, sets = self._ids_of(epoch), range(len(self._joined.sets))
        by_rank = []
        for rank in range(self._sampler.world_size):
            positions, valid = self._sampler.batch(epoch=epoch, step=request.step, rank=rank)
            numbers = self._joined.set_of(ids[positions[valid]])
            by_rank.append(np.bincount(numbers, minlength=len(sets)).tolist())
        number = self._joined.set_of(request.ids)
        return BatchSets(
            number=self._put(number),
            rows=tuple(self._put(np.flatnonzero(request.valid & (number == k))) for k in sets),
            images_by_rank=tuple(tuple(counts[k] for counts in by_rank) for k in sets),
        )

    def _put(self, array: NDArray[np.generic]) -> torch.Tensor:
        """An array on the loader's device."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._device.type == "cuda":
            # From memory that is not pinned the host waits for the copy.
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)

    def _boxes(
        self,
        ids: Int64[np.ndarray, " b"],
        frames: Int64[np.ndarray, "b 2"],
        epoch: int,
        saliency: SaliencyTable | None,
        repeats: Int64[np.ndarray, " b"] | None,
    ) -> NDArray[np.int32]:
        crops = self._crops
        if self._mode == "eval":
            if self._rule is None:
                return evaluation_boxes(ids, frames, crops)
            boxes = self._rule(ids, frames)
            check_boxes(boxes, ids, frames, size=crops.size, origin="rule")
            return boxes
        boxes = random_boxes(
            ids,
            frames,
            size=crops.size,
            count=crops.random,
            seed=self._seed,
            epoch=epoch,
            pool=crops.pool,
            repeats=repeats,
        )
        if saliency is None:
            return boxes
        salient = saliency.lookup(ids)[:, None, :]
        check_boxes(salient, ids, frames, size=crops.size, origin="saliency table")
        return np.concatenate([boxes, salient], axis=1)

    def batch(
        self,
        request: Request,
        crops: torch.Tensor,
        epoch: int,
        *,
        gpu_decoded: Bool[np.ndarray, " b"] | None = None,
    ) -> CropBatch:
        """What the loader yields for a request once its crops are there."""
        raw = self._set.samples.mos[request.ids]
        score = self._set.score
        unit = raw if score is None else score.to_unit(raw)

        return CropBatch(
            crops=crops,
            boxes=self._put(request.boxes),
            mos=self._put(np.asarray(unit, dtype=np.float32)),
            ids=self._put(request.ids),
            valid=self._put(request.valid),
            images=int(request.valid.sum()),
            images_of_all_ranks=self._sampler.images(step=request.step),
            epoch=epoch,
            step=request.step,
            gpu_decoded=gpu_decoded,
            sets=self._sets_of(request, epoch),
        )

    def close(self) -> None:
        """Give back threads, buffers and files; may be called twice."""
        self._leave_epoch()
        if self._backend is not None:
            self._backend.close()
            self._backend = None
        self._reader.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _ready_backend(self, *, with_salient: bool) -> Backend:
        crops, mode = self._crops, self._mode
        views = {"eval": crops.evaluation, "global": 1, "train": crops.random + with_salient}[mode]
        spec = ViewSpec(
            batch_size=self._sampler.batch_size,
            views=views,
            size=crops.size,
            whole=mode == "global",
            scales=crops.scales and mode != "global",
        )
        if self._backend is not None and spec == self._spec:
            return self._backend
        if self._backend is not None:
            self._backend.close()
        self._spec = spec
        self._backend = self._make_backend(spec)
        return self._backend

    def _cuts_files(self, spec: ViewSpec) -> bool:
        """Whether crops are to come from files that need no decoding (decision 0309)."""
        return decodes_rows_only(spec, self.choice.decoder) and "bmp" in codecs_of(self._set)

    def _make_backend(self, spec: ViewSpec) -> Backend:
        uses_dali = self.choice.backend == "dali"
        if uses_dali and not self._cuts_files(spec):
            return DaliBackend(
                self._reader,
                spec,
                device=self._device,
                decoder=self.choice.decoder,
                config=self._decode,
            )
        return TorchBackend(
            self._reader,
            spec,
            device=self._device,
            num_threads=self._decode.threads or 1,
            prefetch=self._decode.prefetch,
            decoder=RowDecoder() if uses_dali else None,
        )
