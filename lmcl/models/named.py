"""Models by name: `starter` is the one that comes with the project; anything else is a path."""

from pathlib import Path

from lmcl.models.folders import model_folder_of

STARTER = "starter"
"""What `lmcl score` and `lmcl.load` take where no model is named."""
STARTER_FOLDER = Path(__file__).resolve().parents[1] / "starter"
"""Where it lies; nothing is written there."""


def find_model(model: str | Path) -> Path:
    """The folder of a model.

    Args:
        model: `starter` (a text, not a path: `./starter` is a folder of that name), a model folder,
            or a run folder that holds one.
    """
    return STARTER_FOLDER if model == STARTER else model_folder_of(Path(model).expanduser())
