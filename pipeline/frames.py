"""Preparing images that cannot go to DALI as they are: padding, resizing, odd headers."""

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from pipeline.decode import decode_rgb, reflect_pad, resize_rgb
from pipeline.errors import PipelineError
from pipeline.image_headers import header_size


def frame_pixels(
    data: bytes, *, size: tuple[int, int], target: tuple[int, int], crop: int
) -> UInt8[np.ndarray, "y x 3"]:
    """Decode, scale to `target` (height, width) and reflect up to `crop`: the image's frame.

    Raises:
        PipelineError: If the bytes are no image or not one of `size`.
    """
    pixels = decode_rgb(data)
    if pixels.shape[:2] != size:
        raise PipelineError(
            f"decodes to {pixels.shape[0]} x {pixels.shape[1]}, the sample table says "
            f"{size[0]} x {size[1]} (height x width)",
            exit_code=3,
        )
    return reflect_pad(resize_rgb(pixels, *target), crop)


def needs_preparation(
    encoded: list[UInt8[np.ndarray, " _size"]],
    sizes: Int64[np.ndarray, "b 2"],
    targets: Int64[np.ndarray, "b 2"],
    crop: int,
) -> Bool[np.ndarray, " b"]:
    """Which images must be prepared in Python before DALI sees them."""
    small = (targets < crop).any(axis=1)
    # DALI 2.4 reads the headers of larger batches in several threads, and an exception in one of
    # them frees what the others are still using: the process dies without a word. What Pillow
    # makes of such an image is either its pixels or a sentence.
    unclear = [
        sorted(header_size(data.data) or ()) != sorted(size)
        for data, size in zip(encoded, sizes.tolist(), strict=True)
    ]
    return np.asarray(small | np.asarray(unclear, dtype=bool))


def is_endless_jpeg(data: UInt8[np.ndarray, " _size"]) -> bool:
    """Whether the bytes begin as a JPEG and do not end as one: cut off, or followed by others."""
    return data[:2].tobytes() == b"\xff\xd8" and data[-2:].tobytes() != b"\xff\xd9"


def wrap_ppm(pixels: UInt8[np.ndarray, "y x 3"]) -> UInt8[np.ndarray, " _size"]:
    """Pixels as an uncompressed file that every decoder reads back bit for bit."""
    header = f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode()
    return np.concatenate([np.frombuffer(header, dtype=np.uint8), pixels.reshape(-1)])
