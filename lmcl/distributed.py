"""Ranks: which process this is, on which device, with which decoder."""

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from pipeline.decode_config import DecodeConfig


@dataclass(frozen=True, kw_only=True)
class RankContext:
    """Which process this is, on which device, with which decoder."""

    rank: int
    world_size: int
    device: torch.device
    decode: DecodeConfig
    """How every loader of this process decodes."""
    progress: bool
    """Show bars: rank 0 of a terminal."""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0


def make_rank_context(
    accelerator: Accelerator, *, decode: DecodeConfig, progress: bool
) -> RankContext:
    """This process as Accelerate sees it.

    Args:
        accelerator: Knows rank, world size and device.
        decode: How every loader of this process decodes.
        progress: Whether bars are wanted; only rank 0 shows them.
    """
    return RankContext(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        decode=decode,
        progress=progress and accelerator.is_main_process,
    )
