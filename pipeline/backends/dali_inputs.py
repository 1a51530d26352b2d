"""Prefetching DALI's inputs: read ahead by threads, kept alive while DALI reads them."""

import functools
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64, UInt8

from pipeline.decode_config import Decoder
from pipeline.errors import LEAVE_OUT, PipelineError
from pipeline.frames import frame_pixels, is_endless_jpeg, needs_preparation, wrap_ppm
from pipeline.gpu_formats import Road, decode_road
from pipeline.request import EncodedReader, Request, ViewSpec


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The arrays of one request; DALI reads them in place, so they must outlive its work."""

    buffer: UInt8[np.ndarray, " _bytes"]
    """Memory that most of `encoded` lies in."""
    encoded: list[UInt8[np.ndarray, " _size"]]
    corners: Int32[np.ndarray, "b v 2"]
    """y, x of each crop within the rows that are decoded."""
    starts: Int32[np.ndarray, "b 2"]
    """y, x where the decoded part of each image begins; x is 0."""
    extents: Int32[np.ndarray, "b 2"]
    """Height and width of the decoded part; the width is the image's."""
    sizes: Int64[np.ndarray, "b 2"]
    """Height and width that each image must decode to."""
    targets: Float32[np.ndarray, "b 2"]
    """Height and width after `max_side`."""
    gpu_decoded: Bool[np.ndarray, " b"]
    """Which images the GPU decodes."""


class ExternalSource:
    """The callback of `fn.external_source`; the queue behind it changes with every epoch."""

    def __init__(self) -> None:
        self.queue: InputQueue | None = None

    def __call__(self) -> tuple[Any, ...]:
        """The arrays of the next request, in the order of the graph's inputs."""
        if self.queue is None:
            raise StopIteration
        return self.queue.next_inputs()


class InputQueue:
    """Prefetch queue of the requests: being read, then inside DALI, then delivered."""

    def __init__(
        self,
        reader: EncodedReader,
        spec: ViewSpec,
        readers: ThreadPoolExecutor,
        requests: Iterator[Request],
        *,
        ahead: int,
        decoder: Decoder,
        rows_only: bool,
        buffers: deque[UInt8[np.ndarray, " _bytes"]],
    ) -> None:
        self._reader = reader
        self._spec = spec
        self._decoder = decoder
        self._rows_only = rows_only
        self._readers = readers
        self._requests = requests
        self._ahead = ahead + 1
        self._reading: deque[tuple[Request, Future[Inputs]]] = deque()
        self._submitted: deque[tuple[Request, Inputs]] = deque()
        # On a GPU an output may be handed out before its inputs were read: keep some longer.
        self._delivered: deque[Inputs] = deque()
        self._held_back = ahead + 2
        self._free = buffers
        self._lock = threading.Lock()

    def next_inputs(self) -> tuple[Any, ...]:
        """Hand the next request to DALI and start reading one more.

        Raises:
            StopIteration: After the last one.
            PipelineError: If it could not be read.
        """
        with self._lock:
            while len(self._reading) < self._ahead:
                request = next(self._requests, None)
                if request is None:
                    break
                self._reader.prefetch(request.ids)
                job = self._readers.submit(self._read, request)
                self._reading.append((request, job))
            if not self._reading:
                raise StopIteration
            request, job = self._reading.popleft()
        try:
            inputs = job.result()
        finally:
            # An error holds this frame, and the job the error: a circle around DALI's threads.
            del job
        self._submitted.append((request, inputs))
        if self._spec.whole:
            return (inputs.encoded,)
        indices = _indices(self._spec)[: len(request.ids)]
        arrays: tuple[Any, ...] = (inputs.encoded, inputs.corners, indices)
        if self._spec.scales:
            return (*arrays, inputs.targets)
        return (*arrays, inputs.starts, inputs.extents) if self._rows_only else arrays

    def _read(self, request: Request) -> Inputs:
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = None
        return _read_inputs(
            self._reader,
            request,
            self._spec,
            buffer,
            decoder=self._decoder,
            rows_only=self._rows_only,
        )

    def take(self) -> tuple[Request, Inputs]:
        """The request that DALI's next output belongs to, and what it was made from."""
        request, inputs = self._submitted.popleft()
        self._delivered.append(inputs)
        if len(self._delivered) > self._held_back:
            self._free.append(self._delivered.popleft().buffer)
        return request, inputs

    def in_flight(self) -> list[tuple[Request, Inputs]]:
        """What DALI has not given back yet, oldest first."""
        return list(self._submitted)

    def recycle(self) -> None:
        """Offer the memory of all inputs for new ones, once DALI has finished with them."""
        self._free.extend(inputs.buffer for inputs in self._delivered)
        self._delivered.clear()

    def cancel(self) -> None:
        """Read no more."""
        for _, job in self._reading:
            job.cancel()
        self._reading.clear()


