"""Files behind URLs that are no packed set: tables, images, folders, as copies in the user's cache.

`local_copy(url) -> Path` and `local_folder(url) -> Path`. Faults are tried again as for shards, the
cache has the same limit, and a file that has not changed is not fetched again. Credentials of a URL
take no part in a copy's name and are never shown.
"""

import concurrent.futures
import hashlib
import os
import re
import shutil
import urllib.parse
from collections.abc import Callable, Iterable
from pathlib import Path

from shards.cache import DEFAULT_BYTES, cache_root
from shards.errors import ShardError
from shards.side_files import PACKED_ENDINGS
from shards.store import Store
from shards.text import printable, redact_url

_THREADS = 8
_UNUSUAL = re.compile(r"[^\w. ()-]")
_HTTP = ("http://", "https://")


def split_url(url: str) -> tuple[str, str]:
    """The folder of a URL, with its query, and the name of the file in it."""
    address, mark, query = url.partition("?")
    folder, _, name = address.rstrip("/").rpartition("/")
    return folder + mark + query, name


def url_suffix(url: str) -> str:
    """The ending of the file a URL names, in lower case, or empty."""
    return os.path.splitext(split_url(url)[1])[1].lower()


def shown_url(url: str) -> str:
    """A URL as it is shown: both slashes, no credentials."""
    return printable(redact_url(url), 300)


