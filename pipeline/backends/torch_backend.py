"""Crops made on the CPU by threads: each decodes an image and cuts it while it is in the cache.

DALI's decoder (nvImageCodec) or, where there is no DALI, Pillow decodes; the pixels are the same.
Threads rather than DataLoader workers: decoders and numpy let go of the interpreter while they
work, nothing is copied between processes, and no worker can be left behind (docs/decisions/0303).
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor

from pipeline.backends.row_decoder import RowDecoder
from pipeline.bmp import read_bmp_rows
from pipeline.buffer_pool import BufferPool
from pipeline.decode import PILLOW_RECIPE, resize_rgb
from pipeline.errors import LEAVE_OUT, PipelineError
from pipeline.frames import frame_pixels, is_endless_jpeg
from pipeline.image_headers import header_size
from pipeline.request import Decoded, Request, ViewSpec
from pipeline.shard_reader import ShardReader


class TorchBackend:
    """Crops from a pool of threads, prefetched."""

    recipe = PILLOW_RECIPE

    def __init__(
        self,
        reader: ShardReader,
        spec: ViewSpec,
        *,
        device: torch.device,
        num_threads: int,
        prefetch: int,
        decoder: RowDecoder | None = None,
    ) -> None:
        """Start the threads.

        Args:
            reader: Of the encoded images.
            spec: Shape of a batch.
            device: Where the crops are wanted.
            num_threads: Threads that decode and cut.
            prefetch: Batches worked on ahead of the one in use.
            decoder: What decodes the rows needed of a plain file; None: Pillow decodes all of it.
        """
        self._reader = reader
        self._spec = spec
        self._device = device
        self._prefetch = prefetch
        self._num_threads = num_threads
        self._decoder = decoder
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lmcl-decode")
        self._shape = (spec.batch_size, spec.views, spec.size, spec.size, 3)
        # As many as are worked on, the one in use, and one that is let go of a little later.
        self._buffers = BufferPool(self._shape, spare=prefetch + 2)
        self._thread = threading.local()
        if decoder is None:
            _keep_pillow_blocks(num_threads)

    def run(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """Yield each request with its crops on the device; every batch has memory of its own.

        Raises:
            PipelineError: Naming the sample that cannot be decoded, or a shard that cannot be read.
        """
        begun: deque[tuple[Request, Tensor, list[Future[None]]]] = deque()
        try:
            for request in requests:
                begun.append(self._begin(request))
                if len(begun) > self._prefetch:
                    yield self._finish(*begun.popleft())
            while begun:
                yield self._finish(*begun.popleft())
        finally:
            jobs = [job for _, _, jobs in begun for job in jobs]
            for job in jobs:
                job.cancel()

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, request: Request) -> tuple[Request, Tensor, list[Future[None]]]:
        crops = self._batch_memory()
        self._reader.prefetch(request.ids)
        target, count = crops.numpy(), len(request.ids)
        # A job for each image would cost as much again as the Python of cutting it does.
        step = max(count // (4 * self._num_threads), 1)
        chunks = [range(first, min(first + step, count)) for first in range(0, count, step)]
        jobs = [self._pool.submit(self._fill_rows, request, rows, target) for rows in chunks]
        return request, crops, jobs

    def _finish(self, request: Request, crops: Tensor, jobs: list[Future[None]]) -> Decoded:
        for job in jobs:
            job.result()
        return Decoded(
            request=request,
            crops=crops.to(self._device, non_blocking=True),
            gpu_decoded=np.zeros(len(request.ids), dtype=bool),
        )

    def _batch_memory(self) -> UInt8[Tensor, "b v s s 3"]:
        if self._device.type == "cuda":
            # torch keeps pinned memory, and knows when a copy out of it is over.
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        return self._buffers.take()

    def _fill_rows(
        self, request: Request, rows: Iterable[int], target: UInt8[np.ndarray, "b v s s 3"]
    ) -> None:
        for row in rows:
            self._fill(request, row, target[row])

    def _fill(self, request: Request, row: int, out: UInt8[np.ndarray, "v s s 3"]) -> None:
        data, spec = self._read(request.ids[row : row + 1]), self._spec
        if spec.whole:
            out[0] = resize_rgb(self._frame(request, row, data), spec.size, spec.size)
            return
        corners = request.boxes[row, :, :2]
        top, bottom = int(corners[:, 0].min()), int(corners[:, 0].max()) + spec.size
        rows = self._plain_rows(request, row, data, top=top, bottom=bottom)
        if rows is None:
            rows = self._frame(request, row, data)[top:bottom]
        for view, (y, x) in enumerate(corners.tolist()):
            out[view] = rows[y - top : y - top + spec.size, x : x + spec.size]

    def _read(self, ids: Int64[np.ndarray, " one"]) -> UInt8[np.ndarray, " _size"]:
        """One encoded image, in memory that the thread uses again for its next."""
        needed = self._reader.buffer_bytes(ids)
        buffer: UInt8[np.ndarray, " _bytes"] | None = getattr(self._thread, "buffer", None)
        if buffer is None or buffer.size < needed:
            self._thread.buffer = buffer = np.empty(needed + needed // 4, dtype=np.uint8)
        return self._reader.read(ids, into=buffer)[0]

    def _plain_rows(
        self,
        request: Request,
        row: int,
        data: UInt8[np.ndarray, " _size"],
        *,
        top: int,
        bottom: int,
    ) -> UInt8[np.ndarray, "rows width 3"] | None:
        """Rows of an image that needs no resizing and no padding; None if it takes Pillow."""
        height, width = request.sizes[row].tolist()
        if request.targets[row].tolist() != [height, width] or min(height, width) < self._spec.size:
            return None
        rows = read_bmp_rows(data, size=(height, width), top=top, bottom=bottom)
        if rows is not None or self._decoder is None:
            return rows
        if sorted(header_size(data.data) or ()) != sorted((height, width)):
            return None
        # Decoded to where it ends, a JPEG that was cut off is found wherever the boxes are.
        first, last = (0, height) if is_endless_jpeg(data) else (top, bottom)
        rows = self._decoder.decode_rows(data, size=(height, width), top=first, bottom=last)
        if rows is None:
            self._explain(request, row, data)
        else:
            rows = rows[top - first : bottom - first]
        return rows

    def _explain(self, request: Request, row: int, data: UInt8[np.ndarray, " _size"]) -> None:
        """Raise what is wrong with an image that the decoder refuses."""
        self._frame(request, row, data)
        sample = int(request.ids[row])
        raise PipelineError(
            f"{self._reader.describe(sample)}: DALI cannot decode it, though Pillow can; store the "
            'image anew and pack the set again, or set runtime.backend = "torch" (of a Loader: '
            'backend="torch")',
            exit_code=3,
            ids=(sample,),
        )

    def _frame(
        self, request: Request, row: int, data: UInt8[np.ndarray, " _size"]
    ) -> UInt8[np.ndarray, "y x 3"]:
        """The whole image by Pillow, resized and padded as the request has it."""
        height, width = request.sizes[row].tolist()
        tall, wide = request.targets[row].tolist()
        crop = 1 if self._spec.whole else self._spec.size
        try:
            return frame_pixels(
                data.tobytes(), size=(height, width), target=(tall, wide), crop=crop
            )
        except PipelineError as error:
            sample = int(request.ids[row])
            raise PipelineError(
                f"{self._reader.describe(sample)}: {error}; run `lmcl-shard verify --deep`; "
                f"{LEAVE_OUT}",
                exit_code=3,
                ids=(sample,),
            ) from error


def _keep_pillow_blocks(count: int) -> None:
    """Let Pillow keep the memory of as many images as are decoded at a time.

    Otherwise malloc gives it back to the system after each and faults it in again: 2260 page
    faults and half of the processor time for an image of 1024 x 768.
    """
    core: Any = Image.core  # type: ignore[attr-defined]
    core.set_blocks_max(max(core.get_blocks_max(), count))
