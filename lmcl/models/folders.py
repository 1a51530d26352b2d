"""Model folders, as far as they are known without opening them."""

import hashlib
from pathlib import Path


def model_folder_of(folder: Path) -> Path:
    """The model folder that is meant: `folder` itself, or the one inside a run folder."""
    inner = folder / "model"
    return inner if not (folder / "config.json").is_file() and inner.is_dir() else folder


def fingerprint_of(folder: Path) -> str:
    """What tells a model from every other: a hash over its configuration and weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors"):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
