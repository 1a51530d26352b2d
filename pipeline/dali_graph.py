"""The DALI graphs: one function each."""

from typing import Any, Literal

import numpy as np
import torch

from pipeline.dali_feed import Feed
from pipeline.request import ViewSpec

Decode = Literal["cpu", "mixed"]


def build_graph(
    spec: ViewSpec, *, device: torch.device, decode: Decode, num_threads: int, prefetch: int
) -> tuple[Any, Feed]:
    """A pipeline (source, decoder, then all crops or the whole image) and what feeds it."""
    from nvidia.dali import Pipeline, types

    feed = Feed()
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


def _inputs(feed: Feed, dtypes: list[Any], ndims: list[int]) -> Any:
    from nvidia.dali import fn

    return fn.external_source(
        source=feed, num_outputs=len(dtypes), batch=True, no_copy=True, dtype=dtypes, ndim=ndims
    )


def _decoded(encoded: Any, decode: Decode) -> Any:
    from nvidia.dali import fn

    # Fancy upsampling is the CPU decoder's way with chroma; the GPU's default is another.
    return fn.decoders.image(encoded, device=decode, jpeg_fancy_upsampling=True)


def _crops(feed: Feed, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
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


def _whole_view(feed: Feed, spec: ViewSpec, decode: Decode) -> tuple[Any, Any]:
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
