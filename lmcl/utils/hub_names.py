"""Names of models on a hub: `hf://USER/NAME[@REVISION]`, checked before anybody is asked."""

import dataclasses
import re
from pathlib import Path

from lmcl.errors import LmclError
from shards.text import printable

# With one slash too: a name that went through `pathlib`.
_SCHEME = re.compile(r"hf:/{1,2}")
# The hub's own rule; and nothing of it climbs out of a folder.
_PART = re.compile(r"(?=.{1,96}\Z)[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_])?")
_REVISION = re.compile(
    r"(?=.{1,200}\Z)[A-Za-z0-9_][A-Za-z0-9_.+-]*(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)*"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HubName:
    """A model on a hub."""

    repository: str
    """`USER/NAME`."""
    revision: str = ""
    """Branch, tag or commit; empty: the main branch."""

    def __str__(self) -> str:
        """As it is written on a command line."""
        return f"hf://{self.repository}" + (f"@{self.revision}" if self.revision else "")

    @property
    def is_pinned(self) -> bool:
        """Whether it names a commit, which never changes."""
        return is_commit(self.revision)

    def at(self, commit: str) -> "HubName":
        """The same model at one commit."""
        return dataclasses.replace(self, revision=commit)


def is_commit(text: str | None) -> bool:
    """Whether a text is the whole hash of a commit."""
    return _COMMIT.fullmatch(text or "") is not None


def is_hub_name(model: str | Path) -> bool:
    """Whether a model is named by a hub's name."""
    return _SCHEME.match(str(model)) is not None


def parse_hub_name(model: str | Path) -> HubName:
    """Take a hub's name apart.

    Raises:
        LmclError: If it is none; exit code 2.
    """
    rest = _SCHEME.sub("", str(model), count=1).removeprefix("models/")
    place, has_revision, revision = rest.partition("@")
    parts = place.split("/")
    is_name = len(parts) == 2 and all(map(_is_part, parts))
    if not is_name or (has_revision and not _is_revision(revision)):
        raise LmclError(
            f"{printable(model)}: names no model on a hub; write hf://USER/NAME or "
            "hf://USER/NAME@REVISION (letters, digits, -, _ and .; a branch, a tag or a commit)",
            exit_code=2,
        )
    return HubName(repository=place, revision=revision)


def _is_part(text: str) -> bool:
    is_odd = "--" in text or ".." in text or text.endswith(".git")
    return _PART.fullmatch(text) is not None and not is_odd


def _is_revision(text: str) -> bool:
    return _REVISION.fullmatch(text) is not None and ".." not in text


def refuse_hub_name(root: Path, needs: str = "a run folder") -> None:
    """Refuse a model on a hub where a folder of this machine is needed.

    Raises:
        LmclError: If `root` is one; exit code 2.
    """
    if is_hub_name(root):
        raise LmclError(
            f"{printable(root)}: a model on a hub, and this needs {needs}, where it can read what "
            "the model learned from and write; name the run, and `lmcl push` it again afterwards",
            exit_code=2,
        )
