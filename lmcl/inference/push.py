"""Put a model folder on a hub: the files of `lmcl.models.folders.MODEL_FILES`, in one commit."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmcl.errors import LmclError
from lmcl.evaluation.calibration import read_meaning
from lmcl.evaluation.threshold import read_rules
from lmcl.models.folders import MODEL_FILES
from lmcl.models.hub import explained, import_hub
from lmcl.models.named import is_cached
from lmcl.models.pretrained import load_model
from lmcl.models.training_images import read_training_images
from lmcl.utils.hub_names import HubName
from shards.errors import ShardError
from shards.source_files import read_regular
from shards.text import printable

_LICENCE = re.compile(r"^license:[ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What goes to a hub."""

    folder: Path
    files: dict[str, int]
    """Bytes of each file."""
    left_out: tuple[str, ...]
    """What else lies in the folder, and stays."""
    licence: str
    """As the model card has it; empty: it names none."""

    def lines(self, name: HubName, *, private: bool) -> list[str]:
        """What is uploaded, for the terminal."""
        whose = "private" if private else "public"
        total = f"{sum(self.files.values()):,} bytes in {len(self.files)} files"
        said = [f"{name} ({whose}): {total}, licence: {self.licence or 'none named'}"]
        said += [f"  {file}: {size:,} bytes" for file, size in self.files.items()]
        if self.left_out:
            said.append(f"left out: {printable(', '.join(self.left_out), 500)}")
        return said


def plan_upload(folder: Path) -> Upload:
    """Open a model folder as `lmcl score` does, and list what is uploaded of it.

    Raises:
        LmclError: If it is no whole model folder: a part is missing (exit code 4), damaged, or
            does not fit the others (5).
    """
    # Links first: what one leads to is not opened, not even to say what is wrong with it.
    files = {name: (folder / name).stat().st_size for name in MODEL_FILES if _is_file(folder, name)}
    load_model(folder)
    read_meaning(folder)
    read_rules(folder)
    read_training_images(folder)
    if not (folder / "README.md").is_file():
        raise LmclError(
            f"{printable(folder)}: has no README.md, which says what a model is for and under "
            "which licence; write one, or take the folder as lmcl wrote it",
            exit_code=4,
        )
    others = sorted(path.name for path in folder.iterdir() if path.name not in files)
    return Upload(
        folder=folder, files=files, left_out=tuple(others), licence=_licence(folder / "README.md")
    )


def _is_file(folder: Path, name: str) -> bool:
    """Whether a file of the folder is one; what it links to may be anything of the user's.

    Raises:
        LmclError: If it is a link, or larger than such a file may be; exit code 5.
    """
    path = folder / name
    if path.is_symlink() and not is_cached(folder):
        raise LmclError(
            f"{printable(path)}: a link, and what it leads to is not uploaded unseen; put the file "
            "itself there",
            exit_code=5,
        )
    if not path.is_file():
        return False
    size = path.stat().st_size
    if size > MODEL_FILES[name]:
        raise LmclError(
            f"{printable(path)}: has {size:,} bytes, more than the {MODEL_FILES[name]:,} allowed; "
            "take the folder as lmcl wrote it",
            exit_code=5,
        )
    return True


def _licence(card: Path) -> str:
    try:
        text = read_regular(card, limit_bytes=MODEL_FILES["README.md"]).decode("utf-8")
    except (ShardError, UnicodeDecodeError) as error:
        raise LmclError(
            f"{printable(card)}: no model card: {printable(error)}; write it in UTF-8", exit_code=5
        ) from error
    front = _FRONT.match(text.replace("\r\n", "\n"))
    found = _LICENCE.search(front[1]) if front else None
    return printable(found[1].strip("'\""), 100) if found else ""


def push(upload: Upload, name: HubName, *, private: bool) -> HubName:
    """Upload in one commit; a repository that is not there is made, files of an older model go.

    Returns:
        The name with the commit.

    Raises:
        LmclError: If the hub refuses (exit code 4) or fails (1), or the repository is public and
            was to be private (2).
    """
    hub = import_hub()
    api = hub.HfApi()
    with explained(name):
        _make_repository(api, name, private=private)
        there = {found.path for found in api.get_paths_info(name.repository, list(MODEL_FILES))}
        operations: list[Any] = [
            hub.CommitOperationAdd(path_in_repo=file, path_or_fileobj=str(upload.folder / file))
            for file in upload.files
        ]
        # A calibration or rules of the model that was there before would be read as this one's.
        operations += [
            hub.CommitOperationDelete(path_in_repo=file)
            for file in sorted(there - upload.files.keys())
        ]
        done = api.create_commit(
            name.repository, operations, commit_message=f"lmcl push {name.repository}"
        )
    return name.at(done.oid)


def _make_repository(api: Any, name: HubName, *, private: bool) -> None:
    errors = import_hub().errors
    try:
        is_private = api.model_info(name.repository, expand=["private"]).private
    except errors.RepositoryNotFoundError:
        api.create_repo(name.repository, private=private, exist_ok=True)
        return
    if private and not is_private:
        raise LmclError(
            f"{name}: is there and public, so nothing was uploaded; make it private on its page, "
            "push to another name, or leave out --private",
            exit_code=2,
        )
