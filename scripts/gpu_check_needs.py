"""Say what a part of scripts/gpu_check.sh lacks on this machine; exit code 1 if it cannot run."""

import argparse
import importlib.util

KERNELS = ("torch", "triton", "numpy", "click", "tqdm", "jaxtyping")
DATA = (*KERNELS, "torchvision", "PIL", "pyarrow", "fsspec", "msgspec", "nvidia.dali", "webdataset")
MODEL = (*DATA, "timm", "accelerate", "safetensors", "scipy")
NEEDS = {
    "kernels": KERNELS,
    "loader": MODEL,
    "step": (*MODEL, "tomli_w"),
    "score": MODEL,
}


def missing(part: str) -> list[str]:
    """Packages by import name."""
    return [name for name in NEEDS[part] if not _is_there(name)]


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main() -> None:
    """Print one sentence if something is missing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(NEEDS))
    parser.add_argument("--rehearse", action="store_true", help="No GPU is needed.")
    asked = parser.parse_args()
    lacks = missing(asked.part)
    if lacks:
        print(
            f"{asked.part}: this machine lacks {', '.join(lacks)}; carry them as docs/kernels.md "
            "says and set PYTHONPATH"
        )
        raise SystemExit(1)
    import torch

    if not asked.rehearse and not torch.cuda.is_available():
        print(
            f"{asked.part}: PyTorch {torch.__version__} sees no CUDA GPU here; run this on a "
            "machine that has one, or give --rehearse to try every step on the CPU"
        )
        raise SystemExit(1)


if __name__ == "__main__":
    main()
