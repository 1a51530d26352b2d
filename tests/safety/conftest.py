"""Hostile inputs by kind, for every test of this folder: files as somebody might send them.

Each fixture gives `{kind: path}` in a folder of its own. What a command makes of one is a sentence
and an exit code; what stands around the folder is as it was.
"""

import functools
import io
import itertools
import json
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

Kinds = dict[str, Path]


@pytest.fixture
def hostile_images(tmp_path: Path) -> Kinds:
    """Image files that start processes, cost memory or time, are no files, or have evil names."""
    folder = tmp_path / "images"
    folder.mkdir()
    kinds = {kind: _written(folder / name, data) for kind, (name, data) in _images().items()}
    strange = {f"file: {kind}": path for kind, path in _no_files(folder, "png").items()}
    return kinds | strange | _evil_names(folder, "png", _picture("PNG"))


@pytest.fixture
def hostile_tables(tmp_path: Path) -> Kinds:
    """Tables of labels; the folder also holds `a.png`, which some of them name."""
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "a.png").write_bytes(_picture("PNG"))
    kinds = {kind: _written(folder / name, data) for kind, (name, data) in _tables().items()}
    for ending in ("csv", "parquet", "xlsx", "mat", "jsonl"):
        strange = _no_files(folder, ending)
        kinds |= {f"{ending}: {kind}": path for kind, path in strange.items()}
    os.mkfifo(folder / "fifo.png")
    return kinds


@pytest.fixture
def hostile_tars(tmp_path: Path) -> Kinds:
    """Tars whose headers cost more than they are worth, lie, or point elsewhere."""
    folder = tmp_path / "tars"
    folder.mkdir()
    kinds = {
        kind: _written(folder / f"{kind.replace(' ', '-')}-1.tar", data)
        for kind, data in _tars().items()
    }
    return kinds | {f"file: {kind}": path for kind, path in _no_files(folder, "tar").items()}


@pytest.fixture
def hostile_splits(tmp_path: Path) -> Kinds:
    """Published splits: pickles, tables, and folders of `.npy` or lists."""
    folder = tmp_path / "splits"
    folder.mkdir()
    kinds = {
        kind: _written(folder / f"{kind.replace(' ', '-')}.pkl", data)
        for kind, data in _pickles().items()
    }
    for kind, data in _split_tables().items():
        kinds[kind] = _written(folder / f"{kind.replace(' ', '-')}.csv", data.encode())
    for kind, table in _npys().items():
        place = folder / f"npy-{kind.replace(' ', '-')}"
        place.mkdir()
        for part in ("train", "val", "test"):
            (place / f"{part}.npy").write_bytes(table)
        kinds[f"npy {kind}"] = place
    return kinds | {f"file: {kind}": path for kind, path in _no_files(folder, "pkl").items()}


