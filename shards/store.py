"""A folder that may lie on this machine or behind an fsspec URL; every write is all or nothing.

Locally a file appears by rename, after its bytes are on disk. Remotely an object appears when its
upload is complete. Neither ever shows half a file.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from shards.errors import ShardError
from shards.files import Durable, atomic_path, atomic_write, sync


def is_url(root: str | Path) -> bool:
    """True for an fsspec URL, False for a path of this machine."""
    return isinstance(root, str) and "://" in root


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

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self.folder is not None:
            return (self.folder / name).is_file()
        with self._errors(name):
            return bool(self._remote().isfile(self._url(name)))

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ShardError: If it is missing (exit code 4) or cannot be read.
        """
        if self.folder is not None:
            with self._errors(name):
                return (self.folder / name).read_bytes()
        with self._errors(name):
            data: bytes = self._remote().cat_file(self._url(name))
            return data

    def fetch(self, name: str, target: Path) -> None:
        """Copy a remote file to `target`, which appears complete or not at all."""
        with atomic_path(target, durable="nothing") as temporary, self._errors(name):
            self._remote().get_file(self._url(name), str(temporary))

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
            with atomic_write(self.folder / name, durable=durable) as out:
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
        fs, url = self._remote(), self._url(folder)
        with self._errors(folder):
            fs.invalidate_cache()
            if not fs.isdir(url):
                return []
            found = fs.ls(url, detail=True)
        return sorted(
            prefix + PurePosixPath(entry["name"]).name
            for entry in found
            if entry["type"] == "file" and not entry["name"].endswith("/")
        )

    def size_bytes(self, name: str) -> int:
        """Length of a file."""
        with self._errors(name):
            if self.folder is not None:
                return (self.folder / name).stat().st_size
            return int(self._remote().size(self._url(name)))

    def remove(self, name: str) -> None:
        """Remove a file; nothing happens if there is none."""
        if self.folder is not None:
            (self.folder / name).unlink(missing_ok=True)
            return
        with self._errors(name):
            if self._remote().exists(self._url(name)):
                self._remote().rm_file(self._url(name))

    def remove_folder(self, name: str) -> None:
        """Remove a folder that holds only files."""
        for file in self.names(name):
            self.remove(file)
        if self.folder is not None and (self.folder / name).is_dir():
            (self.folder / name).rmdir()

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
        return f"{self._prefix.rstrip('/')}/{name}".rstrip("/")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        where = f"{self.root.rstrip('/')}/{name}"
        try:
            yield
        except FileNotFoundError as error:
            raise ShardError(f"{where}: there is no such file", exit_code=4) from error
        except ShardError:
            raise
        except Exception as error:
            # Every remote file system has its own exceptions.
            way_out = (
                "check permissions and space"
                if self.is_local
                else "check the address, the network and the credentials, then run it again"
            )
            raise ShardError(f"{where}: {type(error).__name__}: {error}; {way_out}") from error


def _refuse_climbing(name: str) -> None:
    if name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise ShardError(f"{name!r} would be written outside the set's folder; refused")
