"""The DALI backend: decode once, cut every box with one operator.

What a newcomer would get wrong: the labels, boxes and ids do not pass through DALI. The order of
requests is ours; DALI's first-in-first-out executor keeps it, so the n-th output belongs to the
n-th request. A pipeline is dead after any error and has to be built anew.
"""

import functools
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.dlpack
from jaxtyping import Float32, Int32, Int64, UInt8
from torch import Tensor

from pipeline.errors import PipelineError
from pipeline.prepare import frame_pixels, wants_preparing, wrap_ppm
from pipeline.request import Request, ViewSpec
from pipeline.source import Source

Decode = Literal["cpu", "mixed"]


@functools.cache
def dali_version() -> str | None:
    """Major and minor version of the installed DALI; None where there is none."""
    try:
        from nvidia import dali
    except ImportError:
        return None
    return ".".join(dali.__version__.split(".")[:2])


class DaliBackend:
    """Crops from one DALI pipeline, prefetched."""

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        *,
        device: torch.device,
        decode: Decode,
        num_threads: int,
        prefetch: int,
    ) -> None:
        self._source = source
        self._spec = spec
        self._prefetch = prefetch
        self._device = device
        self._graph_of = functools.partial(
            _build_graph,
            spec,
            device=device,
            decode=decode,
            num_threads=num_threads,
            prefetch=prefetch,
        )
        self._graph: Any = None
        self._dead: _Flow | None = None
        # Reading and preparing happens here, so that a slow disk or a small image does not stop
        # the thread that trains.
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="lmcl-read")
        self.recipe = f"dali-{decode}-{dali_version()}"

    def run(self, requests: Iterator[Request]) -> Generator[tuple[Request, Tensor], None, None]:
        """Yield each request with its crops on the device.

        A yielded tensor is DALI's own buffer without a copy; it stays valid as long as it is held.

        Raises:
            PipelineError: Naming the samples or the shard that cannot be read.
        """
        if self._graph is None:
            self._graph = self._graph_of()
        pipe, feed = self._graph
        flow = _Flow(self._source, self._spec, self._readers, requests, ahead=self._prefetch)
        feed.flow = flow
        try:
            while (ready := self._next(pipe, flow)) is not None:
                yield ready
        finally:
            feed.flow = None
            flow.cancel()
            self._settle(pipe, flow)

    def _settle(self, pipe: Any, flow: "_Flow") -> None:
        """Let DALI finish what was begun, so that the graph can serve the next epoch."""
        try:
            while self._graph is not None:
                self._run_once(pipe)
        except StopIteration:
            pipe.reset()
        except (RuntimeError, IndexError):
            self._bury(flow)

    def _bury(self, flow: "_Flow") -> None:
        # After an error the pipeline is lost. Its threads may still read the inputs in place, which
        # therefore stay until the backend is closed or fails again.
        self._graph = None
        self._dead = flow

    def _next(self, pipe: Any, flow: "_Flow") -> tuple[Request, Tensor] | None:
        try:
            outputs = self._run_once(pipe)
        except StopIteration:
            return None
        except PipelineError:
            self._bury(flow)
            raise
        except (RuntimeError, IndexError) as error:
            self._bury(flow)
            raise self._explain(error, flow) from error
        request = self._checked(flow, outputs[1:])
        return request, torch.utils.dlpack.from_dlpack(outputs[0].as_tensor())

    def _checked(self, flow: "_Flow", shapes: Any) -> Request:
        """The request of the outputs at hand; its images must have the sizes of the table.

        One that is larger would be cut without complaint, somewhere else than intended.
        """
        request, inputs = flow.take()
        for found in shapes:
            wrong = np.flatnonzero((np.asarray(found.as_tensor()) != inputs.sizes).any(axis=1))
            if wrong.size:
                self._bury(flow)
                one = int(request.ids[wrong[0]])
                height, width = np.asarray(found.as_tensor())[wrong[0]].tolist()
                tall, wide = request.sizes[wrong[0]].tolist()
                raise PipelineError(
                    f"{self._source.describe(one)}: decodes to {height} x {width}, the sample "
                    f"table says {tall} x {wide} (height x width); run `lmcl-shard verify --deep`",
                    exit_code=3,
                    ids=(one,),
                )
        return request

    def _run_once(self, pipe: Any) -> Any:
        if self._device.type == "cuda":
            # Stream-ordered: the host does not wait, the training stream does.
            return pipe.run(torch.cuda.current_stream(self._device))
        return pipe.run()

    def _explain(self, error: Exception, flow: "_Flow") -> PipelineError:
        """DALI names a place in the batch at best; decode what was in flight to find the image."""
        wrong = [
            (int(one), reason)
            for request, encoded in flow.in_flight()
            for one, reason in _find_damaged(request, encoded, self._spec)
        ]
        if not wrong:
            return PipelineError(
                f"DALI failed on a batch whose images all decode otherwise: {_tail(error)}; try "
                'loader.backend = "torch" and report the message'
            )
        first, reason = wrong[0]
        more = f" ({len(wrong) - 1} more in the same batches)" if len(wrong) > 1 else ""
        return PipelineError(
            f"{self._source.describe(first)}: {reason}{more}; run `lmcl-shard verify --deep`, or "
            'set loader.on_error = "skip" to leave damaged images out',
            exit_code=3,
            ids=tuple(one for one, _ in wrong),
        )

    def close(self) -> None:
        """Free DALI's threads and buffers."""
        self._graph = None
        self._readers.shutdown(cancel_futures=True)
        self._dead = None


