"""Run folders of strangers: nothing outside them is read, and whatever they hold is a sentence."""

import base64
import io
import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from lmcl.errors import LmclError
from lmcl.report import write_report

SECRET = "hunter2-the-secret"
HEAD = "id,path,mos,prediction\n"
ROWS = HEAD + "".join(f"{i},a{i}.png,{i % 7},{(3 * i) % 11}\n" for i in range(24))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The least that a report is made of."""
    folder = tmp_path / "run"
    (folder / "predictions").mkdir(parents=True)
    (folder / "predictions" / "test.csv").write_text(ROWS)
    return folder


def outputs(folder: Path) -> str:
    """All that a report has written, as text."""
    return "".join(p.read_text() for p in sorted(folder.iterdir()) if p.is_file())


def pictures_of(page: str) -> list[bytes]:
    """Every image the page holds, decoded from base64."""
    found = re.findall(r"data:image/\w+;base64,([A-Za-z0-9+/=]+)", page)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    return [base64.b64decode(text) for text in [*found, *data["thumbs"].values()]]


def fifo(path: Path, secret: Path) -> None:
    os.mkfifo(path)


def link(path: Path, secret: Path) -> None:
    path.symlink_to(secret)


def relative_link(path: Path, secret: Path) -> None:
    path.symlink_to(os.path.relpath(secret, path.parent))


def text(path: Path, secret: Path) -> None:
    path.write_text(SECRET)


def device(path: Path, secret: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path, secret: Path) -> None:
    with path.open("wb") as out:
        out.truncate(5 << 30)


def folder(path: Path, secret: Path) -> None:
    path.mkdir()


def postscript(path: Path, secret: Path) -> None:
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(" + SECRET.encode())


def huge_png(path: Path, secret: Path) -> None:
    Image.new("L", (2_000, 2_000)).save(path, "PNG")


def jpeg_with_text_behind(path: Path, secret: Path) -> None:
    out = io.BytesIO()
    Image.new("RGB", (32, 32)).save(out, "JPEG", comment=SECRET.encode())
    path.write_bytes(out.getvalue() + SECRET.encode())


PLANTS: list[Callable[[Path, Path], None]] = [
    fifo,
    link,
    relative_link,
    text,
    device,
    sparse,
    folder,
    postscript,
    huge_png,
    jpeg_with_text_behind,
]


@pytest.mark.parametrize("place", ["thumbs/3.jpg", "attention/3.png"])
@pytest.mark.parametrize("plant", PLANTS, ids=lambda f: f.__name__)
def test_no_planted_file_arrives_in_the_page(tmp_path, run, plant, place) -> None:
    secret = tmp_path / "id_ed25519"
    secret.write_text(SECRET)
    (run / "thumbs").mkdir()
    (run / "attention").mkdir()
    Image.new("RGB", (32, 32)).save(run / "thumbs" / "3.jpg")
    path = run / place
    path.unlink(missing_ok=True)
    plant(path, secret)
    page = write_report([run], tmp_path / "out").read_text()
    assert SECRET not in page
    for data in pictures_of(page):
        assert SECRET.encode() not in data
        with Image.open(io.BytesIO(data)) as image:
            image.load()


def test_a_linked_folder_of_pictures_is_not_followed(tmp_path, run) -> None:
    private = tmp_path / "private"
    private.mkdir()
    Image.new("RGB", (32, 32)).save(private / "3.jpg")
    (run / "thumbs").symlink_to(private)
    page = write_report([run], tmp_path / "out").read_text()
    assert pictures_of(page) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.toml", f'token = "{SECRET}"\n'),
        ("protocol.json", json.dumps({"auth": SECRET})),
        ("environment.json", json.dumps({"auth": SECRET})),
        ("metrics.json", json.dumps({"auth": SECRET})),
        ("log.jsonl", json.dumps({"event": SECRET})),
        ("predictions/other.csv", HEAD + f"1,{SECRET},1,2\n"),
        ("predictions/test.metrics.json", json.dumps({"scope": SECRET})),
    ],
)
def test_a_linked_document_is_not_read(tmp_path, run, name, content) -> None:
    secret = tmp_path / "credentials"
    secret.write_text(content)
    (run / name).symlink_to(secret)
    said = _report_or_sentence([run], tmp_path / "out")
    text = said or outputs(tmp_path / "out")
    assert SECRET not in text
    assert "link" in text


def test_what_is_refused_is_said_on_the_page(tmp_path, run) -> None:
    (run / "thumbs").mkdir()
    (run / "thumbs" / "3.jpg").write_text("no image")
    (run / "thumbs" / "4.jpg").symlink_to("/etc/passwd")
    page = write_report([run], tmp_path / "out").read_text()
    assert "of the pictures in thumbs/ cannot be shown" in page
    assert "thumbs/ holds 1 link or the like" in page


def test_passwords_and_signatures_of_urls_reach_no_file(tmp_path, run) -> None:
    url = f"https://me:{SECRET}@host/set?X-Amz-Signature={SECRET}"
    tree = {"set": url, "a": {"b": [url, {"c": url}]}, url: 1}
    (run / "protocol.json").write_text(json.dumps(tree))
    (run / "environment.json").write_text(json.dumps(tree))
    (run / "config.toml").write_text(f'[data]\nroot = "{url}"\nsets = [{{ root = "{url}" }}]\n')
    write_report([run], tmp_path / "out")
    text = outputs(tmp_path / "out")
    assert SECRET not in text
    assert "https://host/set" in text


@pytest.mark.parametrize(
    "hostile", ["<img src=x onerror=alert(1)>", "a\x00b\x1b[2J\u202e", "'\"&<"]
)
def test_no_name_becomes_markup_or_moves_a_terminal(tmp_path, run, hostile) -> None:
    rows = [r.split(",") for r in ROWS.splitlines()[1:]]
    quoted = '"' + hostile.replace('"', '""') + '"'
    (run / "predictions" / "test.csv").write_text(
        "id,path,mos,prediction,subset,distortion,level,group\n"
        + "".join(f"{i},{quoted},{m},{p},{quoted},{quoted},1,{quoted}{i}\n" for i, _, m, p in rows)
    )
    (run / "protocol.json").write_text(json.dumps({"set": hostile, "note": hostile, hostile: "x"}))
    page = write_report([run], tmp_path / "out").read_text()
    assert "<img src=x" not in page
    text = outputs(tmp_path / "out")
    assert not set(text) & {"\x00", "\x1b", "\u202e"}
    assert "<img" not in (tmp_path / "out" / "report.md").read_text()


def test_no_cell_of_a_table_is_run_by_a_spreadsheet(tmp_path, run) -> None:
    formula = '=HYPERLINK("http://evil";"x")'
    quoted = '"' + formula.replace('"', '""') + '"'
    rows = "".join(f"{i},{quoted},{i % 7},{i},{quoted}\n" for i in range(24))
    (run / "predictions" / "test.csv").write_text("id,path,mos,prediction,subset\n" + rows)
    (run / "protocol.json").write_text(json.dumps({"set": formula}))
    write_report([run], tmp_path / "out")
    for name in ("results.csv", "predictions.csv"):
        cells = re.split(r'[,\n]"?', (tmp_path / "out" / name).read_text())
        assert not [cell for cell in cells if cell.startswith("=")]


NESTED = "[" * 100_000
DOCUMENTS = {
    "config.toml": [b"\x00", b"a = " + b"[" * 5000, b"x = 0x" + b"f" * 9000, b"\xff\xfe\x00"],
    "protocol.json": [
        b"[]",
        b'"x"',
        b"1e999",
        NESTED.encode(),
        b'{"train_seconds": "abc", "counts": {"train": "1e9"}, "score": 3, "part": ["x"]}',
        b'{"train_seconds": 1e400, "score": {"low": 5, "high": 5, "kind": "x"}}',
        b'{"score": {"low": "nan", "high": "inf", "higher_is_better": "?"}, "set": null}',
        b'{"part": "../../etc", "set": {"a": 1}, "split": [1, [2, {"a": 3}]]}',
        json.dumps({f"k{i}": "v" * 1000 for i in range(5000)}).encode(),
    ],
    "environment.json": [b"\x00", b'{"git_dirty": {}, "started": 3}', NESTED.encode()],
    "metrics.json": [b"{}", b"[1", NESTED.encode(), b'{"srcc": 1e999}'],
    "log.jsonl": [
        b"\x00\xff",
        b'{"event": "step", "epoch": 1e308, "step": -1e308, "loss": 1e308}\n' * 3,
        b'{"event": "step", "epoch": 0, "step": 1' + b"0" * 500 + b', "loss": 1}\n',
        b'{"event": "epoch", "epoch": 7, "val_srcc": NaN}\n{"event": [1]}\n',
        b'{"event": "epoch", "epoch": "x", "val_srcc": 0.5}\n',
        b'{"event": "epoch", "epoch": 1e17, "val_srcc": Infinity}\n' * 2,
        NESTED.encode(),
        b"x" * 3_000_000,
    ],
    "embeddings.npz": [b"PK", b"\x93NUMPY", b"\x00" * 99],
    "predictions/test.metrics.json": [
        b"{}",
        b'{"scope": 3}',
        NESTED.encode(),
        b'{"scope": {"tested_on": 1}}',
        b"\x00",
    ],
    "predictions/test.csv": [
        b"",
        b"\x00",
        HEAD.encode(),
        HEAD.encode() + b"1,a,1,1\n",
        HEAD.encode() + b"1,a\n2\n",
        HEAD.encode() + b"1,a,1e308,-1e308\n2,b,1,2\n",
        HEAD.encode() + b"1,a,inf,nan\n2,b,-inf,2\n3,c,1,1\n",
        HEAD.encode() + b"99999999999999999999,a,1,1\n",
        HEAD.encode() + b"1,a,1_0,1\n",
        HEAD.encode() + b"-5,a\x00b,1,1\n-4,c,2,2\n",
        HEAD.encode() + b'1,"' + b"x" * 200_000 + b'",1,1\n',
        (
            "id,path,mos,prediction,mos_std\n" + "".join(f"{i},a,1,{i},0\n" for i in range(9))
        ).encode(),
        b"id,path,mos,prediction,y,x,h,w,height,width\n1,a,1,1,-9,9000000000000000000,1,-7,1,1\n"
        b"2,b,2,2,nan,1,1,1,1,1\n",
    ],
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, content) for name, contents in DOCUMENTS.items() for content in contents],
    ids=[f"{name}-{i}" for name, contents in DOCUMENTS.items() for i in range(len(contents))],
)
def test_a_strange_document_is_a_note_or_a_sentence(tmp_path, run, name, content) -> None:
    (run / name).write_bytes(content)
    _report_or_sentence([run], tmp_path / "out")


def _report_or_sentence(runs: list[Path], output: Path) -> str:
    """The sentence that stands in place of a report; empty if one was written."""
    said = ""
    try:
        write_report(runs, output)
    except LmclError as error:
        said = str(error) or "no words"
    if not said:
        json.loads((output / "results.json").read_text())
    assert len(said.encode()) <= 2048
    assert said.isprintable()
    return said


def _npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def _bomb() -> bytes:
    """An archive whose array promises a terabyte."""
    out = io.BytesIO()
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "<f4", "fortran_order": False, "shape": (1 << 30, 256)}
    )
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        ids = io.BytesIO()
        np.save(ids, np.arange(24))
        archive.writestr("id.npy", ids.getvalue())
        archive.writestr("embedding.npy", head.getvalue() + bytes(1 << 20))
    return out.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _npz(id=np.arange(24), embedding=np.full((24, 4), np.nan)),
        _npz(id=np.arange(24), embedding=np.ones(24)),
        _npz(id=np.arange(24), embedding=np.ones((23, 4))),
        _npz(id=np.array(["a"] * 24), embedding=np.ones((24, 4))),
        _npz(id=np.arange(24), embedding=np.full((24, 4), 1e300)),
        _npz(id=np.arange(24), embedding=np.ones((24, 0))),
        _npz(id=np.arange(24), embedding=np.ones((24, 4))),
        _npz(embedding=np.ones((24, 4))),
        _bomb(),
    ],
    ids=["nan", "flat", "short", "text", "huge", "empty", "equal", "no-ids", "bomb"],
)
def test_strange_embeddings_are_a_note(tmp_path, run, content) -> None:
    (run / "embeddings.npz").write_bytes(content)
    write_report([run], tmp_path / "out")


def test_a_document_of_a_hundred_megabytes_is_named_and_not_read(tmp_path, run) -> None:
    for name in ("config.toml", "protocol.json", "environment.json", "metrics.json"):
        with (run / name).open("wb") as out:
            out.truncate(100_000_000)
    page = write_report([run], tmp_path / "out").read_text()
    assert page.count("100,000,000 bytes") == 4


def test_thousands_of_groups_are_bounded_and_said(tmp_path, run) -> None:
    rows = "".join(f"{i},a,{i % 5},{i % 3},s{i},d{i},{i}\n" for i in range(120))
    head = "id,path,mos,prediction,subset,distortion,level\n"
    (run / "predictions" / "test.csv").write_text(head + rows)
    page = write_report([run], tmp_path / "out").read_text()
    assert "the predictions name 120 subsets: the 100 with the most images are shown" in page


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
KEYS = (
    "set",
    "part",
    "split",
    "score",
    "counts",
    "train_seconds",
    "selection",
    "synthetic",
    "note",
)


@pytest.mark.timeout(600)
@settings(
    max_examples=8,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    protocol=st.dictionaries(st.sampled_from(KEYS), VALUES),
    entries=st.lists(
        st.dictionaries(st.sampled_from(("event", "epoch", "step", "loss", "val_srcc")), VALUES)
    ),
    numbers=st.lists(st.floats() | st.integers(-3, 3), min_size=4, max_size=20),
)
def test_no_content_of_a_run_folder_is_a_traceback(
    tmp_path_factory, protocol, entries, numbers
) -> None:
    folder = tmp_path_factory.mktemp("run")
    (folder / "predictions").mkdir()
    pairs = zip(numbers[::2], numbers[1::2], strict=False)
    rows = "".join(f"{i},p{i},{x},{y}\n" for i, (x, y) in enumerate(pairs))
    (folder / "predictions" / "test.csv").write_text(HEAD + rows)
    (folder / "protocol.json").write_text(json.dumps(protocol))
    events = ("step", "epoch", None)
    lines = [{"event": events[i % 3], **e} for i, e in enumerate(entries)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _report_or_sentence([folder], folder / "out")
    _report_or_sentence([folder, folder], folder / "out")
