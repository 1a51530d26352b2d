"""MATLAB files, workbooks and Parquet are read in a child; whatever becomes of it is a sentence."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.io

from shards.datasets.excel import read_sheet
from shards.datasets.foreign import read_in_child
from shards.datasets.matlab import load_numbers, load_strings
from shards.datasets.parquet import read_parquet
from shards.errors import ShardError

HERE = Path(__file__).stem


def misbehave(path: Path, how: str) -> Iterator[Any]:
    """Run by the child."""
    yield ["first"]
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "exit":
        os._exit(7)
    elif how == "memory":
        yield bytes(1 << 40)
    elif how == "spin":
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
        while True:
            pass
    elif how == "print":
        print("between two answers")
    elif how == "write":
        path.with_name("written").write_bytes(b"x" * 10)
    elif how == "raise":
        raise KeyError("\x1b[2J" + "x" * 10_000)
    elif how == "wait":
        time.sleep(1000)
    elif how == "huge":
        yield [10**100]
    yield ["last"]


@pytest.fixture
def on_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "x.bin").write_bytes(b"x")
    return tmp_path / "x.bin"


ENDS = {
    "crash": "ended the process that did it .SIGSEGV",
    "exit": "ended early .status 7",
    "memory": "takes too much memory",
    "spin": r"took too long|SIGKILL",
    "write": "cannot be read .OSError",
    "raise": r"cannot be read .KeyError: '\\x1b",
    "huge": "cannot be read .OverflowError",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("how", ENDS)
def test_whatever_becomes_of_the_child_is_one_sentence(on_the_path: Path, how: str) -> None:
    answers = read_in_child(f"{HERE}:misbehave", on_the_path, how)
    assert next(answers) == ["first"]
    with pytest.raises(ShardError, match=ENDS[how]) as caught:
        list(answers)
    assert str(caught.value).startswith(str(on_the_path))
    assert len(str(caught.value).encode()) <= 2048
    assert caught.value.exit_code == 3
    written = on_the_path.with_name("written")
    assert not written.exists() or written.stat().st_size == 0


def test_what_a_library_prints_is_no_answer(on_the_path: Path) -> None:
    found = list(read_in_child(f"{HERE}:misbehave", on_the_path, "print"))
    assert found == [["first"], ["last"]]


def test_a_child_that_is_not_wanted_any_more_ends(on_the_path: Path) -> None:
    answers = read_in_child(f"{HERE}:misbehave", on_the_path, "wait")
    next(answers)
    assert str(on_the_path) in _command_lines()
    answers.close()
    assert str(on_the_path) not in _command_lines()


@pytest.mark.parametrize("read", [lambda p: load_strings(p, "x"), lambda p: list(read_sheet(p)),
                                  lambda p: list(read_parquet(p))])  # fmt: skip
def test_a_file_that_is_none_is_refused_before_a_child_starts(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "x")
    for path, message in ((tmp_path / "x", "a FIFO"), (tmp_path / "y", "no such file")):
        with pytest.raises(ShardError, match=message):
            read(path)


def test_matlab_files_hold_numbers_and_strings(tmp_path: Path) -> None:
    names = np.array([["a.bmp", "b.bmp"]], dtype=object)
    scores = np.array([[1.5, np.nan]])
    content = {"names": names, "scores": scores, "orgs": np.uint8([[0, 1]])}
    scipy.io.savemat(tmp_path / "x.mat", content)
    found = load_numbers(tmp_path / "x.mat", ["scores", "orgs"])
    np.testing.assert_array_equal(found, [[1.5, np.nan], [0, 1]])
    assert load_strings(tmp_path / "x.mat", "names") == ["a.bmp", "b.bmp"]
    with pytest.raises(ShardError, match="has no variable 'mos', only names, scores, orgs"):
        load_numbers(tmp_path / "x.mat", ["mos"])
    with pytest.raises(ShardError, match="names holds no numbers"):
        load_numbers(tmp_path / "x.mat", ["names"])


@pytest.mark.slow
def test_no_mutation_of_a_cell_array_ends_this_process(tmp_path: Path) -> None:
    """Two of sixty ended it with SIGSEGV."""
    names = np.array([[f"img{k}.bmp" for k in range(30)]], dtype=object)
    scipy.io.savemat(tmp_path / "good.mat", {"refnames_all": names})
    good = (tmp_path / "good.mat").read_bytes()
    rng = np.random.default_rng(5)
    for _ in range(60):
        data = bytearray(good)
        for at in rng.integers(128, len(good), 3):
            data[at] = rng.integers(256)
        (tmp_path / "x.mat").write_bytes(data)
        with contextlib.suppress(ShardError):
            load_strings(tmp_path / "x.mat", "refnames_all")


def workbook(path: Path, sheet_xml: bytes | None = None, *, unpacked: int = 0) -> Path:
    """A small workbook, its sheet replaced."""
    book = openpyxl.Workbook()
    book.active.append(["Image name", "MOS"])
    book.active.append(["a.jpg", 1.5])
    book.save(path)
    if sheet_xml is not None:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        parts["xl/worksheets/sheet1.xml"] = sheet_xml
        if unpacked:
            parts["xl/media/x"] = bytes(unpacked)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in parts.items():
                archive.writestr(name, data)
    return path


def sheet(rows: str) -> bytes:
    space = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    return f'<worksheet xmlns="{space}"><sheetData>{rows}</sheetData></worksheet>'.encode()


def row(number: int | str, *cells: str, at: str = "") -> str:
    inside = "".join(
        f'<c r="{at or chr(65 + k)}{number}" t="inlineStr"><is><t>{cell}</t></is></c>'
        for k, cell in enumerate(cells)
    )
    return f'<row r="{number}">{inside}</row>'


HEAD = row(1, "Image name", "MOS")
BROKEN = {
    "a huge row number": (HEAD + row(10**9, "a", "1") + row(3, "b", "2"), "row 1000000000 follows"),
    "a row that goes back": (HEAD + row(5, "a", "1") + row(3, "b", "2"), "row 3 follows row 5"),
    "a row twice": (HEAD + row(2, "a", "1") + row(2, "b", "2"), "row 2 follows row 2"),
    "a column too far": (HEAD + row(2, "a", at="ZZZ"), "column 18278 follows"),
    "damage between rows": (HEAD + row(2, "a", "1") + "<row r='3'><c r='A3'", "cannot be read"),
    "no number": (HEAD + '<row r="2"><c r="A2" t="n"><v>x</v></c></row>', "cannot be read"),
    "a long text": (HEAD + row(2, "x" * 40_000, "1"), "a cell of 40,000 characters"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damage_of_a_workbook_is_named_and_no_row_is_lost(tmp_path: Path, kind: str) -> None:
    rows, message = BROKEN[kind]
    path = workbook(tmp_path / "x.xlsx", sheet(rows))
    with pytest.raises(ShardError, match=message):
        list(read_sheet(path))


def test_a_workbook_that_unpacks_to_gigabytes_is_refused(tmp_path: Path) -> None:
    path = workbook(tmp_path / "x.xlsx", sheet(HEAD), unpacked=600 << 20)
    with pytest.raises(ShardError, match=r"unpacks to 629,.* bytes, more than the 536,870,912"):
        list(read_sheet(path))


def test_rows_keep_their_numbers_and_a_wrong_dimension_loses_none(tmp_path: Path) -> None:
    rows = sheet(HEAD + row(4, "a", "1") + row(900, "b", "2"))
    rows = rows.replace(b"<sheetData>", b'<dimension ref="A1:B1"/><sheetData>')
    found = list(read_sheet(workbook(tmp_path / "x.xlsx", rows)))
    assert found == [(1, ["Image name", "MOS"]), (4, ["a", "1"]), (900, ["b", "2"])]
    with pytest.raises(ShardError, match="has no sheet 'y', only Sheet"):
        list(read_sheet(tmp_path / "x.xlsx", "y"))


def test_parquet_gives_plain_values(tmp_path: Path) -> None:
    table = pa.table(
        {"Path": pa.array([b"a.png", b"\xff"], pa.binary()), "n": [[1], [2]], "score": [1, None]}
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert list(read_parquet(tmp_path / "x.parquet")) == [
        {"path": "a.png", "n": {"list<element: int64>": None}, "score": 1},
        {"path": {"bytes": None}, "n": {"list<element: int64>": None}, "score": None},
    ]
    (tmp_path / "x.parquet").write_bytes(b"PAR1" + b"\xff" * 50 + b"PAR1")
    with pytest.raises(ShardError, match=r"x\.parquet: cannot be read"):
        list(read_parquet(tmp_path / "x.parquet"))


def test_a_child_ends_with_its_parent(on_the_path: Path) -> None:
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from pathlib import Path\nfrom shards.datasets.foreign import read_in_child\n"
        f"answers = read_in_child('{HERE}:misbehave', Path(sys.argv[1]), 'wait')\n"
        "for answer in answers: print(answer, flush=True)\n"
    )
    root = Path(__file__).resolve().parents[3]
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(on_the_path), str(root), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        parent.kill()
    end = time.monotonic() + 60
    while time.monotonic() < end and str(on_the_path) in _command_lines():
        time.sleep(0.05)
    assert str(on_the_path) not in _command_lines()


def _command_lines() -> str:
    found = ""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += place.read_text(errors="replace")
        except OSError:
            continue
    return found
