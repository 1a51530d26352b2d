"""The DALI graphs: one function each."""

import os
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8

from pipeline.backends.dali_inputs import ExternalSource
from pipeline.request import ViewSpec

Decode = Literal["cpu", "mixed"]


def build_graph(
    spec: ViewSpec, *, device: torch.device, decode: Decode, num_threads: int, prefetch: int
) -> tuple[Any, ExternalSource]:
    """A pipeline (source, decoder, then all crops or the whole image) and what feeds it.

    The first one of a process settles how DALI gets its memory, unless the environment has.
    """
    from nvidia.dali import Pipeline

    # Blocks of a megabyte and more come from DALI's pool and not from malloc, which gives them back
    # to the system and faults them in again: 113 page faults, 9 % of the time per image at batch 8.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", str(1 << 20))
    external_source = ExternalSource()
    pipe = Pipeline(
        batch_size=spec.batch_size,
        num_threads=num_threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=prefetch,
    )
    with pipe:
        shape, views = (
            _whole_view(external_source, spec, decode)
            if spec.whole
            else _crops(external_source, spec, decode)
        )
        if decode == "mixed":
            # Looking at a shape would make the host wait for the GPU.
            pipe.set_outputs(views)
        else:
            pipe.set_outputs(views.gpu() if device.type == "cuda" else views, shape[:2])
    pipe.build()
    return pipe, external_source


def _inputs(external_source: ExternalSource, dtypes: list[Any], ndims: list[int]) -> Any:
    from nvidia.dali import fn

    return fn.external_source(
        source=external_source,
        num_outputs=len(dtypes),
        batch=True,
        no_copy=True,
        dtype=dtypes,
        ndim=ndims,
    )


def _decoded(encoded: Any, decode: Decode) -> Any:
    from nvidia.dali import fn

    # Fancy upsampling is the CPU decoder's way with chroma; the GPU's default is another.
    return fn.decoders.image(encoded, device=decode, jpeg_fancy_upsampling=True)


def decode_alone(
    data: UInt8[np.ndarray, " _size"], *, device: torch.device, decode: Decode
) -> None:
    """Decode one image with a pipeline of its own; costs milliseconds, so only after a failure.

    Raises:
        RuntimeError: What DALI says about it.
    """
    from nvidia.dali import Pipeline, fn, types

    pipe = Pipeline(
        batch_size=1,
        num_threads=1,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        prefetch_queue_depth=1,
    )
    with pipe:
        encoded = fn.external_source(source=lambda: [data], dtype=types.UINT8, ndim=1)
        pipe.set_outputs(_decoded(encoded, decode))
    pipe.run()


def decodes_rows_only(spec: ViewSpec, decode: Decode) -> bool:
    """Whether only the rows that boxes lie in are decoded.

    Rows alone: cutting columns off as well makes libjpeg-turbo copy, which costs what it saves
    (docs/decisions/0306). On a GPU nvImageCodec 0.9 fails to decode parts (its issue 55).
    """
    return decode == "cpu" and not spec.whole and not spec.scales


def _crops(external_source: ExternalSource, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    dtypes, ndims = [types.UINT8, types.INT32, types.INT32], [1, 2, 1]
    if spec.scales:
        encoded, corners, indices, targets = _inputs(
            external_source, [*dtypes, types.FLOAT], [*ndims, 1]
        )
        image = _decoded(encoded, decode)
        shape = image.shape(dtype=types.INT64)
        image = fn.resize(image, size=targets, interp_type=types.INTERP_TRIANGULAR, antialias=True)
    elif decodes_rows_only(spec, decode):
        encoded, corners, indices, starts, extents = _inputs(
            external_source, [*dtypes, types.INT32, types.INT32], [*ndims, 1, 1]
        )
        image = fn.decoders.image_slice(
            encoded,
            starts,
            extents,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
        )
        shape = fn.peek_image_shape(encoded)
    else:
        encoded, corners, indices = _inputs(external_source, dtypes, ndims)
        image = _decoded(encoded, decode)
        shape = image.shape(dtype=types.INT64)
    # One operator cuts all views: it pastes them under each other on a canvas, which is the batch's
    # final memory already. A crop operator per view and a stack cost 9 to 25 times as much.
    views, size = spec.views, spec.size
    canvas = fn.multi_paste(
        image,
        in_ids=indices,
        in_anchors=corners,
        shapes=np.full((views, 2), size, dtype=np.int32),
        out_anchors=np.asarray([[view * size, 0] for view in range(views)], dtype=np.int32),
        output_size=(views * size, size),
    )
    return shape, fn.reshape(canvas, shape=(views, size, size, 3))


def _whole_view(external_source: ExternalSource, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    (encoded,) = _inputs(external_source, [types.UINT8], [1])
    image = _decoded(encoded, decode)
    small = fn.resize(
        image,
        size=(spec.size, spec.size),
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
    )
    return image.shape(dtype=types.INT64), fn.reshape(small, shape=(1, spec.size, spec.size, 3))