@functools.lru_cache(maxsize=8)
def _indices(spec: ViewSpec) -> Int32[np.ndarray, "b v"]:
    """multi_paste takes all views of an image from that image's place in the batch."""
    rows = np.arange(spec.batch_size, dtype=np.int32)
    return np.ascontiguousarray(np.repeat(rows[:, None], spec.views, axis=1))


def _read_inputs(
    reader: EncodedReader,
    request: Request,
    spec: ViewSpec,
    buffer: UInt8[np.ndarray, " _bytes"] | None,
    *,
    decoder: Decoder,
    rows_only: bool,
) -> Inputs:
    needed = reader.buffer_bytes(request.ids)
    if buffer is None or buffer.size < needed:
        # A quarter more than needed now, so that most later batches fit in as well.
        buffer = np.empty(needed + needed // 4, dtype=np.uint8)
    encoded = reader.read(request.ids, into=buffer)
    sizes, targets = request.sizes.copy(), request.targets.copy()
    least = 1 if spec.whole else spec.size
    roads = [_road(data, decoder) for data in encoded]
    prepared = needs_preparation(encoded, sizes, targets, least)
    prepared |= np.asarray([road == "pillow" for road in roads], dtype=bool)
    for row in np.flatnonzero(prepared).tolist():
        pixels = _prepare(reader, request, row, encoded[row], least)
        encoded[row] = wrap_ppm(pixels)
        sizes[row] = targets[row] = pixels.shape[:2]
    starts, extents = np.zeros_like(sizes), sizes.copy()
    if rows_only:
        starts[:, 0], extents[:, 0] = _rows_needed(request, sizes, encoded)
    corners = np.ascontiguousarray(request.boxes[..., :2] - starts[:, None, :], dtype=np.int32)
    return Inputs(
        buffer=buffer,
        encoded=encoded,
        corners=corners,
        starts=starts.astype(np.int32),
        extents=extents.astype(np.int32),
        sizes=sizes,
        targets=targets.astype(np.float32),
        gpu_decoded=np.asarray([road == "gpu" for road in roads], dtype=bool) & ~prepared,
    )


def _road(data: UInt8[np.ndarray, " _size"], decoder: Decoder) -> Road:
    return "dali" if decoder == "cpu" else decode_road(data.data)


def _rows_needed(
    request: Request, sizes: Int64[np.ndarray, "b 2"], encoded: list[UInt8[np.ndarray, " _size"]]
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """First row and number of rows that an image's boxes lie in.

    A JPEG's rows above are only skimmed and those below are not read at all; the rest keeps its
    bits, whatever the subsampling (`test_rows_of_an_image_are_those_of_the_whole`). One without an
    end marker is decoded to where it ends, so that a cut file is found wherever the boxes are.
    """
    top = request.boxes[..., 0].min(axis=1).astype(np.int64)
    bottom = (request.boxes[..., 0] + request.boxes[..., 2]).max(axis=1).astype(np.int64)
    cut = np.asarray([is_endless_jpeg(data) for data in encoded], dtype=bool)
    top[cut], bottom[cut] = 0, sizes[cut, 0]
    return top, bottom - top


def _prepare(
    reader: EncodedReader, request: Request, row: int, data: UInt8[np.ndarray, " _size"], crop: int
) -> UInt8[np.ndarray, "y x 3"]:
    height, width = request.sizes[row].tolist()
    tall, wide = request.targets[row].tolist()
    try:
        return frame_pixels(data.tobytes(), size=(height, width), target=(tall, wide), crop=crop)
    except PipelineError as error:
        sample = int(request.ids[row])
        raise PipelineError(
            f"{reader.describe(sample)}: {error}; run `lmcl-shard verify --deep`; {LEAVE_OUT}",
            exit_code=3,
            ids=(sample,),
        ) from error
