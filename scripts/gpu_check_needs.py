"""Say what a part of scripts/gpu_check.sh lacks on this machine; exit code 1 if it cannot run."""

import argparse
import importlib.util
import os
from pathlib import Path

KERNELS = ("torch", "triton", "numpy", "click", "tqdm", "jaxtyping")
DATA = (*KERNELS, "torchvision", "PIL", "pyarrow", "fsspec", "msgspec", "nvidia.dali", "webdataset")
MODEL = (*DATA, "timm", "accelerate", "safetensors", "scipy")
TRAINING = (
    *KERNELS, "torchvision", "PIL", "pyarrow", "fsspec", "msgspec", "timm", "accelerate",
    "safetensors", "scipy", "tomli_w",
)  # fmt: skip
NEEDS = {
    "kernels": KERNELS,
    "loader": MODEL,
    "step": (*MODEL, "tomli_w"),
    "score": MODEL,
    "photos": TRAINING,
    "engines": (*TRAINING, "nvidia.dali"),
}


def missing(part: str) -> list[str]:
    """Packages by import name."""
    return [name for name in NEEDS[part] if not _is_there(name)]


def missing_files(photos: Path, stem: str) -> str:
    """What the part `photos` lacks beside packages, as a sentence; empty if nothing."""
    if not (photos / "manifest.json").is_file() or not list((photos / "splits").glob("*.json")):
        return (
            f"photos: {photos} holds no packed set with a split; where the photographs are, "
            f"`lmcl-shard build biq2021 FOLDER --output {photos}` and `lmcl-shard split {photos} "
            "--protocol official --val-fraction 0` make it: carry it here (GPU_CHECK_PHOTOS names "
            "another folder)"
        )
    if stem and not Path(stem).is_file():
        return (
            f"photos: GPU_CHECK_STEM names {stem}, which is not there; unset it for random weights"
        )
    return ""


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
    parser.add_argument("--photos", type=Path, default=Path("build/photos"), help="Packed set.")
    asked = parser.parse_args()
    lacks = missing(asked.part)
    if lacks:
        print(
            f"{asked.part}: this machine lacks {', '.join(lacks)}; carry them as docs/kernels.md "
            "says and set PYTHONPATH"
        )
        raise SystemExit(1)
    if asked.part == "photos" and not asked.rehearse:
        sentence = missing_files(asked.photos, os.environ.get("GPU_CHECK_STEM", ""))
        if sentence:
            print(sentence)
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
