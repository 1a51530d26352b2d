"""Models on a hub: downloaded through `huggingface_hub` into its own cache, file by file.

The files of a model folder travel (`lmcl.models.folders.MODEL_FILES`) and nothing else, whatever
the repository holds. A revision becomes a commit before anything is fetched, so that all files are
of one commit. Weights come last: a download that was interrupted leaves no model folder.

A newcomer's trap: the endpoint, the cache and HF_HUB_OFFLINE are read by `huggingface_hub` when it
is imported; tokens are its own affair and are never looked at here.
"""

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcl.errors import LmclError
from lmcl.models.folders import MODEL_FILES, REQUIRED_FILES
from lmcl.utils.hub_names import HubName, is_commit
from shards.text import printable

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

_MAIN = "main"
_TOKEN = "a token that may do this (`hf auth login`, or HF_TOKEN)"


@dataclass(frozen=True, kw_only=True)
class DownloadedModel:
    """A model in the cache."""

    folder: Path
    """Links to files of the cache; nothing is written there."""
    name: HubName
    """With the commit in place of the revision."""


def download(name: HubName) -> DownloadedModel:
    """Fetch a model, or find it in the cache; a commit that is there whole asks nobody.

    Raises:
        LmclError: If there is no such model or revision, or none that may be read or is in the
            cache while offline (exit code 4); if it is no model of lmcl (5); if the network or
            the hub fails (1).
    """
    hub = import_hub()
    if name.is_pinned and (folder := _whole_copy(name, known=True)):
        return DownloadedModel(folder=folder, name=name)
    if hub.constants.HF_HUB_OFFLINE:
        return _offline_copy(name, f"HF_HUB_OFFLINE is set, and {hub.constants.HF_HUB_CACHE}")
    url = hub.hf_hub_url(name.repository, "config.json", revision=name.revision or _MAIN)
    try:
        with explained(name):
            commit = hub.HfApi().get_hf_file_metadata(url=url).commit_hash
    except _UnreachableError as error:
        with contextlib.suppress(LmclError):
            found = _offline_copy(name, "the cache")
            logger.warning("%s; the copy in the cache is taken, %s", error, found.name)
            return found
        raise
    except hub.errors.EntryNotFoundError as error:
        raise _no_model(name, "it holds no config.json") from error
    if not is_commit(commit):
        raise _no_model(name, f"{_endpoint()} names no commit, as hubs do")
    pinned = name.at(commit)
    folder = _whole_copy(pinned, known=True) or _fetch(pinned)
    _remember(name, commit)
    return DownloadedModel(folder=folder, name=pinned)


def import_hub() -> Any:
    """The package `huggingface_hub`.

    Raises:
        LmclError: If it is not installed; exit code 4.
    """
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise LmclError(
            "models on a hub (hf://...) need the package huggingface_hub, which is not installed; "
            "`pip install 'lmcl[hub]'`",
            exit_code=4,
        ) from error
    return huggingface_hub


class _UnreachableError(LmclError):
    """Nobody answered; what is in the cache may serve."""


def _cached(name: HubName, file: str) -> Path | None:
    """A file of a revision in the cache; None if it is not there."""
    found = import_hub().try_to_load_from_cache(
        name.repository, file, revision=name.revision or _MAIN
    )
    return Path(found) if isinstance(found, str) else None


def _is_known_absent(name: HubName, file: str) -> bool:
    hub = import_hub()
    found = hub.try_to_load_from_cache(name.repository, file, revision=name.revision)
    return bool(found is hub._CACHED_NO_EXIST)


def _whole_copy(name: HubName, *, known: bool) -> Path | None:
    """The folder of a commit in the cache, if no file is missing.

    Args:
        name: With its commit.
        known: Whether a file that no model needs counts as missing until it is known that the
            repository has none.
    """
    files = {file: _cached(name, file) for file in MODEL_FILES}
    missing = [file for file, path in files.items() if path is None]
    if any(file in REQUIRED_FILES for file in missing):
        return None
    if known and not all(_is_known_absent(name, file) for file in missing):
        return None
    config = files["config.json"]
    assert config is not None
    return config.parent


def _offline_copy(name: HubName, where: str) -> DownloadedModel:
    """What the cache has of a revision, without asking anybody.

    Raises:
        LmclError: If it is not there whole; exit code 4.
    """
    config = _cached(name, "config.json")
    pinned = name.at(config.parent.name) if config else name
    folder = _whole_copy(pinned, known=False) if config else None
    if folder is None:
        state = "holds a part of it only" if config else "does not hold it"
        raise LmclError(
            f"{name}: {printable(where)} {state}; download it while there is a network: "
            f"`lmcl.load('{name}')`",
            exit_code=4,
        )
    return DownloadedModel(folder=folder, name=pinned)


def _fetch(name: HubName) -> Path:
    """Download a commit's files; the card is looked at before the weights are asked for."""
    from lmcl.models.pretrained import read_card

    sizes = {file: size for file in MODEL_FILES if (size := _size_of(name, file)) is not None}
    logger.info(
        "%s: downloading %s bytes in %d files", name, f"{sum(sizes.values()):,}", len(sizes)
    )
    folder = _download_file(name, "config.json", sizes["config.json"]).parent
    try:
        read_card(folder / "config.json")
    except LmclError as error:
        raise LmclError(f"{name}: no model of lmcl: {error}", exit_code=5) from error
    for file, size in sizes.items():
        _download_file(name, file, size)
    return folder


