"""Which engine scores: an exported model in onnxruntime on a processor, else PyTorch.

Nothing is exported on the way: an engine is taken because the file for it is there (decision 0411).
"""

import os
from pathlib import Path
from typing import Literal

from lmcl.errors import LmclError
from lmcl.inference.onnx_engine import SUFFIX, OnnxEngine
from lmcl.models.folders import fingerprint_of, model_folder_of
from lmcl.models.named import is_read_only
from shards.text import printable

EngineName = Literal["auto", "onnx", "torch"]
_GPU_DRIVER = ("/dev/nvidiactl", "/dev/kfd")


def open_export(
    path: Path, engine: EngineName, *, device: str, precision: str, needs_torch: str = ""
) -> OnnxEngine | None:
    """The exported model that scores for a model, opened; None: PyTorch does.

    Args:
        path: A model folder, a run that holds one, or an exported file.
        engine: `onnx` and `torch` ask for one. `auto` takes an exported file if `path` is one, or
            if one of this very model lies beside it and the device is a processor.
        device: As `--device` has it; on a GPU the engine is PyTorch.
        precision: `int8` is an exported file's only; `bfloat16` PyTorch's only.
        needs_torch: What else was asked for that only PyTorch does; empty: nothing.

    Raises:
        LmclError: If what was asked for does not go together (2), or there is no such file (4).
    """
    is_exported = path.suffix == SUFFIX and not path.is_dir()
    is_on_gpu = device.startswith("cuda") or (device == "auto" and not is_exported and has_gpu())
    reasons = {
        needs_torch: bool(needs_torch),
        f"--precision {precision}": precision == "bfloat16",
        f"--device {device}": is_on_gpu,
    }
    against = [what for what, holds in reasons.items() if holds]
    wants = "onnx" if is_exported or precision == "int8" else engine
    if wants == "onnx" and (against or engine == "torch"):
        asked = "--precision int8" if precision == "int8" else printable(path)
        raise LmclError(
            f"{' and '.join(against) or '--engine torch'} needs PyTorch, {asked} needs onnxruntime "
            "on the processor; leave one of them out, or name the model folder",
            exit_code=2,
        )
    if is_exported:
        return OnnxEngine(path)
    if wants == "torch" or against:
        return None
    try:
        found = _beside(path, precision)
    except LmclError:
        # Of an earlier version, or onnxruntime is not there: no reason not to score.
        if wants == "onnx":
            raise
        return None
    if found is None and wants == "onnx":
        raise _no_export(path, precision)
    return found


def has_gpu() -> bool:
    """Whether a GPU's driver is loaded; asking PyTorch would take longer than scoring."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible != "" and any(os.path.exists(place) for place in _GPU_DRIVER)


def export_name(precision: str) -> str:
    """File name of a model's export in its run's `export` folder."""
    return f"model.int8{SUFFIX}" if precision == "int8" else f"model{SUFFIX}"


def _beside(path: Path, precision: str) -> OnnxEngine | None:
    """The export of a model folder that was made of the weights that are in it now."""
    folder = model_folder_of(path)
    if not (folder / "config.json").is_file():
        return None
    # Where nothing is written, an export lies where it was made.
    for run in (Path(),) if is_read_only(folder) else (folder, folder.parent):
        file = run / "export" / export_name(precision)
        if not file.is_file():
            continue
        found = OnnxEngine(file)
        if found.card.sha256 == fingerprint_of(folder):
            return found
    return None


def _no_export(path: Path, precision: str) -> LmclError:
    more = " --precision int8" if precision == "int8" else ""
    return LmclError(
        f"{printable(path)}: there is no export/{export_name(precision)} of the weights that are "
        f"in it; `lmcl export {printable(path)} --format onnx{more}` makes one",
        exit_code=4,
    )
