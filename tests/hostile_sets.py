"""Packed sets as somebody might send them: each case spoils a good one, given as a folder.

`tests/conftest.py` hands the list out as the fixture `hostile_sets`, for the tests of a module and
for those that run every command over every case. A case never touches anything but the folder;
`outside` is a folder of the victim's that links and names may point to.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Spoil = Callable[[Path, Path], None]


@dataclass(frozen=True, kw_only=True)
class HostileSet:
    """One way to spoil a set."""

    name: str
    """What is wrong, as a test's id."""
    spoil: Spoil
    """Called with the set's folder and the folder outside."""
    is_told: bool = True
    """Whether `verify --deep` must find it; False for what is only ignored."""


_HASHES: dict[str, Any] = {
    "climbs": "/../../../../",
    "relative": "../victim",
    "empty": "",
    "short": "ab" * 31,
    "long": "ab" * 33,
    "capitals": "AB" * 32,
    "line break": "ab" * 32 + "\n",
    "NUL": "ab" * 31 + "a\0",
    "null": None,
    "number": 7,
    "other bytes": "0" * 64,
}
_COUNTS: dict[str, Any] = {
    "negative": -1,
    "1e308": 1e308,
    "2**63": 2**63,
    "2**200": 2**200,
    "text": "3",
    "null": None,
    "true": True,
    "fraction": 1.5,
}
_SHARD_NAMES: dict[str, Any] = {
    "climbs": "../victim.tar",
    "absolute": "/etc/passwd.tar",
    "folder": "splits/x.tar",
    "backslash": "..\\x.tar",
    "NUL": "a\0.tar",
    "hidden": ".x.tar",
    "dots": "..",
    "empty": "",
    "line break": "a\nb.tar",
    "escape": "\x1b[2J.tar",
    "long": "a" * 300 + ".tar",
    "null": None,
    "list": [],
}
_ENDS: dict[str, Any] = {"1e308": 1e308, "-1e308": -1e308, "null": None, "text": "1"}
_WHOLE: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"format_version": 1, "name": "\xff\xfe"}',
    "zeros": bytes(4096),
}


def cases() -> list[HostileSet]:
    """All of them; the set they spoil has several shards, labels, an index a shard and a split."""
    return [*_manifests(), *_links(), *_tables(), *_indices()]


def _manifests() -> Iterator[HostileSet]:
    for key in ("samples_sha256", "ids_sha256", "source_sha256"):
        for name, value in _HASHES.items():
            # The hash of a source that is not there cannot be computed again.
            is_told = (key, name) != ("source_sha256", "other bytes")
            yield _edit(f"manifest {key} {name}", _set(key, value), is_told=is_told)
    for name, value in _HASHES.items():
        yield _edit(f"manifest shard sha256 {name}", _set_shard("sha256", value))
    for key in ("num_samples", "num_rejected"):
        for name, value in _COUNTS.items():
            yield _edit(f"manifest {key} {name}", _set(key, value))
    for key in ("size_bytes", "samples", "first_id", "rows"):
        for name, value in _COUNTS.items():
            yield _edit(f"manifest shard {key} {name}", _set_shard(key, value))
    for name, value in _SHARD_NAMES.items():
        yield _edit(f"manifest shard name {name}", _set_shard("name", value))
    for end in ("low", "high"):
        for name, value in _ENDS.items():
            yield _edit(f"manifest score {end} {name}", _set_in("score", end, value))
            yield _edit(f"manifest labels {end} {name}", _set_in("labels", end, value))
    for name, value in {"escape": "\x1b[2J", "climbs": "../x", "long": "a" * 500}.items():
        yield _edit(f"manifest name {name}", _set("name", value))
    text = "\x1b[2J\nerror: \u202e" + "x" * 5000
    for key in ("title", "page", "licence", "citation"):
        yield _edit(f"manifest facts {key}", _set_in("facts", key, text), is_told=False)
    yield _edit("manifest producer", _set("producer", text), is_told=False)
    yield _edit("manifest shards null", _set("shards", None))
    yield _edit("manifest shards twice", lambda m: m["shards"].append(m["shards"][0]))
    yield _edit("manifest shards turned", lambda m: m["shards"].reverse())
    yield _edit("manifest no shards", lambda m: m.update(shards=[], num_samples=0, num_rejected=12))
    yield _edit("manifest score null", _set("score", None), is_told=False)
    for name, data in _WHOLE.items():
        yield HostileSet(name=f"manifest {name}", spoil=_bytes("manifest.json", data))


def _edit(
    name: str, change: Callable[[dict[str, Any]], object], *, is_told: bool = True
) -> HostileSet:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_bytes())
        change(manifest)
        path.write_text(json.dumps(manifest), encoding="utf-8")

    return HostileSet(name=name, spoil=spoil, is_told=is_told)


