"""Hostile bytes: always our error class, never a hang, never a write outside the folder.

`make test` runs 500 cases, `LMCL_FUZZ_CASES=10000` (the nightly target) as many as it says.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

from shards.build.build import build
from shards.build.image import inspect
from shards.columns import ColumnFiles
from shards.datasets.agiqa3k import open_agiqa3k
from shards.datasets.biq2021 import open_biq2021
from shards.datasets.csiq import open_csiq
from shards.datasets.flive import open_flive
from shards.datasets.kadid10k import open_kadid10k
from shards.datasets.koniq10k import open_koniq10k
from shards.datasets.livec import open_livec
from shards.datasets.matlab import load_strings
from shards.datasets.pyiqa import open_pyiqa
from shards.datasets.spaq import open_spaq
from shards.datasets.table import open_table
from shards.datasets.tid2013 import open_tid2013
from shards.datasets.wds import open_wds
from shards.errors import ShardError
from shards.manifest import decode
from shards.read import ShardSet, open_set
from shards.sample_table import SCHEMA, SampleRow, SampleTable, to_arrow
from shards.splits.draw import make_splits
from shards.splits.import_splits import import_splits
from shards.splits.split import PARTS, load_split, write_split
from shards.tar import read_members
from shards.text import MAX_MESSAGE_BYTES
from tests.conftest import SafetyTally

# Shared out over the tests below.
CASES = int(os.environ.get("LMCL_FUZZ_CASES", "500"))
SOME = settings(
    max_examples=max(10, -(-CASES // 9)),
    deadline=5000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


_counts = SafetyTally()


def given(**strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """`hypothesis.given`, with every example counted."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args: Any, **kwargs: Any) -> None:
            _counts.inputs += 1
            try:
                test(*args, **kwargs)
            except (AssertionError, hypothesis.errors.HypothesisException):
                raise
            except Exception:
                _counts.tracebacks += 1
                raise

        return hypothesis.given(**strategies)(run)

    return decorate


@pytest.fixture(autouse=True)
def count(tally: SafetyTally) -> Iterator[None]:
    """The examples of one test, for the line at the end of the session."""
    _counts.inputs = _counts.tracebacks = 0
    yield
    tally.inputs, tally.tracebacks = _counts.inputs, _counts.tracebacks


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """A good file with a few bytes changed, and perhaps cut."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 8))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


def _image(format: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format)
    return out.getvalue()


def _tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("a/x.png", "a/x.json", "a/" + "long" * 60 + ".png"):
            info = tarfile.TarInfo(name)
            info.size = 300
            info.pax_headers = {"comment": "é" * 40}
            archive.addfile(info, io.BytesIO(b'{"mos": 1}'.ljust(300)))
    return out.getvalue()


@pytest.fixture
def fence(tmp_path: Path) -> Iterator[Path]:
    """A folder whose surroundings must not change."""
    inside = tmp_path / "inside"
    inside.mkdir()
    before = sorted(tmp_path.iterdir())
    yield inside
    assert sorted(tmp_path.iterdir()) == before


@SOME
@given(data=st.one_of(st.binary(max_size=3000), damaged(_tar())))
def test_any_bytes_as_a_tar(data: bytes) -> None:
    try:
        for member in read_members(io.BytesIO(data), size_bytes=len(data), where="x"):
            assert 0 <= member.offset <= member.offset + member.size <= len(data)
            assert not member.name.startswith("/")
    except ShardError:
        pass


HOSTILE_NAMES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["/etc/passwd", "../../x", "a/../../b", "\x00", "C:\\x", "con", "x" * 90]),
)


@SOME
@given(
    name=HOSTILE_NAMES,
    kind=st.sampled_from(list(b"01234567gxLKS")),
    size=st.integers(0, 1 << 42),
    body=st.binary(max_size=1500),
)
def test_any_header_as_a_foreign_tar(
    fence: Path, name: str, kind: int, size: int, body: bytes
) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = bytes([kind]), "../../outside"
    try:
        head = info.tobuf(tarfile.GNU_FORMAT)
    except ValueError:
        return
    sized = tarfile.TarInfo("x.png")
    sized.size = size
    (fence / "x.tar").write_bytes(head + sized.tobuf(tarfile.GNU_FORMAT) + body)
    with contextlib.suppress(ShardError):
        list(open_wds(fence / "x.tar", score_member=None).samples())
    assert [path.name for path in fence.iterdir()] == ["x.tar"]


@SOME
@given(
    data=st.one_of(
        st.binary(max_size=2000),
        *(damaged(_image(format)) for format in ("JPEG", "PNG", "BMP", "WEBP")),
    )
)
def test_any_bytes_as_an_image(data: bytes) -> None:
    try:
        info = inspect(data, where="x", max_pixels=1 << 20)
    except ShardError:
        return
    assert info.width * info.height <= 1 << 20


@SOME
@given(data=st.one_of(st.binary(max_size=500), st.text(alphabet='{}[]":,0a', max_size=200)))
def test_any_bytes_as_a_manifest(data: bytes | str) -> None:
    with pytest.raises(ShardError):
        decode(data if isinstance(data, bytes) else data.encode(), where="x")


@SOME
@given(data=st.binary(max_size=3000))
def test_any_bytes_as_a_sample_table(fence: Path, data: bytes) -> None:
    (fence / "samples.parquet").write_bytes(data)
    with pytest.raises(ShardError):
        SampleTable(fence / "samples.parquet")


def _table() -> bytes:
    rows = [
        SampleRow(
            id=id, ok=id != 3, shard=0, offset=512 * id, size=100, width=9, height=8, codec="png",
            mos=float(id), mos_std=0.5, group=f"g{id % 4}", group_key=id % 4, distortion="",
            level=-1, subset="", part="train", path=f"{id}.png", sha256=bytes([id]) * 32,
        )
        for id in range(20)
    ]  # fmt: skip
    out = io.BytesIO()
    pq.write_table(to_arrow(rows), out)
    return out.getvalue()


@SOME
@given(data=damaged(_table()), shares=st.booleans())
def test_any_damage_of_a_sample_table(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, shares: bool
) -> None:
    path = tmp_path_factory.mktemp("table") / "samples.parquet"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(ShardError):
        patch.setattr("shards.sample_table.SHARED_FROM_ROWS", 0)
        files = ColumnFiles(path.parent, path) if shares else None
        table = SampleTable(path, files)
        for name in SCHEMA.names[1:]:
            assert len(getattr(table, name)) == len(table)
        assert table.ids().size <= len(table)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Six pictures, and a split of them in `splits/`."""
    root = tmp_path_factory.mktemp("labelled")
    for id in range(6):
        (root / f"{id}.png").write_bytes(_image("PNG"))
    lines = [f"{id}.png,{id}" for id in range(6)]
    (root / "labels.csv").write_text("\n".join(["path,score", *lines]) + "\n")
    build(open_table(root / "labels.csv", images=root), root / "set", workers=1)
    shard_set = open_set(root / "set")
    write_split(root / "set", dataclasses.replace(make_splits(shard_set)[0], name="x"))
    return shard_set


