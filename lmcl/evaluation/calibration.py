"""Calibration of a model: what its scores mean, kept in `calibration.json` of the model folder.

Training ends with it (lmcl/training/finish.py), from images of the val part alone where people's
scores are needed: percentiles among the training images, conformal intervals, distances to what the
model learned from, and how few crops are enough. Reading needs numpy and no torch.

A newcomer's trap: everything in it is in units of quality, [0, 1], higher = better.
"""

import dataclasses
import hashlib
import math
from pathlib import Path

import msgspec
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from lmcl.errors import LmclError
from lmcl.evaluation.adaptive import AdaptiveRule
from lmcl.evaluation.conformal import Conformal, Numbers
from lmcl.models.folders import MODEL_FILES
from shards.errors import ShardError
from shards.files import atomic_write
from shards.score_scale import ScoreScale
from shards.source_files import read_regular
from shards.text import printable

CALIBRATION = "calibration.json"
NEIGHBOURS = "neighbours.safetensors"
FORMAT_VERSION = 1
CONFIDENCE = 0.9
"""Of intervals, unless another one is asked for."""
UNUSUAL = 0.99
"""An image further from the training images than this share of val images has a note."""
UNUSUAL_NOTE = "unlike the training images"
MOST_BYTES = MODEL_FILES[CALIBRATION]
_MOST_NUMBERS = 200_000
_MOST_TEXT = 1000
NEAREST = 5
"""Nearest training images whose mean distance counts."""
_TENSOR = "embeddings"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distances:
    """How far images of the val part lie from the training images in the embedding space."""

    k: int
    """An image's distance is the mean cosine distance to its k nearest training images."""
    of_val: tuple[float, ...]
    """Distances of the val images, rising."""
    sha256: str
    """Of `neighbours.safetensors`, the embeddings of the training images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a model's scores mean."""

    training_set: str
    split: str
    population: tuple[float, ...]
    """Qualities the model gives images of the training part, rising."""
    intervals: Conformal | None = None
    """None: the split has no val part with labels."""
    distances: Distances | None = None
    """None: the split has no val part."""
    crops: AdaptiveRule | None = None
    """None: no rule with fewer crops keeps the order, or the split has no val part."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Refuse what training cannot have written.

        Raises:
            ValueError: Names what is wrong.
        """
        of_val = self.distances.of_val if self.distances else ()
        for name, rising in (("population", self.population), ("distances", of_val)):
            if not all(map(math.isfinite, rising)) or list(rising) != sorted(rising):
                raise ValueError(f"{name} are finite and rise")
        if len(self.population) + len(of_val) + self._residuals > _MOST_NUMBERS:
            raise ValueError(f"it holds more than {_MOST_NUMBERS:,} numbers")
        if self.distances is not None and not (1 <= self.distances.k <= 1000 and of_val):
            raise ValueError("distances.k lies in 1..1000, and there are distances")
        if max(len(self.training_set), len(self.split)) > _MOST_TEXT:
            raise ValueError(f"a name is longer than {_MOST_TEXT} characters")

    @property
    def summary(self) -> str:
        """What it holds, in a line."""
        said = [f"{len(self.population)} training images of {printable(self.training_set)}"]
        if self.intervals:
            classes = len(self.intervals.residuals)
            said.append(f"intervals from {self.intervals.n} val images in {classes} classes")
        if self.crops:
            said.append(
                f"adaptive crops: {self.crops.share:.0%} of all, rank agreement "
                f"{self.crops.agreement:.4f} on val"
            )
        return "; ".join([*said, *filter(None, [self.missing])])

    @property
    def _residuals(self) -> int:
        return self.intervals.n if self.intervals else 0

    @property
    def missing(self) -> str:
        """What it does not hold and why, as a sentence; empty if nothing."""
        absent = [
            name
            for name, part in (("intervals", self.intervals), ("`unusual`", self.distances))
            if part is None
        ]
        if not absent:
            return ""
        return (
            f"the model's calibration has no {' and no '.join(absent)}: its split {self.split} has "
            "no val part with scores"
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Meaning:
    """A calibration with the embeddings it compares with; answers for arrays of images."""

    calibration: Calibration
    neighbours: NDArray[np.float32]
    """`[m, d]` unit-length embeddings of training images; `[0, 0]` if there are none."""
    digest: str = ""
    """sha256 of `calibration.json`."""

    def percentile(self, quality: Numbers) -> NDArray[np.float64]:
        """Share of the training images, in %, that score lower; equal ones count half."""
        return percentiles(quality, np.asarray(self.calibration.population))

    def unusual(self, embedding: NDArray[np.float32]) -> NDArray[np.float64]:
        """Share of val images [0, 1] nearer to the training images; NaN if it is not known."""
        known = self.calibration.distances
        if known is None:
            return np.full(len(embedding), math.nan)
        found = neighbour_distances(embedding, self.neighbours, k=known.k)
        return percentiles(found, np.asarray(known.of_val)) / 100.0


def prediction_interval(
    calibration: Calibration,
    scale: ScoreScale,
    quality: Numbers,
    spread: Numbers,
    *,
    confidence: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper ends between which people's scores lie with a probability.

    Args:
        calibration: Of the model.
        scale: The training set's; both ends stand in it, cut off where it ends.
        quality: What the model says, in [0, 1] units, higher = better.
        spread: Deviation of each image's crops.
        confidence: The probability.

    Returns:
        NaN where the calibration has no intervals, or too few images for this confidence.
    """
    middle = np.asarray(quality, dtype=np.float64)
    if calibration.intervals is None:
        return np.full(middle.shape, math.nan), np.full(middle.shape, math.nan)
    below, above = calibration.intervals.reach(middle, spread, confidence=confidence)
    is_known = np.isfinite(below) & np.isfinite(above)
    both = [np.where(is_known, middle + one, math.nan) for one in (-below, above)]
    ends = [scale.from_unit(np.clip(one, 0.0, 1.0)) for one in both]
    return np.minimum(*ends), np.maximum(*ends)


def percentiles(values: Numbers, population: NDArray[np.float64]) -> NDArray[np.float64]:
    """Share of a rising population, in %, below each value, equal ones counting half; NaN of none.

    scipy's `percentileofscore(kind="mean")`, which takes a value at a time.
    """
    x = np.asarray(values, dtype=np.float64)
    if not len(population):
        return np.full(x.shape, math.nan)
    below = np.searchsorted(population, x, side="left")
    up_to = np.searchsorted(population, x, side="right")
    return np.asarray((below + up_to) * 50.0 / len(population))


def neighbour_distances(
    embedding: NDArray[np.float32], neighbours: NDArray[np.float32], *, k: int = NEAREST
) -> NDArray[np.float64]:
    """Mean cosine distance of each embedding `[n, d]` to the k nearest of others `[m, d]`."""
    # One row at a time: a matrix product picks its algorithm, and its last bits, by the shape.
    rows = [_one_distance(one, neighbours, k) for one in np.asarray(embedding, np.float32)]
    return np.array(rows, dtype=np.float64)


def _one_distance(one: NDArray[np.float32], neighbours: NDArray[np.float32], k: int) -> float:
    cosine = neighbours @ one
    k = min(k, len(cosine))
    nearest = np.sort(np.partition(cosine, len(cosine) - k)[len(cosine) - k :])
    return float(1.0 - np.mean(nearest, dtype=np.float64))


def spread_of(crops: NDArray[np.float64]) -> NDArray[np.float64]:
    """Deviation of each image's crop qualities `[n, v]`; 0 of a single crop."""
    return np.asarray(np.std(crops, axis=-1))


def pooled_deviation(
    deviation: NDArray[np.float64], crops: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Deviation of the ratings of images whose distribution is the mean of their crops'.

    Args:
        deviation: Of each crop's distribution, `[n, v]`, in [0, 1] units.
        crops: Their means, the crops' qualities, `[n, v]`.
    """
    return np.asarray(np.sqrt(np.mean(deviation**2, axis=-1) + np.var(crops, axis=-1)))


def image_spread(
    crops: NDArray[np.float64], deviation: NDArray[np.float64] | None
) -> NDArray[np.float64]:
    """What intervals are normalised by: the predicted deviation, else how far crops disagree."""
    return spread_of(crops) if deviation is None else np.asarray(deviation, np.float64)


def write_calibration(
    folder: Path, calibration: Calibration, neighbours: NDArray[np.float32]
) -> Meaning:
    """Write both files into a model folder; the calibration last, which names the other."""
    data = safetensors.numpy.save({_TENSOR: neighbours.astype(np.float16)})
    if calibration.distances is not None:
        with atomic_write(folder / NEIGHBOURS) as out:
            out.write(data)
        sha256 = hashlib.sha256(data).hexdigest()
        calibration = dataclasses.replace(
            calibration, distances=dataclasses.replace(calibration.distances, sha256=sha256)
        )
    text = msgspec.json.format(msgspec.json.encode(calibration), indent=0) + b"\n"
    with atomic_write(folder / CALIBRATION) as out:
        out.write(text)
    return Meaning(
        calibration=calibration,
        neighbours=as_kept(neighbours),
        digest=hashlib.sha256(text).hexdigest(),
    )


def as_kept(neighbours: NDArray[np.float32]) -> NDArray[np.float32]:
    """Embeddings as they are read back: half precision on disk."""
    return np.ascontiguousarray(neighbours.astype(np.float16).astype(np.float32))


def parse_calibration(data: bytes) -> Calibration:
    """The calibration of a file's bytes.

    Raises:
        ValueError: If they are none that training has written.
    """
    try:
        found = msgspec.json.decode(data, type=Calibration)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if found.format_version != FORMAT_VERSION:
        raise ValueError(f"format_version is {found.format_version}, not {FORMAT_VERSION}")
    return found


def read_meaning(folder: Path) -> Meaning | None:
    """The calibration of a model folder; None if it has none, as those of version 0.1.

    Raises:
        LmclError: If it is damaged; exit code 5.
    """
    path = folder / CALIBRATION
    if not path.exists():
        return None
    try:
        return parse_meaning(read_regular(path, limit_bytes=MOST_BYTES), read_neighbours(folder))
    except (ValueError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: is no calibration of this version ({printable(error)}); make it "
            f"anew by `lmcl calibrate RUN`, or remove it to score without",
            exit_code=5,
        ) from error


def read_neighbours(folder: Path) -> bytes:
    """Bytes of a model folder's file of training embeddings; none where there is no such file.

    Raises:
        ShardError: If it is no regular file, or larger than one can be.
    """
    path = folder / NEIGHBOURS
    return read_regular(path, limit_bytes=MODEL_FILES[NEIGHBOURS]) if path.exists() else b""


def parse_meaning(data: bytes, neighbours: bytes) -> Meaning:
    """A calibration and the embeddings it compares with, of the bytes of their two files.

    Raises:
        ValueError: If they are none that training has written, or do not belong together.
    """
    calibration = parse_calibration(data)
    return Meaning(
        calibration=calibration,
        neighbours=_embeddings(neighbours, calibration.distances),
        digest=hashlib.sha256(data).hexdigest(),
    )


def _embeddings(data: bytes, distances: Distances | None) -> NDArray[np.float32]:
    if distances is None:
        return np.zeros((0, 0), dtype=np.float32)
    if hashlib.sha256(data).hexdigest() != distances.sha256:
        raise ValueError(
            f"{NEIGHBOURS} is {'not the file it was made with' if data else 'missing'}"
        )
    try:
        found = safetensors.numpy.load(data).get(_TENSOR)
    except (KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"{NEIGHBOURS}: {error}") from error
    if found is None or found.ndim != 2 or found.dtype != np.float16 or not found.size:
        raise ValueError(f"{NEIGHBOURS} holds no embeddings")
    values: NDArray[np.float32] = found.astype(np.float32)
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{NEIGHBOURS} holds values that are not finite")
    return values
