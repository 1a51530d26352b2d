"""The DALI backend: decode once, cut every box with one operator.

What a newcomer would get wrong: the labels, boxes and ids do not pass through DALI. The order of
requests is ours; DALI's first-in-first-out executor keeps it, so the n-th output belongs to the
n-th request. A pipeline is dead after any error and has to be built anew.
"""

import dataclasses
import functools
import itertools
import logging
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from jaxtyping import UInt8

from pipeline.backends.dali_graph import build_graph, decode_alone, decodes_rows_only
from pipeline.backends.dali_inputs import InputQueue, Inputs
from pipeline.backends.decode_batch import (
    GpuMemoryError,
    halve_decode_batch,
    is_out_of_gpu_memory,
    split_request,
)
from pipeline.decode_config import DecodeConfig, Decoder
from pipeline.errors import LEAVE_OUT, PipelineError
from pipeline.frames import frame_pixels
from pipeline.request import Decoded, EncodedReader, Request, ViewSpec

_log = logging.getLogger(__name__)


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
        reader: EncodedReader,
        spec: ViewSpec,
        *,
        device: torch.device,
        decoder: Decoder,
        config: DecodeConfig,
    ) -> None:
        self._reader = reader
        self._spec = spec
        self._config = config
        self._device = device
        self._decoder: Decoder = decoder
        self._graph: Any = None
        self._failed: InputQueue | None = None
        self._buffers: deque[UInt8[np.ndarray, " _bytes"]] = deque()
        # Reading and preparing happens here, so that a slow disk or a small image does not stop
        # the thread that trains.
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="lmcl-read")
        self.decode_batch = spec.batch_size
        """Images that DALI decodes at once: the batch, or less where the GPU's memory is small."""

    def run(self, requests: Iterator[Request]) -> Generator[Decoded, None, None]:
        """Yield each request with its crops on the device.

        A yielded tensor is DALI's own buffer without a copy; it stays valid as long as it is held.
        Where the GPU's memory does not hold what decoding a batch needs, the batch is decoded in
        halves from then on, and put together.

        Raises:
            PipelineError: Naming the samples or the shard that cannot be read.
        """
        waiting: deque[Request] = deque()
        while True:
            try:
                yield from self._run_in_order(_remembered(requests, waiting), waiting)
                return
            except GpuMemoryError as error:
                self._halve(str(error))
            # Only here, past the error and the frames it held, is the old graph's memory free.
            if self._device.type == "cuda":
                _release_gpu_memory()
            requests = itertools.chain(tuple(waiting), requests)
            waiting.clear()

    def _run_in_order(
        self, requests: Iterator[Request], waiting: deque[Request]
    ) -> Generator[Decoded, None, None]:
        pipe, external_source = self._ready_graph()
        parts = (part for request in requests for part in split_request(request, self.decode_batch))
        queue = InputQueue(
            self._reader,
            self._spec,
            self._readers,
            parts,
            ahead=self._config.prefetch,
            decoder=self._decoder,
            rows_only=decodes_rows_only(self._spec, self._decoder),
            buffers=self._buffers,
        )
        external_source.queue = queue
        try:
            while (first := self._next(pipe, queue)) is not None:
                count = len(split_request(waiting[0], self.decode_batch))
                others = [self._next(pipe, queue) for _ in range(count - 1)]
                yield _joined(waiting.popleft(), [first, *(part for part in others if part)])
        finally:
            external_source.queue = None
            queue.cancel()
            self._drain(pipe, queue)

    def _ready_graph(self) -> Any:
        if self._graph is None:
            try:
                self._graph = build_graph(
                    dataclasses.replace(self._spec, batch_size=self.decode_batch),
                    device=self._device,
                    decoder=self._decoder,
                    config=self._config,
                )
            except RuntimeError as error:
                if is_out_of_gpu_memory(str(error)):
                    raise GpuMemoryError(_tail(error)) from error
                raise
        return self._graph

    def _halve(self, cause: str) -> None:
        before = self.decode_batch
        self.decode_batch = halve_decode_batch(before, device=str(self._device), cause=cause)
        _log.warning(
            "the memory of %s is too small to decode %d images at once (%s); they are decoded %d "
            "at a time from here on, and the batches stay as they are",
            *(self._device, before, cause, self.decode_batch),
        )

    def _drain(self, pipe: Any, queue: "InputQueue") -> None:
        """Let DALI finish what was begun, so that the graph can serve the next epoch."""
        try:
            while self._graph is not None:
                self._run_once(pipe)
        except StopIteration:
            pipe.reset()
            if self._device.type == "cpu":
                queue.recycle()
        except (RuntimeError, IndexError):
            self._discard(queue)

    def _discard(self, queue: "InputQueue") -> None:
        # After an error the pipeline is lost. Its threads may still read the inputs in place, which
        # therefore stay until the backend is closed or fails again.
        self._graph = None
        self._failed = queue

    def _next(self, pipe: Any, queue: "InputQueue") -> Decoded | None:
        try:
            outputs = self._run_once(pipe)
        except StopIteration:
            return None
        except PipelineError:
            self._discard(queue)
            raise
        except (RuntimeError, IndexError) as error:
            self._discard(queue)
            if is_out_of_gpu_memory(str(error)):
                raise GpuMemoryError(_tail(error)) from error
            raise self._explain(error, queue) from error
        request, inputs = self._checked(queue, outputs[1:])
        crops = torch.utils.dlpack.from_dlpack(outputs[0].as_tensor())
        return Decoded(
            request=request,
            # On a device that DALI does not know it has worked on the CPU.
            crops=crops if crops.device.type == self._device.type else crops.to(self._device),
            gpu_decoded=inputs.gpu_decoded,
        )

    def _checked(self, queue: "InputQueue", shapes: Any) -> tuple[Request, Inputs]:
        """The request of the outputs at hand and its inputs; images must have the table's sizes.

        One that is larger would be cut without complaint, somewhere else than intended.
        """
        request, inputs = queue.take()
        for shape in shapes:
            wrong = np.flatnonzero((np.asarray(shape.as_tensor()) != inputs.sizes).any(axis=1))
            if wrong.size:
                self._discard(queue)
                sample = int(request.ids[wrong[0]])
                height, width = np.asarray(shape.as_tensor())[wrong[0]].tolist()
                tall, wide = request.sizes[wrong[0]].tolist()
                raise PipelineError(
                    f"{self._reader.describe(sample)}: decodes to {height} x {width}, the sample "
                    f"table says {tall} x {wide} (height x width); run `lmcl-shard verify --deep`",
                    exit_code=3,
                    ids=(sample,),
                )
        return request, inputs

    def _run_once(self, pipe: Any) -> Any:
        if self._device.type == "cuda":
            # Stream-ordered: the host does not wait, the training stream does.
            return pipe.run(torch.cuda.current_stream(self._device))
        return pipe.run()

    def _explain(self, error: Exception, queue: "InputQueue") -> PipelineError:
        """DALI names a place in the batch at best; decode what was in flight to find the image."""
        wrong = [
            (sample, reason)
            for request, encoded in queue.in_flight()
            for sample, reason in _find_damaged(request, encoded, self._spec)
        ]
        if not wrong:
            return self._explain_singly(error, queue)
        first, reason = wrong[0]
        more = f" ({len(wrong) - 1} more in the same batches)" if len(wrong) > 1 else ""
        return PipelineError(
            f"{self._reader.describe(first)}: {reason}{more}; run `lmcl-shard verify --deep`; "
            f"{LEAVE_OUT}",
            exit_code=3,
            ids=tuple(sample for sample, _ in wrong),
        )

    def _explain_singly(self, error: Exception, queue: "InputQueue") -> PipelineError:
        """Pillow decodes everything that was in flight: ask DALI itself, one image at a time."""
        way_out = (
            'set runtime.backend = "torch" (of a Loader: decode=DecodeConfig(backend="torch"))'
        )
        for request, inputs in queue.in_flight():
            for row, data in enumerate(inputs.encoded):
                try:
                    decode_alone(
                        data, device=self._device, decoder=self._decoder, config=self._config
                    )
                except RuntimeError as refusal:
                    sample = int(request.ids[row])
                    return PipelineError(
                        f"{self._reader.describe(sample)}: DALI cannot decode it, though Pillow "
                        f"can: {_tail(refusal)}; store the image anew and pack the set again, or "
                        f"{way_out}",
                        exit_code=3,
                        ids=(sample,),
                    )
        ids = tuple(
            sample for request, _ in queue.in_flight()[:1] for sample in request.ids.tolist()
        )
        where = f" of {self._reader.describe(ids[0])} and {len(ids) - 1} more" if ids else ""
        return PipelineError(
            f"DALI failed on the batch{where}, though it decodes each image alone: {_tail(error)}; "
            f"{way_out} and report the message",
            ids=ids,
        )

    def close(self) -> None:
        """Free DALI's threads and buffers."""
        self._graph = None
        self._readers.shutdown(cancel_futures=True)
        self._failed = None


def _remembered(requests: Iterator[Request], waiting: deque[Request]) -> Iterator[Request]:
    for request in requests:
        waiting.append(request)
        yield request


def _joined(request: Request, parts: list[Decoded]) -> Decoded:
    if len(parts) == 1:
        return parts[0]
    return Decoded(
        request=request,
        crops=torch.cat([part.crops for part in parts]),
        gpu_decoded=np.concatenate([part.gpu_decoded for part in parts]),
    )


def _release_gpu_memory() -> None:
    # DALI's stubs lack it.
    from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]

    ReleaseUnusedMemory()


def _find_damaged(request: Request, inputs: Inputs, spec: ViewSpec) -> Iterator[tuple[int, str]]:
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
    # DALI ends with this as often as it was asked again.
    lines = [line for line in lines if not line.startswith("Current pipeline object")]
    return " ".join(lines[-3:])[:300]
