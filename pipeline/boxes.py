"""Crop boxes: pure functions of (seed, epoch, id) or of the image's size.

A box is (y, x, height, width) in the image's *frame*: the decoded, upright image, scaled down if
`max_side` or `short_side` says so, and reflected at its lower and right edge where it is smaller
than a crop.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32, Int64
from numpy.typing import NDArray

from pipeline.counter_rng import fold_key, random_bits, scale_bits
from pipeline.errors import PipelineError

_EVALUATION_KEY = 0x45564C  # never that of an epoch: those are folded from two numbers
_POOL_KEY = 0x504F4F4C
_MOST = {
    "size": 8192, "random": 10**4, "evaluation": 10**4, "pool": 10**5, "max_side": 10**6,
    "short_side": 10**6,
}  # fmt: skip
"""Beyond any sensible crop, and far below what ends in an overflow or without memory."""

BoxRule = Callable[[Int64[np.ndarray, " b"], Int64[np.ndarray, "b 2"]], NDArray[np.int32]]
"""Ids and frame sizes (`frame_sizes`) -> boxes [b, v, 4]."""


@dataclass(frozen=True, kw_only=True)
class CropConfig:
    """How many crops of an image, how large, and from where."""

    size: int = 224
    """Height and width of a crop, pixels; what the encoder takes."""
    random: int = 10
    """Random crops per image while training."""
    pool: int | None = None
    """Draw the random crops from this many places of each image, scattered once and for all; None:
    from anywhere. What a frozen encoder part makes of them can then be kept (decision 0008)."""
    salient: bool = True
    """Whether the teacher's most salient crop comes last while training."""
    max_side: int | None = None
    """Longest side of an image, pixels; larger ones are scaled down to it (antialiased) before
    cropping. None never scales. Part of the model's recipe: scaling changes what is judged."""
    short_side: int | None = None
    """The same for the shorter side, in place of `max_side`: crops then show the same share of a
    picture's height whatever its shape, and a panorama is not reflected to fill a crop."""
    small: Literal["reflect"] = "reflect"
    """What happens to an image smaller than a crop: reflected at its lower and right edge."""
    evaluation: int = 10
    """Crops per image while evaluating; they never change from run to run."""
    evaluation_layout: Literal["grid", "seeded"] = "grid"
    """`grid` spreads them evenly over the image; `seeded` scatters them by the image's id."""

    def __post_init__(self) -> None:
        for name, value, least in (
            ("size", self.size, 1),
            ("random", self.random, 1),
            ("evaluation", self.evaluation, 1),
            ("max_side", self.max_side if self.max_side is not None else self.size, self.size),
            ("short_side", self.size if self.short_side is None else self.short_side, self.size),
        ):
            if value < least:
                raise ValueError(f"crops.{name} is {value}; it must be at least {least}")
        for name, most in _MOST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"crops.{name} must be a number <= {most}")
        if self.max_side is not None and self.short_side is not None:
            raise ValueError(
                f"crops.max_side = {self.max_side} and crops.short_side = {self.short_side} both "
                "say how far images are scaled down; set one of them"
            )
        if self.pool is not None and self.pool < self.random:
            raise ValueError(
                f"crops.random draws {self.random} crops from crops.pool = {self.pool} places; "
                f"set crops.pool to at least {self.random}"
            )
        if self.small != "reflect":
            raise ValueError(f"crops.small is {self.small!r}; the only rule there is is 'reflect'")
        if self.evaluation_layout not in ("grid", "seeded"):
            raise ValueError(
                f"crops.evaluation_layout is {self.evaluation_layout!r}; choose 'grid' or 'seeded'"
            )

    @property
    def scales(self) -> bool:
        """Whether large images are scaled down."""
        return self.max_side is not None or self.short_side is not None


