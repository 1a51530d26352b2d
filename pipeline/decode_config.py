"""How images are decoded: what may be set, and the names of the recipes that come of it.

A recipe names decoder and version; two scores are comparable if their recipes give the same pixels
(`same_pixels`). What changes no pixel (threads, memory) is never part of it.
"""

import re
from dataclasses import dataclass
from typing import Literal

BackendName = Literal["auto", "dali", "torch"]
DecodeName = Literal["auto", "cpu", "gpu"]
Decoder = Literal["cpu", "gpu"]
"""Where the JPEGs of a loader are decoded, once that is settled."""

_HW_LOAD_OF_MIXED = 0.65


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Which decoder, and its settings; the same for training, saliency, evaluation and scoring."""

    backend: BackendName = "auto"
    """`dali`, `torch` (Pillow in threads), or `auto`: DALI where it is installed."""
    decode: DecodeName = "auto"
    """`cpu`; `gpu` (nvJPEG through DALI); or `auto`: the GPU where the device is one, DALI is there
    and the set has JPEGs. The GPU's pixels differ from the CPU's: it is another recipe."""
    threads: int | None = None
    """Decoding threads of this process; None takes its share of the machine's cores, at most 8.
    nvJPEG's Huffman decoding runs in them too."""
    prefetch: int = 2
    """Batches worked on ahead of the one in use; DALI's own default."""
    hw_decoder_load: float = 0.0
    """Share of a batch's JPEGs that goes to the GPU's JPEG engine (A100, Hopper and later), the
    rest to its CUDA cores. The two differ in single levels (DALI pull request 2232), so between 0
    and 1 an image's pixels depend on what else is in its batch; 0 gives the same on every chip.
    DALI's default is 0.65; NVIDIA measured about 5,000 images/s at 1, 7,000 at 0.75 and 6,000 at 0
    (A100, DALI issue 5362). Part of the recipe unless 0."""
    device_memory_padding: int = 16 << 20
    """Bytes of GPU memory that nvJPEG reserves per thread; DALI's default. Larger where a set's
    images are of more than 5 million pixels saves growing the buffer. Changes no pixel."""
    host_memory_padding: int = 8 << 20
    """Bytes of pinned memory that nvJPEG reserves per thread, twice; DALI's default."""
    pin_threads: bool | None = None
    """Keep DALI's threads on the cores nearest to the GPU, as the driver knows them; None does so
    where several processes share the machine."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("backend", self.backend, ("auto", "dali", "torch")),
            ("decode", self.decode, ("auto", "cpu", "gpu")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads is {self.threads}; it must be at least 1")
        if self.prefetch < 1:
            raise ValueError(f"prefetch is {self.prefetch}; it must be at least 1 batch")
        if not 0 <= self.hw_decoder_load <= 1:
            raise ValueError(
                f"hw_decoder_load is {self.hw_decoder_load}; it is a share, from 0 to 1"
            )
        for name, size in (
            ("device_memory_padding", self.device_memory_padding),
            ("host_memory_padding", self.host_memory_padding),
        ):
            if size < 0:
                raise ValueError(f"{name} is {size}; it is a number of bytes, 0 or more")


DEFAULT_DECODE = DecodeConfig()


def dali_recipe(decoder: Decoder, version: str, *, hw_decoder_load: float) -> str:
    """The recipe of a DALI decoder, e.g. `dali-cpu-2.4`, `dali-gpu-2.4`, `dali-gpu-2.4-hw0.65`."""
    name = f"dali-{decoder}-{version}"
    return f"{name}-hw{hw_decoder_load:g}" if decoder == "gpu" and hw_decoder_load else name


def same_pixels(one: str, other: str) -> bool:
    """Whether two recipes give the same pixels, as far as is known.

    DALI's CPU decoder and Pillow do, of any version (tests/pipeline/test_decode.py).
    `dali-mixed-2.4` is how `dali-gpu-2.4-hw0.65` was called once.
    """
    return _pixels_of(one) == _pixels_of(other)


def _pixels_of(recipe: str) -> str:
    if re.fullmatch(r"dali-cpu(-.*)?|torch-pillow(-.*)?", recipe):
        return "cpu"
    mixed = re.fullmatch(r"dali-mixed-(\d+\.\d+)", recipe)
    if mixed:
        return dali_recipe("gpu", mixed[1], hw_decoder_load=_HW_LOAD_OF_MIXED)
    return recipe
