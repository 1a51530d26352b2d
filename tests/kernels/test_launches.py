"""How many operations a step costs beside the five kernels, counted as a GPU would get them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import triton_backend, triton_launch
from kernels.types import LossInputs, LossOptions

HEAVY = {"log_sums", "mean_columns", "finish_rows", "pair_gradient", "finish_gradient",
         "hub_gradient"}  # fmt: skip
if not triton_launch.is_interpreted():
    pytest.skip("a GPU counts its launches by itself", allow_module_level=True)


class Count(TorchDispatchMode):
    """Operations that would be launched: neither views nor new buffers nor plain numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.is_inside = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        # A temperature that the host knows is a float64 number on the CPU.
        on_host = bool(tensors) and all(t.ndim == 0 and t.dtype == torch.float64 for t in tensors)
        returned = function._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
        is_new = name.startswith(("empty", "new_empty", "_local_scalar"))
        # Zeros of a plain number's gradient lie on the host too.
        nothing = isinstance(out, torch.Tensor) and (
            out.numel() == 0 or (out.ndim == 0 and out.dtype == torch.float64)
        )
        if not (self.is_inside or is_view or is_new or on_host or nothing):
            self.names.append(name)
        return out


class Device:
    """The device code, each launch counted once, whatever the interpreter does for it."""

    def __init__(self, real, count: Count) -> None:
        self.real, self.count = real, count

    def __getattr__(self, name: str):
        return Launcher(getattr(self.real, name), name, self.count)


class Launcher:
    def __init__(self, kernel, name: str, count: Count) -> None:
        self.kernel, self.name, self.count = kernel, name, count

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.count.names.append(self.name)
            self.count.is_inside = True
            try:
                return self.kernel[grid](*arguments, **options)
            finally:
                self.count.is_inside = False

        return launch


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Count]:
    count = Count()
    monkeypatch.setattr(triton_launch, "device", Device(triton_launch.device, count))
    with count:
        yield count


def inputs(*, learned: bool, **changes) -> LossInputs:
    torch.manual_seed(0)
    rows, hubs = (torch.nn.functional.normalize(torch.randn(k, 16), dim=1) for k in (9, 3))
    options = {
        "intra_weight": 1.0, "balanced": True, "include_positive": True, "normalize": False,
        "gather": True, "rank_sizes": (), "validate": False, "has_keys": False,
        "backend": "triton", "precision": "bf16",
    }  # fmt: skip
    temperature = torch.tensor(0.1, dtype=torch.float32 if learned else torch.float64)
    return LossInputs(
        rows=rows, hubs=hubs, group=torch.arange(3).repeat_interleave(3), temperature=temperature,
        overlap=None, keys=changes.pop("keys", None), options=LossOptions(**options | changes),
    )  # fmt: skip


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("teacher", [False, True], ids=["student", "teacher"])
@pytest.mark.parametrize("normalize", [False, True], ids=["unit", "normalize"])
def test_forward_and_backward_cost_at_most_eight_small_launches(
    learned, teacher, normalize, monkeypatch
) -> None:
    given = inputs(learned=learned, normalize=normalize, has_keys=teacher)
    if teacher:
        keys = inputs(learned=learned).rows.flip(0)
        given = inputs(learned=learned, normalize=normalize, has_keys=True, keys=keys)
    upstream = torch.ones(())
    with counted(monkeypatch) as count:
        saved = triton_backend.forward(given, with_gradient=True)
        triton_backend.backward(upstream, given, saved)
    # With a teacher there are four kernels, and its keys are one more table to round.
    assert len(count.names) <= 5 + 8, count.names
    assert len([name for name in count.names if name in HEAVY]) == (4 if teacher else 5)
    assert count.names.count("find_images") == 1


def test_an_odd_number_of_rows_compiles_nothing_new() -> None:
    group = torch.arange(3).repeat_interleave(torch.tensor([2, 4, 1]))
    groups = triton_launch.as_groups(triton_launch.image_tables(group, hubs=3), 7, hubs=3)
    stats = torch.empty(triton_launch.STATS, triton_launch.padded_length(7))
    parts = [groups.starts, groups.image, groups.first, groups.end, *stats]
    assert {part.data_ptr() % 16 for part in parts} == {parts[0].data_ptr() % 16}