def scaled_sizes(
    heights: Int[np.ndarray, " b"], widths: Int[np.ndarray, " b"], crops: CropConfig | None
) -> Int64[np.ndarray, "b 2"]:
    """Height and width after `max_side` or `short_side`: that side becomes it, the aspect stays.

    Without a configuration, or without either of them in it, sizes are what they are.
    """
    sizes = np.stack([heights, widths], axis=1).astype(np.int64)
    if crops is None:
        return sizes
    limit = crops.max_side if crops.max_side is not None else crops.short_side
    if limit is None:
        return sizes
    is_longest = crops.max_side is not None
    side = (sizes.max if is_longest else sizes.min)(axis=1, keepdims=True)
    # Integers throughout: half a pixel rounds up, on every machine alike.
    scaled = np.maximum((2 * sizes * limit + side) // (2 * side), 1)
    return np.asarray(np.where(side > limit, scaled, sizes))


def frame_sizes(
    heights: Int[np.ndarray, " b"], widths: Int[np.ndarray, " b"], crops: CropConfig
) -> Int64[np.ndarray, "b 2"]:
    """Height and width of the frame that boxes lie in; at least a crop each way."""
    return np.asarray(np.maximum(scaled_sizes(heights, widths, crops), crops.size))


def random_boxes(
    ids: Int64[np.ndarray, " b"],
    frames: Int64[np.ndarray, "b 2"],
    *,
    size: int,
    count: int,
    seed: int,
    epoch: int,
    pool: int | None = None,
    repeats: Int64[np.ndarray, " b"] | None = None,
) -> Int32[np.ndarray, "b count 4"]:
    """`count` boxes per image, each place equally likely, independent of rank, batch and world.

    With `pool` they are different ones of the image's `pool_boxes`. An image that an epoch shows
    several times (`repeats`: how often before) gets other boxes each time.
    """
    if repeats is not None and repeats.any():
        boxes = np.empty((len(ids), count, 4), dtype=np.int32)
        for often in np.unique(repeats).tolist():
            here = repeats == often
            key = fold_key(seed, epoch, often) if often else fold_key(seed, epoch)
            boxes[here] = _drawn(ids[here], frames[here], size, count, pool, key)
        return boxes
    return _drawn(ids, frames, size, count, pool, fold_key(seed, epoch))


def _drawn(
    ids: Int64[np.ndarray, " b"],
    frames: Int64[np.ndarray, "b 2"],
    size: int,
    count: int,
    pool: int | None,
    key: int,
) -> Int32[np.ndarray, "b count 4"]:
    if pool is None:
        return _scattered(ids, frames, size=size, count=count, key=key)
    tickets = random_bits(key, _counters(ids, pool))
    drawn = np.argsort(tickets, axis=1)[:, :count, None]
    return np.take_along_axis(pool_boxes(ids, frames, size=size, pool=pool), drawn, axis=1)


def centre_boxes(frames: Int64[np.ndarray, "b 2"], *, size: int) -> Int32[np.ndarray, "b 4"]:
    """The box in the middle of each frame."""
    return _boxes_at(((frames - size) // 2)[:, None], size)[:, 0]


def pool_boxes(
    ids: Int64[np.ndarray, " b"], frames: Int64[np.ndarray, "b 2"], *, size: int, pool: int
) -> Int32[np.ndarray, "b pool 4"]:
    """The places of `CropConfig.pool`: the same in every epoch and under every seed."""
    return _scattered(ids, frames, size=size, count=pool, key=fold_key(_POOL_KEY))


def evaluation_boxes(
    ids: Int64[np.ndarray, " b"], frames: Int64[np.ndarray, "b 2"], crops: CropConfig
) -> Int32[np.ndarray, "b count 4"]:
    """`crops.evaluation` boxes per image that depend on its size (and, if seeded, its id) only."""
    size, count = crops.size, crops.evaluation
    if crops.evaluation_layout == "seeded":
        return _scattered(ids, frames, size=size, count=count, key=fold_key(_EVALUATION_KEY))
    corners = np.empty((len(ids), count, 2), dtype=np.int64)
    # Sets have few distinct sizes; the grid is worked out once for each.
    unique, inverse = np.unique(frames, axis=0, return_inverse=True)
    for index, frame in enumerate(unique):
        span = (int(frame[0]) - size, int(frame[1]) - size)
        corners[inverse.reshape(-1) == index] = _grid(*span, count)
    return _boxes_at(corners, size)


def _scattered(
    ids: Int64[np.ndarray, " b"],
    frames: Int64[np.ndarray, "b 2"],
    *,
    size: int,
    count: int,
    key: int,
) -> Int32[np.ndarray, "b count 4"]:
    # Two independent draws per crop.
    bits = random_bits(key, _counters(ids, 2 * count)).reshape(len(ids), count, 2)
    span = (frames - size + 1)[:, None, :]
    return _boxes_at(scale_bits(bits, np.broadcast_to(span, bits.shape)), size)


def _counters(ids: Int64[np.ndarray, " b"], draws: int) -> NDArray[np.uint64]:
    """One counter a draw, unique for ids below 2**44."""
    numbers = np.arange(draws, dtype=np.uint64) + np.uint64(1)
    return np.asarray((ids.astype(np.uint64)[:, None] << np.uint64(20)) + numbers[None, :])


def _boxes_at(corners: Int64[np.ndarray, "b count 2"], size: int) -> Int32[np.ndarray, "b count 4"]:
    boxes = np.full((*corners.shape[:2], 4), size, dtype=np.int32)
    boxes[..., :2] = corners
    return boxes


def _grid(span_y: int, span_x: int, count: int) -> Int64[np.ndarray, "count 2"]:
    """Corners spread evenly over [0, span]: rows from top to bottom, each from left to right.

    The number of rows follows the shape of the span; rows differ by one crop at most, the longer
    ones in the middle. A lone row or a lone crop of a row sits in the centre.
    """
    rows = round(np.sqrt(count * (span_y + 1) / (span_x + 1)))
    rows = min(max(rows, 1), count)
    edges = [round(index * count / rows) for index in range(rows + 1)]
    corners = [
        (y, x)
        for row, y in enumerate(_spread(span_y, rows))
        for x in _spread(span_x, edges[row + 1] - edges[row])
    ]
    return np.asarray(corners, dtype=np.int64)


def _spread(span: int, count: int) -> list[int]:
    if count == 1:
        return [span // 2]
    return [(2 * index * span + count - 1) // (2 * (count - 1)) for index in range(count)]


def check_boxes(
    boxes: Int32[np.ndarray, "b v 4"],
    ids: Int64[np.ndarray, " b"],
    frames: Int64[np.ndarray, "b 2"],
    *,
    size: int,
    origin: str,
) -> None:
    """Refuse boxes that are no crop-sized part of their image's frame.

    Raises:
        PipelineError: Naming the first such id, its box, the frame and `origin`.
    """
    corners, extents = boxes[..., :2].astype(np.int64), boxes[..., 2:].astype(np.int64)
    wrong = (corners < 0) | (extents != size) | (corners + extents > frames[:, None, :])
    if not wrong.any():
        return
    row, view = (int(index) for index in np.argwhere(wrong.any(axis=2))[0])
    raise PipelineError(
        f"{origin}: box {tuple(boxes[row, view].tolist())} (y, x, height, width) of sample "
        f"{ids[row]} is not a {size} x {size} part of its {frames[row, 0]} x {frames[row, 1]} "
        "frame; make the boxes again with this crop size and max_side",
        exit_code=3,
        ids=(int(ids[row]),),
    )
