"""Which images a model has seen, as hashes of their bytes beside its weights.

Names tell nothing: two own sets have files of the same names, and the same photographs lie in sets
of other names. The file `training_images.json` of a model folder holds the first eight bytes of the
sha256 of each image; of more than 16,384 images those with the smallest hashes, which are a random
sample of them (docs/decisions/0015).
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from jaxtyping import Bool, UInt8
from numpy.typing import NDArray

from lmcl.errors import LmclError
from lmcl.models.folders import MODEL_FILES
from shards.errors import ShardError
from shards.files import atomic_write
from shards.source_files import read_regular
from shards.text import printable

TRAINING_IMAGES = "training_images.json"
MOST_KEPT = 1 << 14
"""Hashes kept of each kind: 131,072 bytes, and every image of the usual sets."""
_BYTES = 8
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ImageSketch:
    """The smallest hashes of a collection of images."""

    count: int = 0
    """Images with different bytes; of sketches put together at most so many."""
    hashes: bytes = b""
    """The first 8 bytes of their sha256, rising, one after another; all, or the smallest 16,384."""

    def __post_init__(self) -> None:
        values = self.values
        if len(values) > min(self.count, MOST_KEPT) or np.any(values[1:] <= values[:-1]):
            raise ValueError("hashes rise, and there are no more of them than images")
        if not self.is_whole and len(values) < MOST_KEPT:
            raise ValueError(f"{len(values)} hashes stand for {self.count} images")

    @property
    def values(self) -> NDArray[np.uint64]:
        """The hashes as numbers."""
        if len(self.hashes) % _BYTES:
            raise ValueError(f"hashes have {_BYTES} bytes each")
        return np.frombuffer(self.hashes, ">u8").astype(np.uint64)

    @property
    def is_whole(self) -> bool:
        """Whether every image is in it."""
        return self.count <= MOST_KEPT

    @property
    def share(self) -> float:
        """Share of the images that it knows."""
        return 1.0 if self.is_whole else MOST_KEPT / self.count

    def holds(self, sha256: UInt8[np.ndarray, "n 32"]) -> Bool[np.ndarray, " n"]:
        """Which of some images are among those kept."""
        found: Bool[np.ndarray, " n"] = np.isin(prefixes(sha256), self.values)
        return found


def sketch_images(sha256: UInt8[np.ndarray, "n 32"]) -> ImageSketch:
    """The sketch of images by the hashes of their bytes."""
    return _sketch(np.unique(prefixes(sha256)))


def unite(sketches: Iterable[ImageSketch]) -> ImageSketch:
    """The sketch of all images of some collections.

    Where one of them is a sample, the count is their sum: shared images cannot be told then.
    """
    parts = tuple(sketches)
    values = np.unique(np.concatenate([part.values for part in parts]))
    if all(part.is_whole for part in parts):
        return _sketch(values)
    # Below the largest hash of each sample all images are known, above it some are missing.
    known = min(part.values[-1] for part in parts if not part.is_whole)
    values = values[values <= known]
    return ImageSketch(count=sum(part.count for part in parts), hashes=_packed(values[:MOST_KEPT]))


@dataclass(frozen=True, kw_only=True)
class TrainingImages:
    """What a model has seen, by itself or as the model it started from."""

    learned: ImageSketch
    """Images it learned from."""
    selected: ImageSketch
    """Images it was chosen by (val parts)."""
    set_sha256: str = ""
    """Of the sample table of its own set."""
    is_complete: bool = True
    """False if it started from a model that does not say what it had seen."""
    format_version: int = FORMAT_VERSION

    def seen(self, sha256: UInt8[np.ndarray, "n 32"]) -> Bool[np.ndarray, " n"]:
        """Which of some images it learned from or was chosen by, as far as is known."""
        found: Bool[np.ndarray, " n"] = self.learned.holds(sha256) | self.selected.holds(sha256)
        return found

    @property
    def knows_all(self) -> bool:
        """Whether an image that `seen` does not find was not seen."""
        return self.is_complete and self.learned.is_whole and self.selected.is_whole

    def after(self, earlier: "TrainingImages | None") -> "TrainingImages":
        """What a model has seen that started from one which had seen `earlier`; None: unknown."""
        if earlier is None:
            return replace(self, is_complete=False)
        return replace(
            self,
            learned=unite((self.learned, earlier.learned)),
            selected=unite((self.selected, earlier.selected)),
            is_complete=self.is_complete and earlier.is_complete,
        )


def write_training_images(folder: Path, images: TrainingImages) -> None:
    """Write what a model has seen into its folder."""
    with atomic_write(folder / TRAINING_IMAGES) as out:
        out.write(msgspec.json.encode(images) + b"\n")


def read_training_images(folder: Path) -> TrainingImages | None:
    """What the model of a folder has seen; None if it does not say, as earlier versions did not.

    Raises:
        LmclError: If the file is damaged; exit code 5.
    """
    path = folder / TRAINING_IMAGES
    if not path.exists():
        return None
    try:
        data = read_regular(path, limit_bytes=MODEL_FILES[TRAINING_IMAGES])
        found = msgspec.json.decode(data, type=TrainingImages)
        if found.format_version != FORMAT_VERSION:
            raise ValueError(f"it has format version {found.format_version}")
    except (msgspec.DecodeError, ValueError, RecursionError, ShardError) as error:
        raise LmclError(
            f"{printable(path)}: does not say which images the model has seen "
            f"({printable(error)}); take the folder as lmcl wrote it, or remove that file: nothing "
            "is known then",
            exit_code=5,
        ) from error
    return found


def prefixes(sha256: UInt8[np.ndarray, "n 32"]) -> NDArray[np.uint64]:
    """The first eight bytes of every hash, as numbers."""
    kept = np.ascontiguousarray(sha256[:, :_BYTES])
    found: NDArray[np.uint64] = kept.view(">u8").reshape(-1).astype(np.uint64)
    return found


def _sketch(values: NDArray[np.uint64]) -> ImageSketch:
    return ImageSketch(count=len(values), hashes=_packed(values[:MOST_KEPT]))


def _packed(values: NDArray[np.uint64]) -> bytes:
    return values.astype(">u8").tobytes()