@SOME
@given(data=st.data())
def test_any_damage_of_a_split(labelled: ShardSet, data: st.DataObject) -> None:
    path = Path(labelled.root) / "splits" / "x.json"
    whole = path.read_bytes()
    sound = load_split(labelled, path)
    broken = path.with_name("broken.json")
    broken.write_bytes(data.draw(damaged(whole)))
    try:
        found = load_split(labelled, broken)
    except ShardError:
        return
    # What passes has the ids that were drawn: they are under the hash.
    assert [found.part(part).tolist() for part in PARTS] == [
        sound.part(part).tolist() for part in PARTS
    ]


LABELS: tuple[tuple[str, Callable[[Path], object]], ...] = (
    ("labels.csv", lambda root: open_table(root / "labels.csv", extra_files="ignore")),
    ("labels.jsonl", lambda root: open_table(root / "labels.jsonl", extra_files="ignore")),
    ("meta_info_x.csv", lambda root: list(open_pyiqa(root / "meta_info_x.csv").samples())),
    ("mos_with_names.txt", lambda root: list(open_tid2013(root).samples())),
    ("dmos.csv", lambda root: list(open_kadid10k(root).samples())),
    ("koniq10k_scores.csv", lambda root: list(open_koniq10k(root).samples())),
    ("csiq_label.txt", lambda root: list(open_csiq(root).samples())),
    ("csiq.DMOS.xlsx", lambda root: list(open_csiq(root).samples())),
    ("AllImages_release.mat", lambda root: list(open_livec(root).samples())),
    ("labels_image.csv", lambda root: list(open_flive(root).samples())),
    ("data.csv", lambda root: list(open_agiqa3k(root).samples())),
    ("Train (Images and MOS).csv", lambda root: list(open_biq2021(root).samples())),
    ("MOS and Image attribute scores.xlsx", lambda root: list(open_spaq(root).samples())),
)
_COLUMNS = "path,score,mos,dmos,dist_img,image_name,name,prompt,mos_quality,Image Name,MOS"
_CELLS = "I01_01_1.bmp,I01_01_01.png,a.B.1.png,nan,1e999,1.5,../x,/x,{,é"
_MARKS = ['"', "\t", ",", " ", "\n", "\r\n", "\x00", "Image Name,MOS"]
WORDS = st.sampled_from(_COLUMNS.split(",") + _CELLS.split(",") + _MARKS)