def _written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def _no_files(folder: Path, ending: str) -> Kinds:
    """A FIFO, devices, a socket, a loop, a folder, and five gigabytes of nothing."""
    places = {
        kind: folder / f"{kind}.{ending}"
        for kind in ("fifo", "zero", "random", "socket", "loop", "folder", "sparse", "dangling")
    }
    os.mkfifo(places["fifo"])
    places["zero"].symlink_to("/dev/zero")
    places["random"].symlink_to("/dev/urandom")
    places["loop"].symlink_to(places["loop"].name)
    places["dangling"].symlink_to("nowhere")
    places["folder"].mkdir()
    with places["sparse"].open("wb") as out:
        out.truncate(5 << 30)
    # The path of a socket is short, and that of a test is not.
    here = os.open(folder, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(f"/proc/self/fd/{here}/{places['socket'].name}")
    finally:
        os.close(here)
    return places


def _evil_names(folder: Path, ending: str, data: bytes) -> Kinds:
    names = {
        "escape in name": "\x1b[2J\x1b[Hx",
        "newline in name": "x\nerror: all is well",
        "direction in name": "x\u202egnp",
        "formula in name": '=HYPERLINK("http:..example","click")',
        "option as name": "--help",
        "html in name": "<img src=x onerror=alert(1)>",
        "markdown in name": "[x](javascript:alert(1))|`x`",
        "long name": "n" * 240,
    }
    kinds = {
        kind: _written(folder / f"{name}.{ending}", data)
        for kind, name in names.items()
        if "/" not in name
    }
    no_utf8 = os.fsencode(folder) + b"/caf\xe9." + ending.encode()
    with open(no_utf8, "wb") as out:
        out.write(data)
    return kinds | {"name that is no UTF-8": Path(os.fsdecode(no_utf8))}


def _picture(format: str, **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 40, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def _png(width: int, height: int, depth: int, kind: int, stream: bytes) -> bytes:
    def chunk(tag: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def _zeros(gigabytes: int) -> bytes:
    """A stream of zeros: after a full flush a block may be repeated."""
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = ((gigabytes << 30) % 65521 << 16 | 1).to_bytes(4, "big")
    return b"\x78\xda" + block * (64 * gigabytes) + packer.flush() + checksum


_POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    b"(%pipe%touch ghostscript-was-here) (w) file closefile\nshowpage\n"
)


@functools.cache
def _images() -> dict[str, tuple[str, bytes]]:
    progressive = _picture("JPEG", progressive=True)
    scan = progressive.rindex(b"\xff\xda")
    tags = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1),
            (322, 4, 30_000), (323, 4, 30_000), (324, 4, 200), (325, 4, 40)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    tile = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    sides = (16382).to_bytes(3, "little") * 2
    return {
        "postscript as jpg": ("postscript.jpg", _POSTSCRIPT),
        "postscript as eps": ("postscript.eps", _POSTSCRIPT),
        "dos eps as png": (
            "dos.png",
            b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, 200) + bytes(20) + _POSTSCRIPT,
        ),
        "png of 10 gigapixels": ("wide.png", _png(100_000, 100_000, 8, 2, zlib.compress(b""))),
        "png of one pixel and 6 GB": ("deep.png", _png(1, 1, 16, 6, _zeros(6))),
        "png of one pixel of 8 bits and 6 GB": ("deep8.png", _png(1, 1, 8, 6, _zeros(6))),
        "jpeg of 5,000 scans": (
            "scans.jpg", progressive[:scan] + progressive[scan:-2] * 5000 + b"\xff\xd9",
        ),
        "tiff of one pixel in a gigapixel tile": ("tile.tif", tile.ljust(240, b"\0")),
        "webp of 268 megapixels": (
            "canvas.webp",
            b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<II", 10, 0) + sides,
        ),
        "empty": ("empty.png", b""),
        "cut": ("cut.jpg", _picture("JPEG")[:400]),
        "html": ("page.jpg", b"<html><script>alert(1)</script>" * 100),
        "a secret": ("secret.png", b"-----BEGIN OPENSSH PRIVATE KEY-----\n" * 9),
    }  # fmt: skip


@functools.cache
def _tables() -> dict[str, tuple[str, bytes]]:
    cells = {
        "escape": "\x1b[2Ja.png,1", "formula": '"=HYPERLINK(""x"")",1', "climbing": "../../a.png,1",
        "absolute": "/etc/passwd,1", "nul": "a\0.png,1", "infinite": "a.png,inf",
        "huge": "a.png,1e308",
        "underscore": "a.png,1_0", "fifo named": "fifo.png,1", "long": "a" * 200_000 + ".png,1",
    }  # fmt: skip
    tables = {
        f"csv with {kind}": (f"{kind.replace(' ', '-')}.csv", f"path,score\n{line}\n".encode())
        for kind, line in cells.items()
    }
    struct_table, group_table, book = io.BytesIO(), io.BytesIO(), io.BytesIO()
    picture = {"bytes": b"\xff\xd8" * 200_000, "path": None}
    pq.write_table(pa.Table.from_pylist([{"image": picture, "score": 1.0}]), struct_table)
    rows = [{"path": "a.png", "score": 1.0, "group": picture}]
    pq.write_table(pa.Table.from_pylist(rows), group_table)
    openpyxl.Workbook().save(book)
    deep = '{"path": ' + "[" * 100_000 + "]" * 100_000 + "}\n"
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    rows_xml = f'<worksheet xmlns="{space}"><sheetData><row r="999999999"/></sheetData></worksheet>'
    return tables | {
        "two scores": ("two.csv", b"path,score,Score\na.png,1,2\n"),
        "one endless line": ("line.csv", b"path,score\n" + b"x" * (40 << 20)),
        "open quote": ("quote.csv", b'path,score\n"a.png,1\n' + b"x\n" * 100_000),
        "no text": ("bytes.csv", bytes(range(256)) * 50),
        "deep json": ("deep.jsonl", deep.encode()),
        "twice in json": ("twice.jsonl", b'{"path": "a.png", "score": 1, "score": 2}\n'),
        "json of a huge number": ("number.jsonl", b'{"score": ' + b"9" * 10_000 + b"}\n"),
        "parquet of pictures": ("pictures.parquet", struct_table.getvalue()),
        "parquet of grouped pictures": ("groups.parquet", group_table.getvalue()),
        "parquet of nothing": ("broken.parquet", b"PAR1" + b"\xff" * 90 + b"PAR1"),
        "workbook of a row numbered a billion": (
            "row.xlsx", _replaced(book.getvalue(), {"xl/worksheets/sheet1.xml": rows_xml.encode()}),
        ),
        "workbook that unpacks to gigabytes": (
            "bomb.xlsx", _replaced(book.getvalue(), {"xl/media/x": bytes(600 << 20)}),
        ),
        "workbook of a billion laughs": (
            "laughs.xlsx", _replaced(book.getvalue(), {"xl/worksheets/sheet1.xml": _laughs()}),
        ),
    }  # fmt: skip


