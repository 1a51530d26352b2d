"""How many images DALI decodes at once where the GPU's memory is too small for the whole batch."""

import dataclasses

from pipeline.errors import PipelineError
from pipeline.request import Request

_OUT_OF_MEMORY = (
    # DALI 2.4: CUDABadAlloc, with and without a size.
    "CUDA allocation failed",
    "Can't allocate",
    # The CUDA runtime and driver.
    "cudaErrorMemoryAllocation",
    "CUDA_ERROR_OUT_OF_MEMORY",
    "out of memory",
    # nvJPEG and nvImageCodec, whose buffers are DALI's.
    "NVJPEG_STATUS_ALLOCATOR_FAILURE",
    "NVIMGCODEC_STATUS_ALLOCATOR_FAILURE",
)
_HOST = "bytes on host"
"""How the same message ends where it is the machine's own memory that is short."""


class GpuMemoryError(Exception):
    """DALI found no GPU memory for a batch; the message is DALI's."""


def is_out_of_gpu_memory(message: str) -> bool:
    """Whether an error of DALI says that the GPU's memory is too small.

    Sources: DALI issues 144, 1137, 1434 and 2836; strings of libdali_core.so 2.4.
    """
    return any(text in message for text in _OUT_OF_MEMORY) and _HOST not in message


def halve_decode_batch(images: int, *, device: str, cause: str) -> int:
    """How many images to decode at once after `images` were too many.

    Raises:
        PipelineError: If a single one was.
    """
    if images > 1:
        return (images + 1) // 2
    raise PipelineError(
        f"the memory of {device} is too small to decode a single image ({cause[:200]}); free some, "
        'set decode = "cpu", or scale images down (crops.max_side)'
    )


def split_request(request: Request, most: int) -> list[Request]:
    """A request in parts of at most `most` images, in order."""
    rows = [slice(start, start + most) for start in range(0, len(request.ids), most)]
    if len(rows) == 1:
        return [request]
    return [
        dataclasses.replace(
            request,
            ids=request.ids[part],
            valid=request.valid[part],
            sizes=request.sizes[part],
            targets=request.targets[part],
            boxes=request.boxes[part],
        )
        for part in rows
    ]
