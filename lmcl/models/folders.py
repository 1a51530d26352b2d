"""Model folders, as far as they are known without opening them."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

MODEL_FILES: Mapping[str, int] = {
    "config.json": 1 << 20,
    "README.md": 1 << 20,
    "thresholds.json": 1 << 20,
    "calibration.json": 1 << 23,
    "neighbours.safetensors": 1 << 26,
    "training_images.json": 1 << 20,
    "model.safetensors": 1 << 36,
}
"""All that a model folder consists of, and the most bytes each file may have: JSON, safetensors
and the model card. Nothing else travels to or from a hub. The weights come last: a folder whose
download was interrupted has none."""
REQUIRED_FILES = ("config.json", "model.safetensors")


def model_folder_of(folder: Path) -> Path:
    """The model folder that is meant: `folder` itself, or the one inside a run folder."""
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def fingerprint_of(folder: Path) -> str:
    """What tells a model from every other: a hash over its configuration and weights."""
    digest = hashlib.sha256()
    for name in REQUIRED_FILES:
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
