"""Near twins: different images that show the same photograph, found across the parts of a split.

A perceptual hash (signs of the 64 lowest frequencies of a 32 x 32 grey copy) proposes pairs, the
correlation of 16 x 16 grey copies confirms them; crops, mirrors and heavy edits are not found.
"""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from shards.image_formats import open_image
from shards.processes import end_with_parent
from shards.read import ShardSet, open_set
from shards.splits.split import PARTS, Split, split_from_ids

MAX_DISTANCE = 12
"""Bits of 64 in which the hashes of twins may differ."""

MIN_CORRELATION = 0.92
"""Least correlation of the small grey copies of twins."""

_SMALL = 16
_BLOCK = 2048
_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class Signatures:
    """What images look like from afar; row k belongs to `ids[k]`."""

    ids: NDArray[np.int64]
    hashes: NDArray[np.uint64]
    thumbs: NDArray[np.float32]
    """[n, 256], each row of mean 0 and length 1 (or all 0 for a uniform image)."""


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A pair of near twins in two parts of a split."""

    first: int
    """Id in the part that comes first of train, val, test."""
    second: int
    """Id in the other part."""
    parts: tuple[str, str]
    """The two parts."""
    distance: int
    """Bits in which their hashes differ."""
    correlation: float
    """Of their small grey copies."""


def signatures(
    shard_set: ShardSet,
    ids: NDArray[np.int64],
    *,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Signatures:
    """Decode images and describe each in 64 bits and 256 numbers."""
    tell = progress or (lambda images: None)
    chunks = [ids[start : start + _CHUNK].tolist() for start in range(0, ids.size, _CHUNK)]
    results: list[tuple[Any, Any]] = []
    if workers == 1:
        for chunk in chunks:
            results.append(_describe(shard_set, chunk))
            tell(len(chunk))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(
            workers, mp_context=context, initializer=end_with_parent
        ) as pool:
            for chunk, found in zip(
                chunks, pool.map(_describe_at, [shard_set.root] * len(chunks), chunks), strict=True
            ):
                results.append(found)
                tell(len(chunk))
    if not results:
        empty = np.empty((0, _SMALL**2), np.float32)
        return Signatures(ids=ids, hashes=np.empty(0, np.uint64), thumbs=empty)
    return Signatures(
        ids=ids,
        hashes=np.concatenate([hashes for hashes, _ in results]),
        thumbs=np.concatenate([thumbs for _, thumbs in results]),
    )


def find_twins(
    found: Signatures,
    split: Split,
    *,
    max_distance: int = MAX_DISTANCE,
    min_correlation: float = MIN_CORRELATION,
) -> list[Twin]:
    """Pairs of near twins that lie in different parts of a split."""
    twins: list[Twin] = []
    place = np.full(int(found.ids.max(initial=-1)) + 1, -1)
    place[found.ids] = np.arange(found.ids.size)
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        rows, columns = place[split.part(first)], place[split.part(second)]
        for a, b in _pairs(found, rows, columns, max_distance, min_correlation):
            twins.append(
                Twin(
                    first=int(found.ids[a]),
                    second=int(found.ids[b]),
                    parts=(first, second),
                    distance=int(np.bitwise_count(found.hashes[a] ^ found.hashes[b])),
                    correlation=float(found.thumbs[a] @ found.thumbs[b]),
                )
            )
    return twins


def drop_twins(shard_set: ShardSet, split: Split, twins: list[Twin]) -> Split:
    """The split without the twins of held-out images: train gives way to val, both to test."""
    out: dict[str, set[int]] = {part: set() for part in PARTS}
    for twin in twins:
        out[twin.parts[0]].add(twin.first)
    ids = [np.setdiff1d(split.part(part), np.array(sorted(out[part]), np.int64)) for part in PARTS]
    dropped = sum(len(values) for values in out.values())
    note = f"{dropped} near twins of held-out images dropped"
    return split_from_ids(
        shard_set,
        f"{split.name}-deduped",
        split.index,
        ids,
        note="; ".join(text for text in (split.note, note) if text),
        protocol=split.protocol,
        seed=split.seed,
    )


def _describe_at(root: str, ids: list[int]) -> tuple[Any, Any]:
    return _describe(open_set(root), ids)


def _describe(shard_set: ShardSet, ids: list[int]) -> tuple[Any, Any]:
    hashes, thumbs = np.empty(len(ids), np.uint64), np.empty((len(ids), _SMALL**2), np.float32)
    for row, id in enumerate(ids):
        grey = _grey(shard_set.read_bytes(id))
        hashes[row] = perceptual_hash(grey)
        thumbs[row] = _thumb(grey)
    return hashes, thumbs


def _grey(data: bytes) -> Image.Image:
    with open_image(data) as image:
        image.draft("L", (64, 64))  # a JPEG decodes at an eighth of its size
        upright: Image.Image = ImageOps.exif_transpose(image)
        return upright.convert("RGB").convert("L")


def perceptual_hash(grey: Image.Image) -> np.uint64:
    """64 bits: signs of the lowest 8 x 8 frequencies of a 32 x 32 copy, against their median."""
    import scipy.fft  # a third of a second that no other command needs

    small = np.asarray(grey.resize((32, 32), Image.Resampling.BOX), np.float64)
    low = scipy.fft.dctn(small, norm="ortho")[:8, :8].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits).view(np.uint64)[0]  # type: ignore[no-any-return]


def _thumb(grey: Image.Image) -> NDArray[np.float32]:
    small = np.asarray(grey.resize((_SMALL, _SMALL), Image.Resampling.BOX), np.float32).ravel()
    small = small - small.mean()
    length = float(np.sqrt((small**2).sum()))
    if length < 1e-3:
        return np.zeros(_SMALL**2, np.float32)
    return np.asarray(small / length, np.float32)


def _pairs(
    found: Signatures,
    rows: NDArray[Any],
    columns: NDArray[Any],
    max_distance: int,
    min_correlation: float,
) -> list[tuple[int, int]]:
    pairs: list[tuple[int, int]] = []
    for start in range(0, rows.size, _BLOCK):
        block = rows[start : start + _BLOCK]
        for other in range(0, columns.size, _BLOCK):
            against = columns[other : other + _BLOCK]
            differ = np.bitwise_count(found.hashes[block][:, None] ^ found.hashes[against][None])
            for a, b in zip(*np.nonzero(differ <= max_distance), strict=True):
                left, right = int(block[a]), int(against[b])
                if float(found.thumbs[left] @ found.thumbs[right]) >= min_correlation:
                    pairs.append((left, right))
    return pairs


DedupeMode = Literal["report", "drop"]
