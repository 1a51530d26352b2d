"""Three lines of Python: load a model, score an image, know the scale.

model = lmcl.load("runs/x/model")
model.score("photo.jpg")
model.scale.label
"""

from pathlib import Path

from lmcl.scoring.scorer import Scale, Scored, Scorer, open_scorer

__all__ = ["Scale", "Scored", "Scorer", "load"]


def load(path: str | Path, *, device: str = "auto") -> Scorer:
    """Open a released model folder, or a run folder that holds one; nothing is downloaded.

    Args:
        path: Folder with config.json and model.safetensors.
        device: `auto` takes a GPU if there is one.

    Raises:
        LmclError: If the folder is missing (4) or damaged (5).
    """
    return open_scorer(Path(path), device=device)
