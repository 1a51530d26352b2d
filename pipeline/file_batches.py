"""Crops of image files that lie in no shard set, by the loader's own DALI graph.

One decode an image, all crops in one operator. What the graph is not surely right for (formats that
DALI or the GPU's decoder lacks, odd headers, images smaller than a crop) is decoded by Pillow, and
so is every image that DALI fails on: a file has the same pixels whatever else is in its batch.
"""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from pipeline.backends.dali import DaliBackend
from pipeline.backends.select import (
    choose_decode,
    fill_machine_defaults,
    installed_dali,
    is_nvidia,
    resolve_device,
)
from pipeline.boxes import BoxRule, CropConfig, check_boxes, evaluation_boxes, frame_sizes
from pipeline.boxes import scaled_sizes as scaled
from pipeline.decode import decode_rgb, reflect_pad, resize_rgb
from pipeline.decode_config import DEFAULT_DECODE, DecodeConfig
from pipeline.errors import PipelineError
from pipeline.frames import is_endless_jpeg
from pipeline.gpu_formats import decode_road
from pipeline.image_headers import header_size
from pipeline.request import Request, ViewSpec
from shards.errors import ShardError
from shards.image_formats import UNREADABLE, open_image

_MOST_PIXELS = 100_000_000
"""Pixels that are decoded at once; an image of more is decoded alone."""
_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)
_MAY_TURN = (b"eXIf", b"Raw profile type exif", b"tiff:Orientation")
"""In a file that is no JPEG: a word on its orientation, which not every decoder hears."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FileCrops:
    """Crops of a batch of files, one row a file, in their order."""

    crops: UInt8[Tensor, "b v size size 3"]
    """On the device that was asked for; zeros where the file could not be read."""
    boxes: Int32[np.ndarray, "b v 4"]
    """y, x, height, width of each crop in the image's frame (`pipeline.boxes.frame_sizes`)."""
    sizes: Int64[np.ndarray, "b 2"]
    """Height and width after `max_side`; zeros where the file could not be read."""
    full_sizes: Int64[np.ndarray, "b 2"]
    """Height and width of the upright image before `max_side`; zeros where it was not read."""
    gpu_decoded: Bool[np.ndarray, " b"]
    """Which images the GPU decoded; the others have the pixels of the CPU recipes."""
    errors: tuple[str, ...]
    """Why a file could not be read; empty where it could."""


@dataclass(kw_only=True)
class _Rows:
    """A batch on its way to a `FileCrops`."""

    crops: list[Tensor | None]
    boxes: NDArray[np.int32]
    sizes: NDArray[np.int64]
    gpu_decoded: NDArray[np.bool_]
    errors: list[str]
    whole: Tensor | None = None
    """The crops of all rows where one run of DALI's graph made them: no copy is needed."""


