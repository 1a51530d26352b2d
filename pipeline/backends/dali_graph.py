"""The DALI graphs: one function each."""

import dataclasses
import os
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from pipeline.backends.dali_inputs import ExternalSource
from pipeline.decode_config import DecodeConfig, Decoder
from pipeline.request import ViewSpec


def build_graph(
    spec: ViewSpec, *, device: torch.device, decoder: Decoder, config: DecodeConfig
) -> tuple[Any, ExternalSource]:
    """A pipeline (source, decoder, then all crops or the whole image) and what feeds it.

    The first one of a process settles how DALI gets its memory, unless the environment has.
    """
    # Blocks of a megabyte and more come from DALI's pool and not from malloc, which gives them back
    # to the system and faults them in again: 113 page faults, 9 % of the time per image at batch 8.
    os.environ.setdefault("DALI_MALLOC_POOL_THRESHOLD", str(1 << 20))
    pipe, external_source = define_graph(spec, device=device, decoder=decoder, config=config)
    pipe.build()
    return pipe, external_source


def define_graph(
    spec: ViewSpec, *, device: torch.device, decoder: Decoder, config: DecodeConfig
) -> tuple[Any, ExternalSource]:
    """The same, not yet built: DALI builds graphs for a GPU only where there is one."""
    external_source = ExternalSource()
    pipe = _pipeline(spec.batch_size, device=device, config=config)
    with pipe:
        view_of = _whole_view if spec.whole else _crops
        shape, views = view_of(external_source, spec, decoder, config)
        on_gpu = device.type == "cuda" and decoder == "cpu"
        pipe.set_outputs(views.gpu() if on_gpu else views, shape[:2])
    return pipe, external_source


def _pipeline(batch_size: int, *, device: torch.device, config: DecodeConfig) -> Any:
    from nvidia.dali import Pipeline

    on_gpu = device.type == "cuda"
    return Pipeline(
        batch_size=batch_size,
        num_threads=config.threads,
        device_id=device.index if on_gpu else None,
        prefetch_queue_depth=config.prefetch,
        set_affinity=on_gpu and bool(config.pin_threads),
    )


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


def _decoded(encoded: Any, decoder: Decoder, config: DecodeConfig) -> Any:
    from nvidia.dali import fn

    # Fancy upsampling is the CPU decoder's way with chroma; the GPU's default is another.
    if decoder == "cpu":
        return fn.decoders.image(encoded, device="cpu", jpeg_fancy_upsampling=True)
    return fn.decoders.image(
        encoded,
        device="mixed",
        jpeg_fancy_upsampling=True,
        hw_decoder_load=config.hw_decoder_load,
        device_memory_padding=config.device_memory_padding,
        host_memory_padding=config.host_memory_padding,
        affine=bool(config.pin_threads),
    )


def _shape_of(encoded: Any, image: Any, decoder: Decoder) -> Any:
    """Height, width and channels of an image, upright, on the CPU."""
    from nvidia.dali import fn, types

    # Asking a decoded image on the GPU would make the host wait for it; the header does as well.
    return image.shape(dtype=types.INT64) if decoder == "cpu" else fn.peek_image_shape(encoded)


def decode_alone(
    data: UInt8[np.ndarray, " _size"],
    *,
    device: torch.device,
    decoder: Decoder,
    config: DecodeConfig,
) -> None:
    """Decode one image with a pipeline of its own; costs milliseconds, so only after a failure.

    Raises:
        RuntimeError: What DALI says about it.
    """
    from nvidia.dali import fn, types

    pipe = _pipeline(1, device=device, config=dataclasses.replace(config, threads=1, prefetch=1))
    with pipe:
        encoded = fn.external_source(source=lambda: [data], dtype=types.UINT8, ndim=1)
        pipe.set_outputs(_decoded(encoded, decoder, config))
    pipe.run()


def decodes_rows_only(spec: ViewSpec, decoder: Decoder) -> bool:
    """Whether only the rows that boxes lie in are decoded.

    Rows alone: cutting columns off as well makes libjpeg-turbo copy, which costs what it saves
    (docs/decisions/0306). On a GPU nvImageCodec 0.9 fails to decode parts (its issue 55).
    """
    return decoder == "cpu" and not spec.whole and not spec.scales


def _crops(
    external_source: ExternalSource, spec: ViewSpec, decoder: Decoder, config: DecodeConfig
) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    dtypes, ndims = [types.UINT8, types.INT32, types.INT32], [1, 2, 1]
    if spec.scales:
        encoded, corners, indices, targets = _inputs(
            external_source, [*dtypes, types.FLOAT], [*ndims, 1]
        )
        image = _decoded(encoded, decoder, config)
        shape = _shape_of(encoded, image, decoder)
        image = fn.resize(image, size=targets, interp_type=types.INTERP_TRIANGULAR, antialias=True)
    elif decodes_rows_only(spec, decoder):
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
        image = _decoded(encoded, decoder, config)
        shape = _shape_of(encoded, image, decoder)
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


def _whole_view(
    external_source: ExternalSource, spec: ViewSpec, decoder: Decoder, config: DecodeConfig
) -> tuple[Any, Any]:
    from nvidia.dali import fn, types

    (encoded,) = _inputs(external_source, [types.UINT8], [1])
    image = _decoded(encoded, decoder, config)
    small = fn.resize(
        image,
        size=(spec.size, spec.size),
        interp_type=types.INTERP_TRIANGULAR,
        antialias=True,
    )
    return _shape_of(encoded, image, decoder), fn.reshape(small, shape=(1, spec.size, spec.size, 3))
