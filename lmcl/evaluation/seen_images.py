"""Which images of a set a model has seen: told by the run's own set, and by the model's own list.

The set may have moved; the list (`lmcl.models.training_images`) travels with the weights and knows
the images of models that came before, but of more than 16,384 images it is a sample.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8

from lmcl.config import Config
from lmcl.evaluation.data import open_data
from lmcl.models.training_images import TrainingImages, prefixes, read_training_images
from shards.errors import ShardError


@dataclass(frozen=True, kw_only=True, eq=False)
class SeenImages:
    """Images a model learned from or was chosen by."""

    own: UInt8[np.ndarray, "n 32"] | None = None
    """sha256 of those of its own set; None: the set is not there."""
    listed: TrainingImages | None = None
    """The list in the model's folder, if it has one."""
    _prefixes: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        own = np.zeros((0, 32), np.uint8) if self.own is None else self.own
        object.__setattr__(self, "_prefixes", frozenset(prefixes(own).tolist()))

    @property
    def is_known(self) -> bool:
        """Whether an image that is not found was not seen, as far as the run's own set goes."""
        return self.own is not None or (self.listed is not None and self.listed.knows_all)

    def holds(self, sha256: UInt8[np.ndarray, "n 32"]) -> Bool[np.ndarray, " n"]:
        """Which of some images it has seen."""
        found = np.array([one in self._prefixes for one in prefixes(sha256).tolist()], dtype=bool)
        return found if self.listed is None else found | self.listed.seen(sha256)


def find_seen_images(folder: Path, config: Config | None) -> SeenImages:
    """What a model has seen.

    Args:
        folder: The model's; what is no folder has no list.
        config: Of its run, with its set where it is seen from here; None for a model without one.

    Raises:
        LmclError: If the model's list is damaged; exit code 5.
    """
    listed = read_training_images(folder) if folder.is_dir() else None
    if config is None:
        return SeenImages(listed=listed)
    try:
        own, split = open_data(config.data)
    except (ShardError, OSError):
        return SeenImages(listed=listed)
    rows = own.samples.sha256[np.concatenate([split.train, split.val])]
    return SeenImages(own=rows, listed=listed)
