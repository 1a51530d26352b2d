"""Seeds: randomness as a function of the position in a run."""

import numpy as np
import torch


def seed_step(seed: int, *, epoch: int, step: int, rank: int, part: int = 0) -> None:
    """Make torch's randomness in one step, or one part of it, a function of its position.

    Nothing has to be saved for resuming, and ranks differ (docs/decisions/0003-randomness.md).
    """
    place = [seed, epoch, step, rank, *([part] if part else [])]
    state = np.random.SeedSequence(place).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))
