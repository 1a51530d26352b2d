"""Files that are either whole or not there."""

import difflib
import os
from pathlib import Path

from lmcl.errors import LmclError
from lmcl.utils.hub_names import refuse_hub_name
from shards.files import atomic_write
from shards.text import looked_at, printable


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a file so that nobody ever sees half of it (`shards.files.atomic_write`)."""
    with atomic_write(path) as out:
        out.write(data.encode("utf-8") if isinstance(data, str) else data)


def require_run_folder(root: Path) -> None:
    """Refuse what is no run folder, before anything in it is asked for.

    Raises:
        LmclError: If there is no such folder (exit code 4); a similar one beside it is offered. If
            it is a model and no run (exit code 2).
    """
    refuse_hub_name(root)
    if root.is_dir():
        _refuse_model_folder(root)
        return
    if str(root) == "starter":
        raise LmclError(
            "starter: a model that comes with the project, and this command reads a run: its "
            "images, split and predictions; name a run folder (`lmcl train` makes one)",
            exit_code=2,
        )
    beside = root.parent
    runs = [each.name for each in beside.iterdir() if each.is_dir()] if beside.is_dir() else []
    close = difflib.get_close_matches(root.name, sorted(runs), n=1)
    offer = f"; did you mean {printable(beside / close[0])}?" if close else ""
    what = "a file, and no run folder" if root.exists() else "no such run folder"
    raise LmclError(
        f"{printable(root)}: {what}{looked_at(root)}; `lmcl train` makes one{offer}", exit_code=4
    )


def _refuse_model_folder(root: Path) -> None:
    """Refuse the model folder of a run in the run's place.

    Raises:
        LmclError: Names the run if the folder lies in one; exit code 2.
    """
    holds = [name for name in ("config.json", "model.safetensors") if (root / name).is_file()]
    if len(holds) < 2 or (root / "config.toml").exists() or (root / "predictions").exists():
        return
    run = Path(os.path.abspath(root)).parent
    way_on = "name a run folder"
    if (run / "config.toml").is_file():
        way_on = f"name its run, {printable(os.path.normpath(root / os.pardir))}"
    raise LmclError(
        f"{printable(root)}: a model folder, and this command reads a run: its images, split and "
        f"predictions; {way_on}",
        exit_code=2,
    )


def make_output_folder(path: Path) -> None:
    """Make the folder that `--output` names, before the work that would end there.

    Raises:
        LmclError: If a file is in its place, or it cannot be made (exit code 2).
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LmclError(
            f"--output {path}: cannot be made a folder ({error.strerror}); name another one",
            exit_code=2,
        ) from error