def _size_of(name: HubName, file: str) -> int | None:
    """Bytes of a file on the hub; None if the repository has none, which the cache remembers.

    Raises:
        LmclError: If a file is missing that every model has, or it is larger than one may be (5).
    """
    hub = import_hub()
    try:
        with explained(name):
            found = hub.hf_hub_download(name.repository, file, revision=name.revision, dry_run=True)
    except hub.errors.EntryNotFoundError as error:
        if file in REQUIRED_FILES:
            raise _no_model(name, f"it holds no {file}") from error
        return None
    size = int(found.file_size or 0)
    _check_size(name, file, size)
    return size


def _check_size(name: HubName, file: str, size: int) -> None:
    if size > MODEL_FILES[file]:
        raise _no_model(
            name, f"its {file} has {size:,} bytes, more than the {MODEL_FILES[file]:,} allowed"
        )


def _download_file(name: HubName, file: str, size: int) -> Path:
    hub = import_hub()
    with explained(name):
        found = hub.hf_hub_download(
            name.repository, file, revision=name.revision, tqdm_class=_counter(name, file, size)
        )
    _check_size(name, file, Path(found).stat().st_size)
    return Path(found)


def _counter(name: HubName, file: str, size: int) -> "type[tqdm[Any]]":
    """A progress bar that shows nothing and ends a download that is larger than was said."""
    from tqdm import tqdm

    most = size or MODEL_FILES[file]

    class _Counter(tqdm):  # type: ignore[misc]
        received = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: Any = 1) -> bool | None:
            self.received += int(n or 0)
            if self.received > most:
                raise _no_model(name, f"its {file} has more than the {most:,} bytes it says")
            return None

    return _Counter


def _remember(name: HubName, commit: str) -> None:
    """Let the cache know which commit a branch or tag is, for when there is no network."""
    known = _cached(name, "config.json")
    if name.is_pinned or (known is not None and known.parent.name == commit):
        return
    with contextlib.suppress(LmclError), explained(name):
        import_hub().hf_hub_download(
            name.repository, "config.json", revision=name.revision or _MAIN
        )


def _no_model(name: HubName, why: str) -> LmclError:
    return LmclError(
        f"{name}: no model of lmcl: {why}; name a repository that `lmcl push` has written",
        exit_code=5,
    )


def _endpoint() -> str:
    return printable(import_hub().constants.ENDPOINT)


@contextlib.contextmanager
def explained(name: HubName) -> Iterator[None]:
    """Turn what goes wrong with a hub into a sentence; a missing file is left to the caller.

    Raises:
        LmclError: With exit code 4 if there is no such thing or it may not be had, else 1.
    """
    hub = import_hub()
    errors = hub.errors
    try:
        yield
    except LmclError:
        raise
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(name, error.__cause__ or error) from error
    except errors.RevisionNotFoundError as error:
        raise LmclError(
            f"{name}: {_endpoint()} has no revision {name.revision or _MAIN!r} of it; name a "
            "branch, a tag or a commit that is there",
            exit_code=4,
        ) from error
    except errors.GatedRepoError as error:
        raise LmclError(
            f"{name}: its owner lets in who has asked; ask on {_endpoint()}/{name.repository}, and "
            f"set {_TOKEN}",
            exit_code=4,
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise LmclError(
            f"{name}: {_endpoint()} has no such model, or a private one; check the name, or set "
            f"{_TOKEN}",
            exit_code=4,
        ) from error
    except errors.EntryNotFoundError:
        raise
    except errors.HfHubHTTPError as error:
        raise _refused(name, error) from error
    except (ValueError, RuntimeError) as error:
        # The client's own words for answers it does not understand, and for failed uploads.
        cause = error.__cause__ or error
        raise LmclError(
            f"{name}: {_endpoint()}: {_hidden(cause)}; try again", exit_code=1
        ) from error
    except Exception as error:
        # A full disk has a number of the system's, a connection that broke off has none.
        is_local = getattr(error, "errno", None) is not None
        if is_local or not isinstance(error, OSError | errors.HTTPError):
            raise
        raise _unreachable(name, error) from error


def _unreachable(name: HubName, error: BaseException) -> LmclError:
    return _UnreachableError(
        f"{name}: {_endpoint()} could not be reached or broke off ({_hidden(error)}); try again "
        "with a network, or set HF_ENDPOINT to a mirror",
        exit_code=1,
    )


def _refused(name: HubName, error: Any) -> LmclError:
    status = int(error.response.status_code)
    said = _hidden(error.server_message) if error.server_message else ""
    answer = f"{name}: {_endpoint()} answers {status}" + (f" ({said})" if said else "")
    if status in (401, 403):
        return LmclError(f"{answer}; set {_TOKEN}", exit_code=4)
    if status == 429 or status >= 500:
        return _UnreachableError(f"{answer}; try again later", exit_code=1)
    return LmclError(f"{answer}; check the name and HF_ENDPOINT", exit_code=1)


def _hidden(text: object) -> str:
    """What somebody else said, in a line and without the user's token, should it be in there."""
    said, token = str(text), import_hub().get_token()
    return printable(" ".join((said.replace(token, "***") if token else said).split()), 200)
