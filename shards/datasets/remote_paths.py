"""URLs in a table's column of paths: copies of all of them, fetched when the first is met."""

import hashlib
import logging
import os
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

from shards.remote import local_files
from shards.text import is_url, redact_url

logger = logging.getLogger(__name__)
_HASH = 8


def is_remote(text: str) -> bool:
    """Whether a cell names a file that is not on this machine: a URL, but none of `file://`."""
    return is_url(text) and not text.strip().lower().startswith("file:")


def name_of_url(url: str) -> str:
    """What an image behind a URL is called in a set: server and path, without secrets.

    A query, which may tell two images apart, becomes a few digits of its hash.
    """
    address, _, query = url.strip().partition("?")
    shown = redact_url(address).partition("://")[2]
    parts = urllib.parse.unquote(shown.partition("#")[0]).replace("\0", "").split("/")
    path = "/".join(part for part in parts if part not in ("", ".", ".."))
    if not query:
        return path
    stem, ending = os.path.splitext(path)
    return f"{stem}-{hashlib.sha256(query.encode()).hexdigest()[:_HASH]}{ending}"


class RemotePaths:
    """Copies of the files that a table names by URLs; nothing is fetched before one is asked for.

    Args:
        cells: Reads the table's cells of paths, when they are wanted.
    """

    def __init__(self, cells: Callable[[], Iterable[str]]) -> None:
        self._cells = cells
        self._copies: dict[str, Path | str] | None = None

    def find(self, url: str) -> Path | str:
        """The copy of a file, or why there is none."""
        if self._copies is None:
            urls = [text.strip() for text in self._cells() if is_remote(text)]
            self._copies = local_files(urls, tell=lambda line: logger.info("%s", line))
        return self._copies[url.strip()]
