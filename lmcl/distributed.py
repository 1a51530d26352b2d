"""Ranks: which process this is, on which device, with which decoder."""

import os
import re
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


_LOST_PEER = re.compile(
    r"closed by peer|reset by peer|broken pipe|connection refused|remote process exited|"
    r"socket timeout|heartbeat|peer (process )?(is )?(dead|gone)",
    re.IGNORECASE,
)
"""How gloo, NCCL and torch's store say that another rank is gone."""


def is_lost_peer(error: RuntimeError) -> bool:
    """Whether an exchange between ranks failed because another rank ended."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return False
    is_ours = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    return is_ours and bool(_LOST_PEER.search(str(error)))


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