def local_copy(url: str, *, limit_bytes: int = DEFAULT_BYTES) -> Path:
    """A copy of one remote file in the cache; the file's own name, in a folder of its version.

    Raises:
        ShardError: If it is missing (exit code 4), larger than the cache may be, or cannot be had.
    """
    folder, name = split_url(url)
    store = Store(folder)
    size, version = store.describe(name)
    _refuse_large(url, size or 0, limit_bytes)
    digest = hashlib.sha256(f"{redact_url(url)}\n{version}".encode()).hexdigest()[:24]
    target = _root() / digest / (_UNUSUAL.sub("_", urllib.parse.unquote(name)) or "file")
    if target.is_file() and (size is None or target.stat().st_size == size):
        os.utime(target.parent)
        return target
    _make_room(size or 0, limit_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    store.copy(name, target)
    return target


def local_folder(
    url: str,
    *,
    names: Iterable[str] | None = None,
    endings: frozenset[str] | None = PACKED_ENDINGS,
    limit_bytes: int = DEFAULT_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """A copy of the files below a remote folder in the cache, under their own names.

    Args:
        url: The folder.
        names: Files that are wanted, where a server lists none (`https://`); others are not asked
            for. Those that are not there are left out.
        endings: Of files that are copied; None for all.
        limit_bytes: Most bytes they may have.
        tell: Called with a line before anything is fetched.

    Raises:
        ShardError: If it cannot be listed, is larger than the cache may be, or a copy fails.
    """
    store = Store(url)
    target = _root() / hashlib.sha256(redact_url(url).encode()).hexdigest()[:24]
    if url.startswith(_HTTP):
        if names is None:
            raise ShardError(
                f"{shown_url(url)}: a server on the web lists no folder; give a table of the "
                "images, or their URLs",
                exit_code=2,
            )
        found = dict(_asked(store, sorted({name for name in names if _is_inside(name)})))
    else:
        found = {name: entry for name, entry in store.tree().items() if _is_inside(name)}
    if endings is not None:
        found = {n: e for n, e in found.items() if os.path.splitext(n)[1].lower() in endings}
    _refuse_large(url, sum(size for size, _ in found.values()), limit_bytes)
    _copy_all(store, target, found, lambda line: tell(f"{shown_url(url)}: {line}"))
    return target


def local_files(
    urls: Iterable[str],
    *,
    limit_bytes: int = DEFAULT_BYTES,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Path | str]:
    """Copies of single files in the cache, several at a time; what cannot be had is a sentence.

    Args:
        urls: The files.
        limit_bytes: Most bytes they may have together.
        tell: Called with a line before anything is fetched.

    Raises:
        ShardError: If they are larger than the cache may be.
    """
    groups: dict[str, dict[str, str]] = {}
    for url in dict.fromkeys(urls):
        folder, name = split_url(url)
        is_web = folder.lower().startswith(_HTTP)
        groups.setdefault(folder, {})[url] = urllib.parse.unquote(name) if is_web else name
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        described = list(pool.map(_described, groups, groups.values()))
        size = sum(
            entry[0] for found in described if isinstance(found, dict) for entry in found.values()
        )
        if groups:
            _refuse_large(next(iter(groups)), size, limit_bytes)
            count = sum(map(len, groups.values()))
            tell(f"{count:,} images behind URLs, {size / 1e6:,.1f} MB; those not here are fetched")
        parts = pool.map(_copied, groups, groups.values(), described)
        return {url: copy for part in parts for url, copy in part.items()}


def _described(folder: str, names: dict[str, str]) -> dict[str, tuple[int, str]] | str:
    try:
        inside = sorted({name for name in names.values() if _is_inside(name)})
        return dict(_asked(Store(folder), inside))
    except ShardError as error:
        return str(error)


def _copied(
    folder: str, names: dict[str, str], found: dict[str, tuple[int, str]] | str
) -> dict[str, Path | str]:
    if isinstance(found, str):
        return dict.fromkeys(names, found)
    # Another table's files of the same folder have a folder of their own: they may be in use.
    key = "\n".join([redact_url(folder), *sorted(found)])
    target = _root() / hashlib.sha256(key.encode()).hexdigest()[:24]
    try:
        _copy_all(Store(folder), target, found, lambda line: None)
    except ShardError as error:
        return dict.fromkeys(names, str(error))
    missing = "there is no such file; correct the URL, or take the row out"
    return {
        url: target / name if name in found else f"{shown_url(url)}: {missing}"
        for url, name in names.items()
    }


def _root() -> Path:
    return cache_root() / "files"


def _is_inside(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and not name.startswith("/") and ".." not in parts and "\0" not in name


def _refuse_large(url: str, size: int, limit_bytes: int) -> None:
    if size > limit_bytes:
        raise ShardError(
            f"{shown_url(url)}: {size / 1e9:,.1f} GB, more than the {limit_bytes / 1e9:,.0f} GB "
            "the cache may have; copy it to a disk and name that copy",
            exit_code=2,
        )


def _asked(store: Store, names: list[str]) -> Iterable[tuple[str, tuple[int, str]]]:
    is_web = store.root.startswith(_HTTP)

    def ask(name: str) -> tuple[str, tuple[int, str]] | None:
        try:
            size, version = store.describe(urllib.parse.quote(name) if is_web else name)
        except ShardError as error:
            if error.exit_code == 4:
                return None
            raise
        return name, (size or 0, version)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        yield from (entry for entry in pool.map(ask, names) if entry is not None)


def _copy_all(
    store: Store, target: Path, found: dict[str, tuple[int, str]], tell: Callable[[str], None]
) -> None:
    """Fetch what is new; a folder is what it is now, so other copies in it are removed."""
    marks = target / ".versions"
    wanted = {name: hashlib.sha256(v.encode()).hexdigest()[:24] for name, (_, v) in found.items()}
    for file in sorted(target.rglob("*"), reverse=True) if target.is_dir() else ():
        name = file.relative_to(target).as_posix()
        if file.is_file() and not name.startswith(".versions/") and name not in wanted:
            file.unlink()
    new = [n for n, v in wanted.items() if not (marks / f"{_flat(n)}-{v}").is_file()]
    new += [n for n in wanted if n not in new and not (target / n).is_file()]
    if new:
        size = sum(found[name][0] for name in new)
        tell(f"fetching {len(new):,} files, {size / 1e6:,.1f} MB")
    marks.mkdir(parents=True, exist_ok=True)
    is_web = store.root.startswith(_HTTP)

    def copy(name: str) -> None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        store.copy(urllib.parse.quote(name) if is_web else name, target / name)
        (marks / f"{_flat(name)}-{wanted[name]}").touch()

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        for _ in pool.map(copy, new):
            pass


def _flat(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:24]


def _make_room(size: int, limit_bytes: int) -> None:
    """Remove the copies that were used longest ago."""
    root = _root()
    if not root.is_dir():
        return
    held = []
    for folder in root.iterdir():
        used = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        held.append((folder.stat().st_mtime, used, folder))
    total = sum(used for _, used, _ in held)
    for _, used, folder in sorted(held, key=lambda entry: entry[0]):
        if total + size <= limit_bytes:
            return
        shutil.rmtree(folder, ignore_errors=True)
        total -= used