class FileDecoder:
    """Decodes batches of files; one call at a time, from whatever thread."""

    def __init__(
        self,
        *,
        crops: CropConfig,
        batch_size: int,
        device: str | torch.device = "cpu",
        decode: DecodeConfig = DEFAULT_DECODE,
        rule: BoxRule | None = None,
    ) -> None:
        """Settle who decodes; DALI's graph is built with the first batch.

        Args:
            crops: Number, size and place of the crops: those of evaluation.
            batch_size: Most files of a call.
            device: Where the crops are wanted; "cuda" is the process's current GPU.
            decode: Which decoder, and its settings.
            rule: Which boxes, `crops.evaluation` per image, in place of the config's.

        Raises:
            PipelineError: If the decoder asked for is not to be had here.
        """
        self._device = resolve_device(device)
        self._crops = crops
        self._rule = rule
        config = fill_machine_defaults(decode)
        self.choice = choose_decode(
            decode, device=self._device, dali=installed_dali(), nvidia=is_nvidia()
        )
        """Which backend and decoder, their recipe, and why."""
        self._reader = _Files()
        self._backend: DaliBackend | None = None
        if self.choice.backend == "dali":
            spec = ViewSpec(
                batch_size=batch_size,
                views=crops.evaluation,
                size=crops.size,
                whole=False,
                scales=crops.scales,
            )
            self._backend = DaliBackend(
                self._reader,
                spec,
                device=self._device,
                decoder=self.choice.decoder,
                # The caller decodes ahead; one batch is in here at a time.
                config=dataclasses.replace(config, prefetch=1),
            )
        self._pool = ThreadPoolExecutor(config.threads, thread_name_prefix="lmcl-decode")
        self._lock = threading.Lock()

    def decode(self, files: Sequence[bytes], keys: Int64[np.ndarray, " b"]) -> FileCrops:
        """Crops of encoded images.

        Args:
            files: At most `batch_size` of them.
            keys: What `seeded` boxes depend on, a number of each image's own.
        """
        rows = _Rows(
            crops=[None] * len(files),
            boxes=np.zeros((len(files), self._crops.evaluation, 4), dtype=np.int32),
            sizes=np.zeros((len(files), 2), dtype=np.int64),
            gpu_decoded=np.zeros(len(files), dtype=bool),
            errors=[""] * len(files),
        )
        with self._lock:
            for_dali = self._sort_out(files, keys, rows)
            by_pillow = [row for row in range(len(files)) if row not in for_dali]
            jobs = [
                self._pool.submit(self._by_pillow, files[row], keys[row : row + 1], rows, row)
                for row in by_pillow
            ]
            for group in _groups(sorted(for_dali), rows.sizes):
                self._by_dali(group, files, keys, rows)
            for job in jobs:
                job.result()
        return self._joined(rows)

    def close(self) -> None:
        """End the threads and give back DALI's memory."""
        self._pool.shutdown(cancel_futures=True)
        if self._backend is not None:
            self._backend.close()

    def __enter__(self) -> "FileDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sort_out(
        self, files: Sequence[bytes], keys: NDArray[np.int64], rows: _Rows
    ) -> frozenset[int]:
        """The rows that DALI decodes, with their boxes and sizes filled in."""
        if self._backend is None:
            return frozenset()
        found = []
        for row, data in enumerate(files):
            size = plain_size(data)
            on_gpu = self.choice.decoder == "gpu"
            if size is None or (on_gpu and decode_road(memoryview(data)) == "pillow"):
                continue
            target = scaled(np.array(size[:1]), np.array(size[1:]), self._crops)[0]
            if (target < self._crops.size).any():
                continue
            rows.sizes[row] = size
            rows.boxes[row] = self._boxes(keys[row : row + 1], size)
            found.append(row)
        return frozenset(found)

    def _boxes(self, key: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.int32]:
        frames = frame_sizes(np.array(size[:1]), np.array(size[1:]), self._crops)
        if self._rule is None:
            return np.asarray(evaluation_boxes(key, frames, self._crops)[0])
        boxes = self._rule(key, frames)
        check_boxes(boxes, key, frames, size=self._crops.size, origin="rule")
        return np.asarray(boxes[0])

    def _by_dali(
        self,
        group: Sequence[int],
        files: Sequence[bytes],
        keys: NDArray[np.int64],
        rows: _Rows,
    ) -> None:
        assert self._backend is not None
        try:
            self._run(self._backend, group, files, rows)
        except PipelineError:
            # Somebody in the group cannot be decoded: each alone, and who fails alone by Pillow.
            # Never the whole group by Pillow: neighbours must not decide about an image's pixels.
            if len(group) == 1:
                self._by_pillow(files[group[0]], keys[group[0] : group[0] + 1], rows, group[0])
                return
            for row in group:
                self._by_dali([row], files, keys, rows)

    def _run(
        self, backend: DaliBackend, group: Sequence[int], files: Sequence[bytes], rows: _Rows
    ) -> None:
        places = np.asarray(group, dtype=np.int64)
        sizes = rows.sizes[places]
        self._reader.files = files
        request = Request(
            step=0,
            ids=places,
            valid=np.ones(len(group), dtype=bool),
            sizes=sizes,
            targets=scaled(sizes[:, 0], sizes[:, 1], self._crops),
            boxes=rows.boxes[places],
        )
        for decoded in backend.run(iter([request])):
            rows.gpu_decoded[places] = decoded.gpu_decoded
            if len(group) == len(files):
                rows.whole = decoded.crops
            for place, crops in zip(group, decoded.crops, strict=True):
                rows.crops[place] = crops

    def _by_pillow(self, data: bytes, key: NDArray[np.int64], rows: _Rows, row: int) -> None:
        try:
            pixels = decode_rgb(data)
        except PipelineError as error:
            rows.errors[row] = str(error)
            rows.sizes[row] = rows.boxes[row] = 0
            return
        size = self._crops.size
        heights, widths = np.array(pixels.shape[:1]), np.array(pixels.shape[1:2])
        (target,) = scaled(heights, widths, self._crops).tolist()
        frame = reflect_pad(resize_rgb(pixels, *target), size)
        rows.sizes[row] = pixels.shape[:2]
        rows.boxes[row] = self._boxes(key, pixels.shape[:2])
        corners = rows.boxes[row, :, :2].tolist()
        cut = np.stack([frame[y : y + size, x : x + size] for y, x in corners])
        rows.crops[row] = torch.from_numpy(cut).to(self._device, non_blocking=True)

    def _joined(self, rows: _Rows) -> FileCrops:
        heights, widths = np.maximum(rows.sizes, 1).T
        sizes = scaled(heights, widths, self._crops)
        sizes[[bool(error) for error in rows.errors]] = 0
        return FileCrops(
            crops=self._stacked(rows.crops) if rows.whole is None else rows.whole,
            boxes=rows.boxes,
            sizes=sizes,
            full_sizes=rows.sizes,
            gpu_decoded=rows.gpu_decoded,
            errors=tuple(rows.errors),
        )

    def _stacked(self, crops: list[Tensor | None]) -> Tensor:
        size, views = self._crops.size, self._crops.evaluation
        shape = (views, size, size, 3)
        nothing = torch.zeros(shape, dtype=torch.uint8, device=self._device)
        if not crops:
            return nothing[None][:0]
        return torch.stack([nothing if crop is None else crop for crop in crops])