class _Feed:
    """What DALI calls for inputs; the flow behind it changes with every epoch."""

    def __init__(self) -> None:
        self.flow: _Flow | None = None

    def __call__(self) -> tuple[Any, ...]:
        if self.flow is None:
            raise StopIteration
        return self.flow.feed()


class _Flow:
    """Requests on their way: being read, then inside DALI, then taken."""

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        readers: ThreadPoolExecutor,
        requests: Iterator[Request],
        *,
        ahead: int,
    ) -> None:
        self._source = source
        self._spec = spec
        self._readers = readers
        self._requests = requests
        self._ahead = ahead + 1
        self._reading: deque[tuple[Request, Future[_Inputs]]] = deque()
        self._inside: deque[tuple[Request, _Inputs]] = deque()
        # On a GPU an output may be handed out before its inputs were read: keep some longer.
        self._spent: deque[_Inputs] = deque(maxlen=ahead + 2)
        self._lock = threading.Lock()

    def feed(self) -> tuple[Any, ...]:
        with self._lock:
            while len(self._reading) < self._ahead:
                request = next(self._requests, None)
                if request is None:
                    break
                self._source.prefetch(request.ids)
                job = self._readers.submit(_read_inputs, self._source, request, self._spec)
                self._reading.append((request, job))
            if not self._reading:
                raise StopIteration
            request, job = self._reading.popleft()
        inputs = job.result()
        self._inside.append((request, inputs))
        if self._spec.whole:
            return (inputs.encoded,)
        arrays: tuple[Any, ...] = (inputs.encoded, inputs.corners, _indices(self._spec))
        return (*arrays, inputs.targets) if self._spec.scales else arrays

    def take(self) -> tuple[Request, "_Inputs"]:
        request, inputs = self._inside.popleft()
        self._spent.append(inputs)
        return request, inputs

    def in_flight(self) -> list[tuple[Request, "_Inputs"]]:
        return list(self._inside)

    def cancel(self) -> None:
        for _, job in self._reading:
            job.cancel()
        self._reading.clear()


class _Inputs:
    """The arrays of one request; DALI reads them in place, so they must outlive its work."""

    def __init__(
        self,
        encoded: list[UInt8[np.ndarray, " _size"]],
        corners: Int32[np.ndarray, "b v 2"],
        sizes: Int64[np.ndarray, "b 2"],
        targets: Float32[np.ndarray, "b 2"],
    ) -> None:
        self.encoded = encoded
        self.corners = corners
        self.sizes = sizes
        self.targets = targets


@functools.lru_cache(maxsize=8)
def _indices(spec: ViewSpec) -> Int32[np.ndarray, "b v"]:
    """multi_paste takes all views of an image from that image's place in the batch."""
    places = np.arange(spec.batch_size, dtype=np.int32)
    return np.ascontiguousarray(np.repeat(places[:, None], spec.views, axis=1))


