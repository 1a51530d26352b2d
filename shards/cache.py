"""Remote files on this machine: checked by sha256, fetched again after a fault, bounded in size."""

import hashlib
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from shards.errors import ShardError
from shards.store import FIRST_WAIT_S, TRIES, Store
from shards.text import redact_url

DEFAULT_BYTES = 50 << 30
"""Space the cache of one set may take."""

_COPY = re.compile(r"[0-9a-f]{16}-[A-Za-z0-9][A-Za-z0-9._-]*\.tar")


class Cache:
    """Local copies of a remote set's files, in a folder that several processes may share."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        *,
        limit_bytes: int = DEFAULT_BYTES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._store = store
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._sleep = sleep

    def path(self, name: str, *, sha256: str | None, size_bytes: int | None = None) -> Path:
        """A local copy of a file, fetched if there is none.

        Args:
            name: File in the set.
            sha256: What its bytes must hash to; None where that is not known yet.
            size_bytes: Its length, to make room before fetching.

        Raises:
            ShardError: If the file is missing, keeps failing, or has other bytes than it should.
        """
        base = name.replace("/", "-")
        target = self._folder / (base if sha256 is None else f"{sha256[:16]}-{base}")
        if sha256 is not None and target.is_file():
            os.utime(target)  # the least recently used go first
            return target
        self._folder.mkdir(parents=True, exist_ok=True)
        if size_bytes is not None:
            self._make_room(size_bytes)
        self._fetch(name, target, sha256)
        return target

    def _fetch(self, name: str, target: Path, sha256: str | None) -> None:
        wait_s = FIRST_WAIT_S
        for tries_left in reversed(range(TRIES)):
            try:
                self._store.fetch(name, target)
                _check(target, sha256, f"{self._store.root}/{name}")
                return
            except ShardError as error:
                if error.exit_code == 4:
                    raise ShardError(
                        f"{self._store.root}/{name}: the manifest names it, but it is not there; "
                        "upload it again, or build the set again",
                        exit_code=4,
                    ) from error
                if tries_left == 0:
                    raise ShardError(
                        f"{error} (tried {TRIES} times); check the connection and the server",
                        exit_code=error.exit_code,
                    ) from error
            self._sleep(wait_s)
            wait_s *= 2

    def _make_room(self, size_bytes: int) -> None:
        # The folder may be one the user named: nothing but copies is ever removed from it.
        copies = [file for file in self._folder.iterdir() if _COPY.fullmatch(file.name)]
        held = [(file.stat().st_mtime, file) for file in copies]
        used = sum(file.stat().st_size for _, file in held)
        for _, file in sorted(held):
            if used + size_bytes <= self._limit_bytes:
                return
            # An open or mapped file stays readable after this; its space returns when it is closed.
            used -= file.stat().st_size
            file.unlink(missing_ok=True)


def file_sha256(path: Path) -> str:
    """Hash of a file's bytes, read in blocks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache_root() -> Path:
    """The user's cache: `$LMCL_CACHE`, else `$XDG_CACHE_HOME/lmcl`, else `~/.cache/lmcl`.

    Raises:
        ShardError: If none of them is known (exit code 2).
    """
    if named := os.environ.get("LMCL_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME", "")
    # A relative one is to be ignored, says the XDG specification.
    base = base if os.path.isabs(base) else os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise ShardError("no home folder is known; set LMCL_CACHE to a folder", exit_code=2)
    return Path(base) / "lmcl"


def default_folder(root: str) -> Path:
    """Where copies of a remote set go; the same whatever credentials its URL holds."""
    return cache_root() / hashlib.sha256(redact_url(root).encode()).hexdigest()[:16]


def _check(target: Path, sha256: str | None, where: str) -> None:
    if sha256 is None or file_sha256(target) == sha256:
        return
    target.unlink(missing_ok=True)
    raise ShardError(
        f"{where}: other bytes than the manifest says (sha256 differs); upload it again, or build "
        "the set again",
        exit_code=3,
    )
