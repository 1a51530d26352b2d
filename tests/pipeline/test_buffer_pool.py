"""Memory of a batch comes back when, and only when, nobody holds any part of it."""

import pytest
import torch
from torch import Tensor

from pipeline.buffer_pool import BufferPool


def test_memory_is_used_again_once_a_tensor_is_gone() -> None:
    pool = BufferPool((4, 3), spare=2)
    tensor = pool.take()
    address = tensor.data_ptr()
    del tensor
    assert pool.take().data_ptr() == address


@pytest.mark.parametrize(
    "part",
    [
        lambda tensor: tensor[1:],
        lambda tensor: tensor.permute(1, 0),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.numpy()[2, 1:],
        lambda tensor: torch.utils.dlpack.from_dlpack(tensor.view(-1)[3:]),
    ],
    ids=["slice", "view", "array", "slice-of-array", "dlpack"],
)
def test_memory_is_not_used_again_while_a_part_of_it_is_held(part: object) -> None:
    pool = BufferPool((4, 3), spare=2)
    tensor: Tensor = pool.take().fill_(7)
    address, held = tensor.data_ptr(), part(tensor)
    del tensor
    other = pool.take().fill_(1)
    assert other.data_ptr() != address
    assert (held == 7).all()


def test_no_more_memory_is_kept_than_was_asked_for() -> None:
    pool = BufferPool((4, 3), spare=1)
    held = [pool.take() for _ in range(5)]
    del held
    assert len(pool._free) == 1
