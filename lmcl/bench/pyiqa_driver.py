"""pyiqa's own command, run by another environment's Python, with random weights and a clock.

`python pyiqa_driver.py METRIC FOLDER CROPS` runs `pyiqa METRIC -t FOLDER --device cpu` and prints
the seconds from the loaded metric to the end as JSON. Nothing of this project is imported. The
network, the loop, the decoding and the crops are pyiqa's; only the download of weights is left out,
which changes what is answered and not what it costs. `vit-s` puts a plain timm ViT-S of our size
into pyiqa's loop in place of its networks: what the loop costs, apart from the network.
"""

import importlib
import json
import resource
import sys
import time
from typing import Any


def main(metric: str, folder: str, crops: int) -> None:
    """Run the command and print what it took."""
    torch = importlib.import_module("torch")
    timm: Any = importlib.import_module("timm")
    create: Any = timm.create_model
    timm.create_model = lambda *a, **k: create(*a, **{**k, "pretrained": False})
    torch.manual_seed(0)
    configs = importlib.import_module("pyiqa.default_model_configs").DEFAULT_CONFIGS
    if metric == "vit-s":
        _register_vit(torch, create)
        configs[metric] = {"metric_opts": {"type": "PlainViTS"}, "metric_mode": "NR"}
    else:
        arch: Any = importlib.import_module("pyiqa.archs.hypernet_arch")
        arch.load_pretrained_network = lambda *_a, **_k: None
    configs[metric]["metric_opts"]["num_crop"] = crops
    command: Any = importlib.import_module("pyiqa.pyiqa_cmd")
    started: list[float] = []
    load: Any = command.create_metric

    def loaded(*arguments: Any, **options: Any) -> Any:
        found = load(*arguments, **options)
        started.extend((time.perf_counter(), _cpu_seconds()))
        return found

    command.create_metric = loaded
    sys.argv = ["pyiqa", metric, "-t", folder, "--device", "cpu"]
    command.main()
    wall, cpu = time.perf_counter() - started[0], _cpu_seconds() - started[1]
    print(json.dumps({"seconds": wall, "cpu_seconds": cpu}))


def _register_vit(torch: Any, create: Any) -> None:
    util = importlib.import_module("pyiqa.archs.arch_util")
    registry = importlib.import_module("pyiqa.utils.registry").ARCH_REGISTRY

    class PlainViTS(torch.nn.Module):  # type: ignore[misc]
        """ViT-S on uniform crops, mean over them, as pyiqa's own networks do it."""

        def __init__(self, num_crop: int = 10) -> None:
            super().__init__()
            self.net = create("deit3_small_patch16_224", num_classes=1)
            self.num_crop = num_crop

        def forward(self, x: Any) -> Any:
            """Score of a batch of images, [b, 1]."""
            crops = util.uniform_crop([x], 224, self.num_crop)
            return self.net((crops - 0.45) / 0.225).reshape(len(x), -1).mean(dim=1, keepdim=True)

    registry.register()(PlainViTS)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
