"""The same batches without DALI: Pillow decodes, numpy cuts, threads share the work.

The parity reference, and what runs where there is no DALI. Threads rather than DataLoader workers:
Pillow and numpy let go of the interpreter while they work, nothing is copied between processes, and
no worker can be left behind (docs/decisions/0303).
"""

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import __version__ as _pillow_version
from torch import Tensor

from pipeline.decode import resize_rgb
from pipeline.errors import LEAVE_OUT, PipelineError
from pipeline.frames import frame_pixels
from pipeline.request import Decoded, Request, ViewSpec
from pipeline.shard_reader import ShardReader


class TorchBackend:
    """Crops from a pool of threads, prefetched."""

    recipe = f"torch-pillow-{'.'.join(_pillow_version.split('.')[:2])}"

    def __init__(
        self,
        reader: ShardReader,
        spec: ViewSpec,
        *,
        device: torch.device,
        num_threads: int,
        prefetch: int,
    ) -> None:
        self._reader = reader
        self._spec = spec
        self._device = device
        self._prefetch = prefetch
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="lmcl-decode")

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
        spec = self._spec
        shape = (spec.batch_size, spec.views, spec.size, spec.size, 3)
        crops = torch.empty(shape, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        self._reader.prefetch(request.ids)
        target = crops.numpy()
        jobs = [
            self._pool.submit(self._fill, request, row, target[row])
            for row in range(len(request.ids))
        ]
        return request, crops, jobs

    def _finish(self, request: Request, crops: Tensor, jobs: list[Future[None]]) -> Decoded:
        for job in jobs:
            job.result()
        return Decoded(
            request=request,
            crops=crops.to(self._device, non_blocking=True),
            gpu_decoded=np.zeros(len(request.ids), dtype=bool),
        )

    def _fill(self, request: Request, row: int, out: UInt8[np.ndarray, "v s s 3"]) -> None:
        (data,) = self._reader.read(request.ids[row : row + 1])
        spec, sample = self._spec, int(request.ids[row])
        height, width = request.sizes[row].tolist()
        tall, wide = request.targets[row].tolist()
        least = 1 if spec.whole else spec.size
        try:
            frame = frame_pixels(
                data.tobytes(), size=(height, width), target=(tall, wide), crop=least
            )
        except PipelineError as error:
            raise PipelineError(
                f"{self._reader.describe(sample)}: {error}; run `lmcl-shard verify --deep`; "
                f"{LEAVE_OUT}",
                exit_code=3,
                ids=(sample,),
            ) from error
        if spec.whole:
            out[0] = resize_rgb(frame, spec.size, spec.size)
            return
        for view, (y, x) in enumerate(request.boxes[row, :, :2].tolist()):
            out[view] = frame[y : y + spec.size, x : x + spec.size]