def _read_inputs(source: Source, request: Request, spec: ViewSpec) -> _Inputs:
    encoded = source.read(request.ids)
    sizes, targets = request.sizes.copy(), request.targets.copy()
    least = 1 if spec.whole else spec.size
    for row in np.flatnonzero(wants_preparing(encoded, targets, least)).tolist():
        pixels = _prepare(source, request, row, encoded[row], least)
        encoded[row] = wrap_ppm(pixels)
        sizes[row] = targets[row] = pixels.shape[:2]
    corners = np.ascontiguousarray(request.boxes[..., :2])
    return _Inputs(encoded, corners, sizes, targets.astype(np.float32))


def _prepare(
    source: Source, request: Request, row: int, data: UInt8[np.ndarray, " _size"], crop: int
) -> UInt8[np.ndarray, "y x 3"]:
    height, width = request.sizes[row].tolist()
    tall, wide = request.targets[row].tolist()
    try:
        return frame_pixels(data.tobytes(), size=(height, width), target=(tall, wide), crop=crop)
    except PipelineError as error:
        one = int(request.ids[row])
        raise PipelineError(f"{source.describe(one)}: {error}", exit_code=3, ids=(one,)) from error


def _find_damaged(request: Request, inputs: _Inputs, spec: ViewSpec) -> Iterator[tuple[int, str]]:
    for row, data in enumerate(inputs.encoded):
        if data[:2].tobytes() == b"P6":
            continue
        height, width = request.sizes[row].tolist()
        try:
            frame_pixels(data.tobytes(), size=(height, width), target=(height, width), crop=1)
        except PipelineError as error:
            yield int(request.ids[row]), str(error)


def _tail(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[-3:])[:300]


def _build_graph(
    spec: ViewSpec, *, device: torch.device, decode: Decode, num_threads: int, prefetch: int
) -> tuple[Any, _Feed]:
    """One pipeline: external source, decoder, then either all crops or the whole image."""
    from nvidia.dali import Pipeline, types

    feed = _Feed()
    pipe = Pipeline(
        batch_size=spec.batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
    )
    with pipe:
        image, views = _whole_view(feed, spec, decode) if spec.whole else _crops(feed, spec, decode)
        if decode == "mixed":
            # Looking at a shape would make the host wait for the GPU.
            pipe.set_outputs(views)
        else:
            shape = image.shape(dtype=types.INT64)[:2]
            pipe.set_outputs(views.gpu() if device.type == "cuda" else views, shape)
    pipe.build()
    return pipe, feed


def _inputs(feed: _Feed, dtypes: list[Any], ndims: list[int]) -> Any:
    from nvidia.dali import fn

    return fn.external_source(
        source=feed, num_outputs=len(dtypes), batch=True, no_copy=True, dtype=dtypes, ndim=ndims
    )


def _decoded(encoded: Any, decode: Decode) -> Any:
    from nvidia.dali import fn

    # Fancy upsampling is the CPU decoder's way with chroma; the GPU's default is another.
    return fn.decoders.image(encoded, device=decode, jpeg_fancy_upsampling=True)


def _crops(feed: _Feed, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    dtypes, ndims = [types.UINT8, types.INT32, types.INT32], [1, 2, 1]
    if spec.scales:
        encoded, corners, indices, targets = _inputs(feed, [*dtypes, types.FLOAT], [*ndims, 1])
        image = _decoded(encoded, decode)
        scaled = fn.resize(image, size=targets, interp_type=types.INTERP_TRIANGULAR, antialias=True)
    else:
        encoded, corners, indices = _inputs(feed, dtypes, ndims)
        image = scaled = _decoded(encoded, decode)
    # One operator cuts all views: it pastes them under each other on a canvas, which is the batch's
    # final memory already. A crop operator per view and a stack cost 9 to 25 times as much.
    views, size = spec.views, spec.size
    canvas = fn.multi_paste(
        scaled,
        in_ids=indices,
        in_anchors=corners,
        shapes=np.full((views, 2), size, dtype=np.int32),
        out_anchors=np.asarray([[view * size, 0] for view in range(views)], dtype=np.int32),
        output_size=(views * size, size),
    )
    return image, fn.reshape(canvas, shape=(views, size, size, 3))


def _whole_view(feed: _Feed, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    (encoded,) = _inputs(feed, [types.UINT8], [1])
    image = _decoded(encoded, decode)
    small = fn.resize(
        image,
        size=(spec.size, spec.size),
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
    )
    return image, fn.reshape(small, shape=(1, spec.size, spec.size, 3))
