"""Requests: the samples and boxes of a batch, known before a pixel is decoded."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Request:
    """One batch to load: sample ids, image sizes and boxes."""

    step: int
    ids: Int64[np.ndarray, " b"]
    valid: Bool[np.ndarray, " b"]
    sizes: Int64[np.ndarray, "b 2"]
    """Height and width as decoded, upright."""
    targets: Int64[np.ndarray, "b 2"]
    """Height and width after `max_side`, before padding."""
    boxes: Int32[np.ndarray, "b v 4"]


@dataclass(frozen=True, kw_only=True)
class ViewSpec:
    """Shape of a batch: views per image and their size; fixed for the life of a graph."""

    batch_size: int
    views: int
    size: int
    whole: bool
    """True resizes the whole image to `size` x `size`; False cuts boxes."""
    scales: bool
    """Whether images may have to be scaled down first (`max_side`)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What a backend made of a request."""

    request: Request
    crops: UInt8[Tensor, "b v size size 3"]
    """On the device that was asked for."""
    gpu_decoded: Bool[np.ndarray, " b"]
    """Which images the GPU decoded; all others took the CPU recipe's way."""


@runtime_checkable
class EncodedReader(Protocol):
    """Where a backend reads encoded images; `pipeline.shard_reader.ShardReader` is one."""

    def prefetch(self, ids: Int64[np.ndarray, " b"]) -> None:
        """Start bringing what lies elsewhere; returns at once."""

    def buffer_bytes(self, ids: Int64[np.ndarray, " b"]) -> int:
        """Bytes that `read` needs for these samples."""

    def read(
        self, ids: Int64[np.ndarray, " b"], *, into: UInt8[np.ndarray, " _bytes"] | None = None
    ) -> list[UInt8[np.ndarray, " _size"]]:
        """The encoded bytes of each sample, in order."""

    def describe(self, sample: int) -> str:
        """What and where a sample is, for messages."""