def _replaced(book: bytes, parts: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(book)) as old,
        zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        whole = {name: old.read(name) for name in old.namelist()} | parts
        for name, data in whole.items():
            new.writestr(name, data)
    return out.getvalue()


def _laughs() -> bytes:
    names = [f"l{k}" for k in range(12)]
    entities = '<!ENTITY l0 "lol">' + "".join(
        f'<!ENTITY {name} "{f"&{before};" * 10}">' for before, name in itertools.pairwise(names)
    )
    return f"<?xml version='1.0'?><!DOCTYPE x [{entities}]><x>&l11;</x>".encode()


def _member(name: str, kind: bytes = b"0", *, size: int = 0, body: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size or len(body), "../../outside"
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def _tars() -> dict[str, bytes]:
    good, end = _member("good.png", body=_picture("PNG")), bytes(1024)
    long_name = _member("././@LongLink", b"L", body=b"n" * 200)
    pax = _member("pax", b"x", body=b"12 path=x.y\n")
    negative = bytearray(_member("negative.png"))
    negative[124:136] = b"\xff" * 11 + b"\xfe"
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    return {
        "chained long names": good + long_name * 3000 + good + end,
        "chained pax headers": good + pax * 3000 + good + end,
        "eight gigabytes claimed": good + _member("a.png", size=1 << 33) + end,
        "a terabyte claimed": good + _member("a.png", size=1 << 40) + end,
        "a terabyte of long name": good + _member("x", b"L", size=1 << 40) + end,
        "negative size": good + bytes(negative) + end,
        "sparse": good + _member("sparse.png", b"S", body=b"x") + end,
        "climbing": good + _member("../../climbed.png", body=_picture("PNG")) + end,
        "absolute": good + _member("/absolute.png", body=_picture("PNG")) + end,
        "link": good + _member("link.png", b"2") + end,
        "device": good + _member("null.png", b"3") + end,
        "escape in name": good + _member("\x1b[2Jx.png", body=_picture("PNG")) + end,
        "cut": good[:700],
        "empty": b"",
        "no tar": b"\x7fELF" * 500,
    }


class _Touches:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("pickle-was-here"),)


def _pickles() -> dict[str, bytes]:
    def split(row: object) -> bytes:
        return pickle.dumps({1: {"train": [0, row], "val": [], "test": [1]}})

    return {
        "runs code": pickle.dumps({1: _Touches()}),
        "two gigabytes of memo": b"Nr" + struct.pack("<I", 0x7FFFFFFF) + b"s.",
        "endless key": b"\x80\x02}(K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01u.",
        "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "long": b"N0" * 3_000_000 + b"N.",
        "a fraction": split(1.7),
        "a truth value": split(True),
        "a text": split("0123"),
        "outside": split(10**9),
    }


def _split_tables() -> dict[str, str]:
    def table(parts: list[str], header: str = "img_name,mos,split") -> str:
        rows = [f"{k}.png,1.0,{part}" for k, part in enumerate(parts)]
        return "\n".join([header, *rows]) + "\n"

    return {
        "coded 1 and 2": table(["1", "1", "2"]),
        "coded -1": table(["-1", "-1", "-1"]),
        "blank": table(["", "", ""]),
        "all train": table(["train"] * 3),
        "no header": table(["train", "test"], "x.png,1.0,train"),
        "column twice": table(["train,test"] * 3, "img_name,mos,split,split"),
        "escape": table(["\x1b[2J"] * 3),
    }


def _npys() -> dict[str, bytes]:
    def saved(table: Any) -> bytes:
        out = io.BytesIO()
        np.save(out, table, allow_pickle=True)
        return out.getvalue()

    good = saved(np.array([[0, 1, 2]]))
    return {
        "padding": saved(np.full((1, 3), -1)),
        "objects": saved(np.array([[_Touches()]], dtype=object)),
        "fractions": saved(np.array([[0.5, 1.0]])),
        "a petabyte": good.replace(
            b"(1, 3), }" + b" " * 12, b"(1, 99999999999999), }"[:21].ljust(21)
        ),
        "cut": good[:-5],
        "text": json.dumps([[0, 1]]).encode(),
    }
