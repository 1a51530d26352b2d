"""A folder that may lie on this machine or behind an fsspec URL; every write is all or nothing.

Locally a file appears by rename, after its bytes are on disk. Remotely an object appears when its
upload is complete. Neither ever shows half a file.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from shards.errors import ShardError
from shards.files import Durable, atomic_path, atomic_write, sync
from shards.text import is_url, redact_url

TRIES = 4
"""How often a remote file is asked for before a fault is given up on."""

FIRST_WAIT_S = 0.5
"""Wait before the second try; it doubles with every further one."""

FOLLOW_LINKS = "LMCL_FOLLOW_LINKS"
"""Environment variable: 1 if links inside a set's folder are the user's own (DVC, a hub)."""


class Store:
    """Files under one root, by name relative to it (`manifest.json`, `splits/official.json`)."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if isinstance(root, str) and root.startswith("file://"):
            root = Path(root.removeprefix("file://"))
        self.folder: Path | None = None if is_url(root) else Path(root)
        self._fs: Any = None
        self._prefix = ""

    @property
    def is_local(self) -> bool:
        """True if files have a path on this machine."""
        return self.folder is not None

    @property
    def shown(self) -> str:
        """The root without credentials, for everything that is written or shown."""
        return redact_url(self.root)

    def local_path(self, name: str) -> Path:
        """A file of a local set, which may be missing; nothing is opened.

        Raises:
            ShardError: If the name leads out of the set's folder, through `..` or a link, or to
                something that is no regular file (exit code 3).
        """
        assert self.folder is not None
        _refuse_climbing(name)
        path = self.folder / name
        if not _follows_links():
            for part in (path, *path.parents):
                if part == self.folder:
                    break
                if part.is_symlink():
                    raise ShardError(
                        f"{part}: is a link, and a set from elsewhere may link to anything; copy "
                        f"the set's files (`cp -rL`), or set {FOLLOW_LINKS}=1 if the links are "
                        "yours",
                        exit_code=3,
                    )
        if path.exists() and not path.is_file():
            raise ShardError(f"{path}: is not a regular file; build the set again", exit_code=3)
        return path

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self.folder is not None:
            return (self.folder / name).is_file()
        return bool(self._patiently(name, lambda fs, url: fs.isfile(url)))

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ShardError: If it is missing (exit code 4) or cannot be read.
        """
        if self.folder is not None:
            path = self.local_path(name)
            with self._errors(name):
                return path.read_bytes()
        data: bytes = self._patiently(name, lambda fs, url: fs.cat_file(url))
        return data

    def fetch(self, name: str, target: Path) -> None:
        """Copy a remote file to `target`, which appears complete or not at all."""
        with atomic_path(target, durable="nothing") as temporary, self._errors(name):
            self._remote().get_file(self._url(name), str(temporary))

    def copy(self, name: str, target: Path) -> None:
        """`fetch`, tried again after a fault of the network."""
        with atomic_path(target, durable="nothing") as temporary:
            self._patiently(name, lambda fs, url: fs.get_file(url, str(temporary)))

    def describe(self, name: str) -> tuple[int | None, str]:
        """Length of a remote file, if its server says it, and a text that changes when it does.

        Raises:
            ShardError: If it is missing (exit code 4) or cannot be looked at.
        """
        found: dict[str, Any] = self._patiently(name, lambda fs, url: fs.info(url))
        if found.get("type") == "directory":
            raise ShardError(
                f"{self.root.rstrip('/')}/{name}: is a folder, not a file", exit_code=4
            )
        return found.get("size"), _version_of(found)

    def tree(self) -> dict[str, tuple[int, str]]:
        """All files below a remote root: length and version by relative name.

        Raises:
            ShardError: If it cannot be listed.
        """
        found: dict[str, Any] = self._patiently("", lambda fs, url: fs.find(url, detail=True))
        fs = self._remote()
        root = fs._strip_protocol(self._url("")).rstrip("/") + "/"
        return {
            path[len(root) :]: (int(entry.get("size") or 0), _version_of(entry))
            for path, entry in sorted(found.items())
            if path.startswith(root)
        }

    def write(self, name: str, data: bytes) -> None:
        """Write a file at once."""
        with self.writing(name) as out:
            out.write(data)

    @contextmanager
    def writing(self, name: str, *, durable: Durable = "name") -> Iterator[BinaryIO]:
        """A stream whose file appears under its name only when the block ends well.

        Args:
            name: Relative to the root.
            durable: Less than `name` is for files that are settled later, or can be made again.
        """
        _refuse_climbing(name)
        if self.folder is not None:
            with atomic_write(self.local_path(name), durable=durable) as out:
                yield out
            return
        with tempfile.NamedTemporaryFile(prefix="lmcl-", delete=False) as out:
            temporary = Path(out.name)
        try:
            with temporary.open("wb") as stream:
                yield stream
            with self._errors(name):
                self._remote().put_file(str(temporary), self._url(name))
        finally:
            temporary.unlink(missing_ok=True)

    def settle(self, names: Iterable[str]) -> None:
        """Make files that were written with less durability survive a power failure."""
        if self.folder is None:
            return
        for name in names:
            sync(self.folder / name)
        sync(self.folder)

    def names(self, folder: str = "") -> list[str]:
        """Files directly in the root or in one of its folders, sorted, relative to the root."""
        prefix = f"{folder}/" if folder else ""
        if self.folder is not None:
            place = self.folder / folder
            if not place.is_dir():
                return []
            return sorted(prefix + entry.name for entry in os.scandir(place) if entry.is_file())
        found = self._patiently(folder, _listed)
        return sorted(
            prefix + PurePosixPath(entry["name"]).name
            for entry in found
            if entry["type"] == "file" and not entry["name"].endswith("/")
        )

    def size_bytes(self, name: str) -> int:
        """Length of a file."""
        if self.folder is not None:
            with self._errors(name):
                return (self.folder / name).stat().st_size
        return int(self._patiently(name, lambda fs, url: fs.size(url)))

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        if self.folder is not None:
            self.local_path(name).unlink(missing_ok=True)
            return
        with self._errors(name):
            if self._remote().exists(self._url(name)):
                self._remote().rm_file(self._url(name))

    def _remote(self) -> Any:
        if self._fs is None:
            import fsspec  # a fifth of a worker's start, and most builds are local

            try:
                self._fs, self._prefix = fsspec.core.url_to_fs(self.root)
            except (ValueError, ImportError) as error:
                raise ShardError(
                    f"{self.root}: no way to read this kind of URL ({error}); install the package "
                    "it names, e.g. s3fs for s3://",
                    exit_code=2,
                ) from error
        return self._fs

    def _url(self, name: str) -> str:
        self._remote()
        # A presigned folder: the signature belongs behind the file's name.
        prefix, mark, query = self._prefix.partition("?")
        return f"{prefix.rstrip('/')}/{name}".rstrip("/") + mark + query

    def _patiently(self, name: str, ask: Callable[[Any, str], Any]) -> Any:
        """What a remote file system answers; a fault of the network is asked again, as for tars."""
        wait_s = FIRST_WAIT_S
        for tries_left in reversed(range(TRIES)):
            try:
                with self._errors(name):
                    return ask(self._remote(), self._url(name))
            except ShardError as error:
                if error.exit_code != 1:
                    raise
                if tries_left == 0:
                    raise ShardError(f"{error} (tried {TRIES} times)") from error
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("unreachable")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        address, mark, query = self.root.partition("?")
        where = f"{address.rstrip('/')}/{name}{mark}{query}"
        try:
            yield
        except ShardError:
            raise
        except Exception as found:
            # Every remote file system has its own exceptions.
            error = _fault_behind(found)
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise ShardError(f"{where}: there is no such file", exit_code=4) from error
            way_out = (
                "check permissions and space"
                if self.is_local
                else "check the address, the network and the credentials, then run it again"
            )
            raise ShardError(f"{where}: {type(error).__name__}: {error}; {way_out}") from error


def _fault_behind(error: BaseException) -> BaseException:
    """What really happened: fsspec says of a server out of reach that it has no file."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    is_out_of_reach = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
    is_refused = getattr(cause, "status", 404) not in (404, 410)
    return cause if is_out_of_reach or is_refused else error


def _version_of(entry: dict[str, Any]) -> str:
    """What object stores and servers say about a file that is another one after a change."""
    names = ("size", "ETag", "etag", "LastModified", "last_modified", "mtime", "created", "blob_id")
    return repr([str(entry.get(name)) for name in names])


def _listed(fs: Any, url: str) -> list[dict[str, Any]]:
    fs.invalidate_cache()
    found: list[dict[str, Any]] = fs.ls(url, detail=True) if fs.isdir(url) else []
    return found


def _follows_links() -> bool:
    return os.environ.get(FOLLOW_LINKS, "") not in ("", "0")


def _refuse_climbing(name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts or "\0" in name:
        raise ShardError(f"{name!r} is outside the set's folder; refused", exit_code=3)
