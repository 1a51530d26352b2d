"""Ranks: which process this is, on which device, with which decoder."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Which process this is, on which device, with which decoder."""

    rank: int
    world_size: int
    device: torch.device
    backend: Literal["auto", "dali", "torch"]
    threads: int | None
    progress: bool
    """Show bars: rank 0 of a terminal."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0
