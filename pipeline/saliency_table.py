"""Table of salient boxes: the teacher's most salient crop of each image, read like a label."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int32, Int64

from pipeline.errors import PipelineError
from shards.files import atomic_write


@dataclass(frozen=True, kw_only=True)
class SaliencyTable:
    """One box (y, x, height, width) per sample, crop-sized and inside its frame."""

    ids: Int64[np.ndarray, " n"]
    """Strictly increasing rows of the set's sample table."""
    boxes: Int32[np.ndarray, "n 4"]
    """One box per id."""

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.boxes):
            raise ValueError(f"{len(self.ids)} ids but {len(self.boxes)} boxes")
        if np.any(np.diff(self.ids) <= 0):
            raise ValueError(
                "the ids of a saliency table must increase; sort them and drop doubles"
            )

    def lookup(self, ids: Int64[np.ndarray, " b"]) -> Int32[np.ndarray, "b 4"]:
        """The boxes of `ids`, in their order.

        Raises:
            PipelineError: If an id has none.
        """
        rows = np.searchsorted(self.ids, ids)
        known = rows < len(self.ids)
        known[known] = self.ids[rows[known]] == ids[known]
        if not known.all():
            missing = ids[~known]
            raise PipelineError(
                f"the saliency table has no box for {missing.size} of {ids.size} samples, first "
                f"{missing[0]}; run the saliency pass over the whole training part",
                exit_code=3,
                ids=tuple(int(sample) for sample in missing[:8]),
            )
        return self.boxes[rows]

    def write(self, path: Path) -> None:
        """Write as parquet (columns id, y, x, height, width); appears whole or not at all."""
        columns = dict(zip(("y", "x", "height", "width"), self.boxes.T, strict=True))
        with atomic_write(path) as out:
            pq.write_table(pa.table({"id": self.ids, **columns}), out)

    @classmethod
    def read(cls, path: Path) -> "SaliencyTable":
        """Read what `write` wrote.

        Raises:
            PipelineError: If the file is missing or is no such table.
        """
        if not path.is_file():
            raise PipelineError(
                f"{path}: no saliency table there; let the run make it (saliency pass)", exit_code=4
            )
        try:
            table = pq.read_table(path, columns=["id", "y", "x", "height", "width"])
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            raise PipelineError(
                f"{path}: not a saliency table ({error}); delete it and repeat the saliency pass",
                exit_code=3,
            ) from error
        boxes = [table[name].to_numpy() for name in ("y", "x", "height", "width")]
        return cls(
            ids=table["id"].to_numpy().astype(np.int64),
            boxes=np.stack(boxes, axis=1).astype(np.int32),
        )