class _Files:
    """What the DALI backend reads from: the files at hand, by their place in the batch."""

    def __init__(self) -> None:
        self.files: Sequence[bytes] = ()

    def prefetch(self, ids: Int64[np.ndarray, " b"]) -> None:
        """They are here."""

    def buffer_bytes(self, ids: Int64[np.ndarray, " b"]) -> int:
        """None: DALI reads the files' own memory."""
        return 0

    def read(
        self, ids: Int64[np.ndarray, " b"], *, into: UInt8[np.ndarray, " _bytes"] | None = None
    ) -> list[UInt8[np.ndarray, " _size"]]:
        """The encoded bytes of each."""
        return [np.frombuffer(self.files[row], dtype=np.uint8) for row in ids.tolist()]

    def describe(self, sample: int) -> str:
        """A file's place in the batch."""
        return f"file {sample} of the batch"


def _groups(rows: Sequence[int], sizes: NDArray[np.int64]) -> Iterator[list[int]]:
    """Rows in groups that may be decoded at once."""
    group: list[int] = []
    held = 0
    for row in rows:
        pixels = int(sizes[row].prod())
        if group and held + pixels > _MOST_PIXELS:
            yield group
            group, held = [], 0
        group.append(row)
        held += pixels
    if group:
        yield group


def plain_size(data: bytes) -> tuple[int, int] | None:
    """Height and width of the upright image by its header; None where decoders may differ."""
    stored = header_size(memoryview(data))
    if stored is None:
        return None
    if is_endless_jpeg(np.frombuffer(data, dtype=np.uint8)):
        # DALI would stop at it, and its graph be lost.
        return None
    if data[:2] != b"\xff\xd8":
        return None if any(hint in data for hint in _MAY_TURN) else stored
    try:
        with open_image(data) as opened:
            orientation = opened.getexif().get(_ORIENTATION, 1)
            if (opened.height, opened.width) != stored:
                return None
    except (ShardError, *UNREADABLE):
        return None
    # Pillow takes an orientation from XMP as well, DALI from EXIF alone.
    if orientation != 1 and b"Exif\0\0" not in data:
        return None
    return stored[::-1] if orientation in _TURNED else stored
