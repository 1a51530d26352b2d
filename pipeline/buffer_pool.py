"""Memory of batches that is used again once nobody holds a batch in it."""

import weakref
from collections import deque

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor


class BufferPool:
    """Gives out tensors of one shape; takes their memory back when the last reference goes.

    Fresh memory costs a page fault for every 4 KB: 0.3 to 0.6 ms for ten crops of 224, as much as
    cutting them two to four times.
    """

    def __init__(self, shape: tuple[int, ...], *, spare: int) -> None:
        """Args: shape of the uint8 tensors; most buffers to keep that nobody holds."""
        self._shape = shape
        self._free: deque[UInt8[np.ndarray, " _bytes"]] = deque(maxlen=spare)

    def take(self) -> UInt8[Tensor, "..."]:
        """A tensor whose contents are arbitrary; safe to call from several threads."""
        try:
            buffer = self._free.pop()
        except IndexError:
            buffer = np.empty(int(np.prod(self._shape)), dtype=np.uint8)
        # The tensor, its views and arrays made of it hold this array, and nothing else does.
        lease = buffer.reshape(self._shape)
        weakref.finalize(lease, self._free.append, buffer).atexit = False
        return torch.from_numpy(lease)