# A workbook, a Parquet file and a MATLAB file start a process each.
CHILDREN = settings(SOME, max_examples=max(10, -(-CASES // 50)), deadline=None)


@CHILDREN
@given(
    label=st.sampled_from(LABELS),
    data=st.one_of(
        st.binary(max_size=400),
        st.lists(WORDS, max_size=40).map(" ".join),
        st.lists(WORDS, max_size=40).map("".join),
    ),
)
def test_any_bytes_as_a_label_file(
    tmp_path_factory: pytest.TempPathFactory,
    label: tuple[str, Callable[[Path], object]],
    data: bytes | str,
) -> None:
    name, open_ = label
    root = tmp_path_factory.mktemp("labels")
    (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    for other in ("AllMOS_release.mat", "AllStdDev_release.mat"):
        (root / other).write_bytes(b"MATLAB 5.0")
    (root / "Test (Images and MOS).csv").write_text("Image Name,MOS\n")
    with contextlib.suppress(ShardError):
        open_(root)


@SOME
@given(data=st.binary(max_size=300), name=st.sampled_from(["manifest.json", "samples.parquet"]))
def test_any_bytes_in_a_set(fence: Path, data: bytes, name: str) -> None:
    (fence / "manifest.json").write_bytes(b"{}")
    (fence / name).write_bytes(data)
    with pytest.raises(ShardError):
        open_set(fence)


def _whole_labels() -> dict[str, bytes]:
    """Good label files of every format, to be damaged."""
    rows = [{"path": f"{k}.png", "score": k / 2, "group": k % 2} for k in range(6)]
    parquet, book, matlab = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet)
    workbook = openpyxl.Workbook()
    workbook.active.append(list(rows[0]))
    for row in rows:
        workbook.active.append(list(row.values()))
    workbook.save(book)
    names = np.array([[f"{k}.bmp" for k in range(30)]], dtype=object)
    scipy.io.savemat(matlab, {"AllImages_release": names})
    lines = ["path,score,group", *(",".join(map(str, row.values())) for row in rows)]
    return {
        "labels.csv": "\n".join(lines).encode(),
        "labels.tsv": "\n".join(lines).replace(",", "\t").encode(),
        "labels.jsonl": "\n".join(json.dumps(row) for row in rows).encode(),
        "labels.parquet": parquet.getvalue(),
        "labels.xlsx": book.getvalue(),
        "AllImages_release.mat": matlab.getvalue(),
    }


WHOLE_LABELS = _whole_labels()


@CHILDREN
@given(data=st.data(), name=st.sampled_from(sorted(WHOLE_LABELS)))
def test_any_damage_of_a_label_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, name: str
) -> None:
    root = tmp_path_factory.mktemp("labels")
    (root / name).write_bytes(data.draw(damaged(WHOLE_LABELS[name])))
    try:
        if name.endswith(".mat"):
            load_strings(root / name, "AllImages_release")
        else:
            list(open_table(root / name, extra_files="ignore").samples())
    except ShardError as error:
        message = str(error)
        assert len(message.encode()) <= MAX_MESSAGE_BYTES
        assert not set(message) & set("\n\r\x1b\x00")


def _split_folders() -> dict[str, bytes]:
    table = io.BytesIO()
    np.save(table, np.array([[0, 1, 2], [3, 4, 5]]))
    rows = {1: {"train": [0, 1, 2, 3], "val": [], "test": [4, 5]}}
    columns = [f"{k}.png,1.0,{'train' if k < 4 else 'test'}" for k in range(6)]
    return {
        "train.npy": table.getvalue(),
        "split.pkl": pickle.dumps(rows),
        "old.pkl": pickle.dumps(rows, 0),
        "meta_info_x.csv": "\n".join(["img_name,mos,split", *columns]).encode(),
        "a_train.txt": b"0.png\n1.png\n2.png\n3.png\n",
        "names.txt": "\n".join(f"{k}.png" for k in range(6)).encode(),
    }


SPLIT_FILES = _split_folders()


@SOME
@given(
    data=st.data(),
    name=st.sampled_from(sorted(SPLIT_FILES)),
    any_bytes=st.booleans(),
)
def test_any_bytes_in_a_published_split(
    tmp_path_factory: pytest.TempPathFactory,
    labelled: ShardSet,
    data: st.DataObject,
    name: str,
    any_bytes: bool,
) -> None:
    root = tmp_path_factory.mktemp("split")
    for other, whole in SPLIT_FILES.items():
        (root / other).write_bytes(whole)
    for part in ("val", "test"):
        (root / f"{part}.npy").write_bytes(SPLIT_FILES["train.npy"])
    (root / "a_test.txt").write_bytes(b"4.png\n5.png\n")
    bad = st.binary(max_size=300) if any_bytes else damaged(SPLIT_FILES[name])
    (root / name).write_bytes(data.draw(bad))
    if name.endswith(".txt") and name != "names.txt":
        for file in root.glob("*.npy"):
            file.unlink()
    source = root if name.endswith((".npy", ".txt")) else root / name
    before = sorted(path.name for path in root.iterdir())
    try:
        for split in import_splits(labelled, source, names=root / "names.txt"):
            assert split.train.size > 0
            assert split.test.size > 0
    except ShardError as error:
        message = str(error)
        assert len(message.encode()) <= MAX_MESSAGE_BYTES
        assert not set(message) & set("\n\r\x1b\x00")
    assert sorted(path.name for path in root.iterdir()) == before
