"""Models by name: `starter` comes with the project, `hf://USER/NAME` is on a hub, else a path."""

from dataclasses import dataclass
from pathlib import Path

from lmcl.models.folders import model_folder_of
from lmcl.utils.hub_names import is_hub_name, parse_hub_name

STARTER = "starter"
"""What `lmcl score` and `lmcl.load` take where no model is named."""
STARTER_FOLDER = Path(__file__).resolve().parents[1] / "starter"
"""Where it lies; nothing is written there."""


@dataclass(frozen=True, kw_only=True)
class FoundModel:
    """Where a model is."""

    folder: Path
    source: str = ""
    """Where on a hub it is from, `hf://USER/NAME@COMMIT`; empty for a folder of this machine."""


def locate_model(model: str | Path) -> FoundModel:
    """The folder of a model; one on a hub is downloaded, unless it is in the cache already.

    Args:
        model: `starter` (a text, not a path: `./starter` is a folder of that name),
            `hf://USER/NAME[@REVISION]`, a model folder, or a run folder that holds one.

    Raises:
        LmclError: If a model on a hub cannot be had (`lmcl.models.hub`).
    """
    if model == STARTER:
        return FoundModel(folder=STARTER_FOLDER)
    if is_hub_name(model):
        from lmcl.models.hub import download

        found = download(parse_hub_name(model))
        return FoundModel(folder=found.folder, source=str(found.name))
    return FoundModel(folder=model_folder_of(Path(model).expanduser()))


def find_model(model: str | Path) -> Path:
    """The folder of a model, as `locate_model` finds it."""
    return locate_model(model).folder


def pin_model(model: str) -> str:
    """The model's name with its commit, if it is on a hub: what is asked twice is the same twice.

    Raises:
        LmclError: As `locate_model`.
    """
    return locate_model(model).source or model


def is_read_only(folder: Path) -> bool:
    """Whether nothing is written into a model folder: the project's own, and a hub's cache."""
    return folder == STARTER_FOLDER or is_cached(folder)


def is_cached(folder: Path) -> bool:
    """Whether a folder lies where `huggingface_hub` keeps what it has downloaded."""
    repository = folder.parent.parent
    return folder.parent.name == "snapshots" and repository.name.startswith("models--")