def _set(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest.update({key: value})


def _set_in(part: str, key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest[part].update({key: value})


def _set_shard(key: str, value: object) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["shards"][0].update({key: value})


def _bytes(file: str, data: bytes) -> Spoil:
    return lambda folder, outside: (folder / file).write_bytes(data) and None


_FILES = ("manifest.json", "samples.parquet", "mine-000000.tar", "mine-000000.idx", "splits/{0}")


def _links() -> Iterator[HostileSet]:
    for file in _FILES:
        for kind in ("link to outside", "dangling link", "FIFO", "folder", "gone"):
            # A set without index or split is a whole set.
            is_told = kind != "gone" or not file.endswith(("idx", "{0}"))
            yield HostileSet(
                name=f"{file.partition('{')[0]} {kind}", spoil=_replace(file, kind), is_told=is_told
            )
    for folder in (".columns", ".build", "splits", "extra"):
        yield HostileSet(
            name=f"{folder} links to outside", spoil=_link_folder(folder), is_told=False
        )


def _replace(file: str, kind: str) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        (split,) = (folder / "splits").iterdir()
        path = folder / file.format(split.name)
        path.unlink()
        if kind == "link to outside":
            path.symlink_to(outside / "secret.txt")
        elif kind == "dangling link":
            path.symlink_to(outside / "nothing")
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()

    return spoil


def _link_folder(name: str) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / name
        if path.is_dir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        path.symlink_to(outside, target_is_directory=True)

    return spoil


def _tables() -> Iterator[HostileSet]:
    for column in (
        *("id", "ok", "shard", "offset", "size", "width", "height", "codec", "mos", "mos_std"),
        *("group", "group_key", "distortion", "level", "subset", "part", "path", "sha256"),
    ):
        yield _column(f"{column} missing value", column, lambda values: [None, *values[1:]])
        yield HostileSet(name=f"table {column} dropped", spoil=_drop(column))
    values: dict[str, tuple[object, ...]] = {
        "id": (5, -1),
        "ok": (False,),
        "shard": (-1, 99, -(2**31)),
        "offset": (-512, 2**62, 1),
        "size": (-1, 0, 2**62, 2**29),
        "width": (-1, 0, 2**31 - 1),
        "height": (-1, 0, 99),
        "codec": ("", "../x", "gif", "\x1b[2J"),
        "mos": (1e308, -1e308, float("inf"), float("nan"), 4.25),
        "mos_std": (1e308, float("inf"), 7.0),
        "group": ("ref1", "", "\x1b[2J"),
        "group_key": (0, 7),
        "distortion": ("zzz", "a\nb"),
        "level": (-2, 99, 2**31 - 1),
        "subset": ("zzz",),
        "part": ("zzz",),
        "path": ("", "../../x", "a\0b", "\x1b[2J", "x" * 70_000),
        "sha256": (bytes(32),),
    }
    for column, wrong in values.items():
        for value in wrong:
            name = f"{column} {str(value)[:12]!r}"
            yield _column(name, column, lambda held, value=value: [value, *held[1:]])
    yield _column("scores turned", "mos", lambda held: held[::-1])
    for name, data in {"empty": b"", "zeros": bytes(9000), "cut": b"PAR1" + bytes(60)}.items():
        yield HostileSet(name=f"table {name}", spoil=_bytes("samples.parquet", data))
    yield HostileSet(name="table of no rows", spoil=_rows(0))
    yield HostileSet(name="table cut", spoil=_rows(7))


def _column(name: str, column: str, change: Callable[[list[Any]], list[Any]]) -> HostileSet:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / "samples.parquet"
        table = pq.read_table(path)
        place = table.schema.get_field_index(column)
        kind = table.schema.field(place)
        values = pa.array(change(table.column(place).to_pylist()), kind.type)
        pq.write_table(table.set_column(place, kind, values), path)

    return HostileSet(name=f"table {name}", spoil=spoil)


def _drop(column: str) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / "samples.parquet"
        pq.write_table(pq.read_table(path).drop_columns([column]), path)

    return spoil


def _rows(count: int) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / "samples.parquet"
        pq.write_table(pq.read_table(path).slice(0, count), path)

    return spoil


def _indices() -> Iterator[HostileSet]:
    edits: dict[str, Callable[[bytes], bytes]] = {
        "size": lambda text: text.replace(b" 512 ", b" 512 9", 1),
        "name": lambda text: text.replace(b"mine-00000000.", b"mine-00000009.", 1),
        "ending": lambda text: text.replace(b"png ", b"exe ", 1),
        "line more": lambda text: text + b"png 1 1 x\n",
        "empty": lambda text: b"",
        "binary": lambda text: bytes(np.arange(256, dtype=np.uint8)),
    }
    for name, edit in edits.items():
        yield HostileSet(name=f"index {name}", spoil=_rewrite("mine-000000.idx", edit))


def _rewrite(file: str, edit: Callable[[bytes], bytes]) -> Spoil:
    def spoil(folder: Path, outside: Path) -> None:
        path = folder / file
        path.write_bytes(edit(path.read_bytes()))

    return spoil
