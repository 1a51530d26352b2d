"""Three lines of Python: load a model, score an image, know the scale.

model = lmcl.load("runs/x/model")
model.score("photo.jpg")
model.scale.label
"""

from pathlib import Path

from lmcl.inference.scorer import Precision, Scale, Scored, Scorer, open_scorer

__all__ = ["Scale", "Scored", "Scorer", "load"]


def load(path: str | Path, *, device: str = "auto", precision: Precision = "float32") -> Scorer:
    """Open a released model folder, or a run folder that holds one; nothing is downloaded.

    Args:
        path: Folder with config.json and model.safetensors.
        device: `auto` takes a GPU if there is one.
        precision: `bfloat16` is faster where the processor knows it; scores move by some
            thousandths of the range (docs/scoring.md).

    Raises:
        LmclError: If the folder is missing (4) or damaged (5).
    """
    return open_scorer(Path(path), device=device, precision=precision)
