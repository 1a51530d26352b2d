import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.backends.dali_graph import decodes_rows_only, define_graph
from pipeline.backends.select import agree_on_gpu, fill_machine_defaults
from pipeline.decode_config import DecodeConfig
from pipeline.request import ViewSpec

SPECS = {
    "crops": ViewSpec(batch_size=4, views=2, size=8, whole=False, scales=False),
    "scaled": ViewSpec(batch_size=4, views=2, size=8, whole=False, scales=True),
    "whole": ViewSpec(batch_size=4, views=1, size=8, whole=True, scales=False),
}
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("decoder", ["gpu", "cpu"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_dali_takes_the_graph_for_a_gpu(spec: ViewSpec, decoder: Any) -> None:
    # Real DALI checks operators, arguments and devices here; it builds only where there is a GPU.
    config = DecodeConfig(threads=1, pin_threads=True, hw_decoder_load=0.5)
    pipe, _ = define_graph(spec, device=GPU, decoder=decoder, config=config)
    assert pipe.device_id == 0
    assert pipe.max_batch_size == 4


def test_parts_of_an_image_are_decoded_on_the_cpu_alone() -> None:
    assert [decodes_rows_only(spec, "cpu") for spec in SPECS.values()] == [True, False, False]
    assert not any(decodes_rows_only(spec, "gpu") for spec in SPECS.values())


class _Recorded:
    """A node of the stand-in's graph: what any operator gives back."""

    def __getitem__(self, _: object) -> "_Recorded":
        return self

    def gpu(self) -> "_Recorded":
        return self

    def shape(self, **_: object) -> "_Recorded":
        return self


class _Dali(ModuleType):
    """Stands in for `nvidia.dali` and writes down what the graph is built with."""

    def __init__(self) -> None:
        super().__init__("nvidia.dali")
        self.pipelines: list[dict[str, Any]] = []
        self.operators: list[tuple[str, dict[str, Any]]] = []
        self.types = SimpleNamespace(UINT8=0, INT32=1, INT64=2, FLOAT=3, INTERP_TRIANGULAR=4)
        self.fn = self
        self.decoders = SimpleNamespace(
            image=self._operator("decoders.image"), image_slice=self._operator("image_slice")
        )
        for name in ("multi_paste", "reshape", "resize", "peek_image_shape"):
            setattr(self, name, self._operator(name))

    def Pipeline(self, **options: Any) -> "_Dali":  # noqa: N802
        self.pipelines.append(options)
        return self

    def external_source(self, *, num_outputs: int, **_: Any) -> list[_Recorded]:
        return [_Recorded() for _ in range(num_outputs)]

    def set_outputs(self, *_: object) -> None: ...

    def __enter__(self) -> "_Dali":
        return self

    def __exit__(self, *_: object) -> None: ...

    def _operator(self, name: str) -> Any:
        def record(*_: object, **options: Any) -> _Recorded:
            self.operators.append((name, options))
            return _Recorded()

        return record


def test_every_rank_decodes_on_its_own_gpu_with_pinned_threads_and_the_settings_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    config = DecodeConfig(
        threads=3, prefetch=4, hw_decoder_load=0.7,
        device_memory_padding=1 << 25, host_memory_padding=1 << 22,
    )  # fmt: skip
    for local_rank in range(4):
        dali = _Dali()
        monkeypatch.setitem(sys.modules, "nvidia.dali", dali)
        # What resolve_device makes of "cuda" once the launcher has set the current device.
        device = agree_on_gpu(None, current=local_rank)
        filled = fill_machine_defaults(config)
        define_graph(SPECS["crops"], device=device, decoder="gpu", config=filled)
        assert dali.pipelines == [{
            "batch_size": 4, "num_threads": 3, "device_id": local_rank,
            "prefetch_queue_depth": 4, "set_affinity": True,
        }]  # fmt: skip
        operators = dict(dali.operators)
        assert operators["decoders.image"] == {
            "device": "mixed", "jpeg_fancy_upsampling": True, "hw_decoder_load": 0.7,
            "device_memory_padding": 1 << 25, "host_memory_padding": 1 << 22, "affine": True,
        }  # fmt: skip
        assert [name for name, _ in dali.operators].count("multi_paste") == 1
        assert np.array_equal(operators["multi_paste"]["shapes"], np.full((2, 2), 8))
