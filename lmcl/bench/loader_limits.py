"""Which limit a case of the loader's benchmark is near: its stages, measured in the same run."""

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lmcl.bench.loader_cases import Case, Setup
from pipeline.backends.row_decoder import RowDecoder
from pipeline.bmp import read_bmp_rows

_ENTROPY = {
    "jpg": "Huffman decoding of the rows needed",
    "png": "inflating the file",
    "bmp": "turning the rows needed from blue, green, red to red, green, blue",
}
_PIXELS = {
    "jpg": "inverse transform and colours of the rows needed",
    "png": "undoing the filters",
    "bmp": "decoding",
}


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """Processor time of what every way has to do, ms per image."""

    codec: str
    read: float
    """The bytes out of the shard."""
    entropy: float
    """Undoing the lossless coding of the rows needed; of a BMP, reordering its bytes."""
    decode: float
    """Decoding the rows needed, `entropy` within it."""
    cut: float
    """Copying the crops out of one image that is in the cache."""


def nearest_limit(total: float, costs: StageCosts, *, decodes: int = 1) -> str:
    """The largest part of a case's processor time per image, in words and per cent.

    Args:
        total: Of the case, ms per image.
        costs: Of the stages, from the same run.
        decodes: How often the case decodes an image.
    """
    parts = {
        "reading the shard": costs.read,
        _ENTROPY[costs.codec]: decodes * costs.entropy,
        _PIXELS[costs.codec]: decodes * max(costs.decode - costs.entropy, 0.0),
        "memory bandwidth of the cut": costs.cut,
    }
    # A case may be cheaper than a stage: a BMP that is cut from its bytes is not decoded.
    fits = {name: cost for name, cost in parts.items() if cost <= total}
    # What surrounds decoding and cutting: Python, copies, page faults, a slower decoder.
    fits["what is neither decoding nor cutting"] = max(total - sum(fits.values()), 0.0)
    name = max(fits, key=lambda key: fits[key])
    return f"{fits[name] / total:.0%} {name}"


def limit_cases(setup: Setup) -> dict[str, tuple[Case, int]]:
    """The stages that nothing else here measures: `stage_entropy` and `stage_cut_alone`."""
    few = min(setup.count, setup.batch)
    boxes, table = setup.boxes()[:few], setup.shard_set.samples
    files = [
        np.frombuffer(setup.shard_set.read_bytes(sample), dtype=np.uint8)
        for sample in setup.ids[:few].tolist()
    ]
    sizes = [(int(table.height[sample]), int(table.width[sample])) for sample in setup.ids[:few]]
    cases = {"stage_cut_alone": (_cut_alone(setup, sizes[0], boxes), few)}
    if setup.codec == "png":
        streams = [_image_data(file.tobytes()) for file in files]
        cases["stage_entropy"] = (lambda: _inflate(streams), few)
    elif setup.codec == "jpg":
        cases["stage_entropy"] = (_skim(files, sizes, boxes), few)
    else:
        cases["stage_entropy"] = (_reorder(files, sizes, boxes), few)
    return cases


def _image_data(png: bytes) -> bytes:
    parts, at = [], 8
    while at < len(png):
        size = int.from_bytes(png[at : at + 4], "big")
        if png[at + 4 : at + 8] == b"IDAT":
            parts.append(png[at + 8 : at + 8 + size])
        at += 12 + size
    return b"".join(parts)


def _inflate(streams: list[bytes]) -> None:
    for stream in streams:
        zlib.decompress(stream)


def _skim(
    files: list[NDArray[np.uint8]], sizes: list[tuple[int, int]], boxes: NDArray[np.int32]
) -> Case:
    """The last of the rows needed alone: of those above only the Huffman codes are read."""
    decoder = RowDecoder()
    ends = (boxes[..., 0] + boxes[..., 2]).max(axis=1).tolist()

    def run() -> None:
        for file, size, end in zip(files, sizes, ends, strict=True):
            decoder.decode_rows(file, size=size, top=end - 1, bottom=end)

    return run


def _reorder(
    files: list[NDArray[np.uint8]], sizes: list[tuple[int, int]], boxes: NDArray[np.int32]
) -> Case:
    first = boxes[..., 0].min(axis=1).tolist()
    ends = (boxes[..., 0] + boxes[..., 2]).max(axis=1).tolist()

    def run() -> None:
        for file, size, top, bottom in zip(files, sizes, first, ends, strict=True):
            read_bmp_rows(file, size=size, top=top, bottom=bottom)

    return run


def _cut_alone(setup: Setup, size: tuple[int, int], boxes: NDArray[np.int32]) -> Case:
    image = np.ones((*size, 3), dtype=np.uint8)
    batch = np.zeros((len(boxes), setup.crops, setup.size, setup.size, 3), dtype=np.uint8)
    height, width = size
    corners = np.minimum(boxes[..., :2], (height - setup.size, width - setup.size)).tolist()

    def run() -> None:
        for row, places in enumerate(corners):
            for view, (y, x) in enumerate(places):
                batch[row, view] = image[y : y + setup.size, x : x + setup.size]

    return run
