"""Ranks: which process this is, on which device, with which decoder."""

from dataclasses import dataclass
from typing import Literal

import torch
from accelerate import Accelerator


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Which process this is, on which device, with which decoder."""

    rank: int
    world_size: int
    device: torch.device
    backend: Literal["auto", "dali", "torch"]
    threads: int | None
    """Decoder threads; None = this process's share of the machine's cores."""
    progress: bool
    """Show bars: rank 0 of a terminal."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def make_rank_context(
    accelerator: Accelerator,
    *,
    backend: Literal["auto", "dali", "torch"],
    threads: int,
    progress: bool,
) -> RankContext:
    """This process as Accelerate sees it.

    Args:
        accelerator: Knows rank, world size and device.
        backend: Who decodes (`runtime.backend`).
        threads: Decoder threads (`runtime.threads`); 0 = this process's share of the cores.
        progress: Whether bars are wanted; only rank 0 shows them.
    """
    return RankContext(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        backend=backend,
        threads=threads or None,
        progress=progress and accelerator.is_main_process,
    )
