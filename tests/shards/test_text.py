import csv
import io
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.text import (
    MAX_MESSAGE_BYTES,
    bounded_message,
    markdown,
    plain_cell,
    printable,
    redact_url,
    spreadsheet_cell,
    spreadsheet_path,
)

HOSTILE = st.text(
    st.one_of(st.characters(), st.sampled_from("\x1b\n\r\0\u202e\u200b\udcff\ud800=+-@'")),
    max_size=300,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("photos/a b (1).jpg", "photos/a b (1).jpg"),
        ("Straße/写真.jpg", "Straße/写真.jpg"),
        ("a\nerror: b", r"a\nerror: b"),
        ("\x1b[2Jx", r"\x1b[2Jx"),
        ("a\u202egpj.exe", r"a\u202egpj.exe"),
        ("a\u200bb\x85c\u2028d", r"a\u200bb\x85c\u2028d"),
        ("\U000e0001", r"\U000e0001"),
        (b"caf\xe9.jpg", r"caf\xe9.jpg"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),
        ("\ud800", r"\ud800"),
        (ValueError(), "ValueError"),
        (ValueError("x\r"), r"x\r"),
        ([10**5000], "<list>"),
        (None, "None"),
    ],
)
def test_what_is_no_visible_character_is_spelled_out(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_a_structure_is_never_dumped() -> None:
    shown = printable({"bytes": b"\xff\xd8" * 100_000, "path": None})
    assert len(shown) <= 200
    assert "bytes" in shown


@given(text=HOSTILE, limit=st.integers(8, 400))
def test_shown_text_is_one_bounded_line_that_any_stream_can_hold(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert len(shown) <= limit
    assert not {unicodedata.category(c) for c in shown} & {"Cc", "Cf", "Cs", "Cn", "Zl", "Zp"}
    shown.encode()
    assert printable(shown, limit) == shown


def test_a_long_path_keeps_its_beginning_and_its_name() -> None:
    shown = printable("data/" + "x" * 10_000 + "/name.jpg", 60)
    assert shown.startswith("data/xxx")
    assert shown.endswith("xxx/name.jpg")
    assert len(shown) == 60


@given(text=HOSTILE, times=st.integers(1, 300), limit=st.integers(64, MAX_MESSAGE_BYTES))
def test_no_message_is_longer_than_two_kilobytes(text: str, times: int, limit: int) -> None:
    message = bounded_message(text * times, limit)
    assert len(message.encode()) <= limit
    assert "\n" not in message
    error = ShardError(f"{text * times}; do this", exit_code=3)
    assert len(str(error).encode()) <= MAX_MESSAGE_BYTES
    assert str(error).endswith("; do this")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://u:p@host/a?X-Sig=s&part=2#t", "https://host/a?X-Sig=***&part=***#***"),
        ("s3://key:se/cr@et@bucket/x", "s3://bucket/x"),
        ("https://host:8080/repo@v1/x", "https://host:8080/repo@v1/x"),
        ("https://token@host", "https://host"),
        ("https://host/x?token", "https://host/x?***"),
        ("S3://u:p@b", "S3://b"),
        ("cannot open 'https://u:p@h/x?k=s': 403", "cannot open 'https://h/x?k=***': 403"),
        ("simplecache::https://u:p@h/x", "simplecache::https://h/x"),
        ("data/what?.jpg", "data/what?.jpg"),
        ("mail@example.org", "mail@example.org"),
    ],
)
def test_credentials_and_queries_are_taken_out_of_urls(url: str, shown: str) -> None:
    assert redact_url(url) == shown


CELLS = [
    ("=HYPERLINK(1)", "'=HYPERLINK(1)"),
    ("+1+cmd", "'+1+cmd"),
    ("-x.jpg", "'-x.jpg"),
    ("@SUM(A1)", "'@SUM(A1)"),
    ("\t=1", "'\t=1"),
    ("\uff1d1", "'\uff1d1"),
    ("'=1", "''=1"),
    ("-1.5", "-1.5"),
    ("+2e-3", "+2e-3"),
    ("'quoted'", "'quoted'"),
    ("", ""),
    ("a=b", "a=b"),
]


@pytest.mark.parametrize(("text", "cell"), CELLS)
def test_a_cell_that_begins_like_a_formula_is_text_for_a_spreadsheet(text: str, cell: str) -> None:
    assert spreadsheet_cell(text) == cell
    assert plain_cell(cell) == text


@given(HOSTILE)
def test_guarded_cells_are_read_back_as_they_were(text: str) -> None:
    cell = spreadsheet_cell(text)
    assert plain_cell(cell) == text
    assert not re.match(r"[=@\t\r]", cell)
    if "\0" not in text and not any(0xD800 <= ord(c) < 0xE000 for c in text):
        out = io.StringIO(newline="")
        csv.writer(out).writerow([cell, "x"])
        assert next(csv.reader(io.StringIO(out.getvalue(), newline=""))) == [cell, "x"]


@pytest.mark.parametrize("name", ["=1.jpg", "-rf.jpg", "@a/b.jpg", "+.png"])
def test_a_guarded_path_names_the_same_file(tmp_path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("x")
    guarded = spreadsheet_path(name)
    assert guarded == f"./{name}"
    assert Path(guarded).resolve() == file
    assert spreadsheet_path("photos/=a.jpg") == "photos/=a.jpg"


def test_markdown_shows_foreign_text_as_text() -> None:
    assert markdown("<img src=x onerror=1>") == "&lt;img src=x onerror=1&gt;"
    assert markdown("[a](http://b)|c\n# d") == r"\[a\](http:\//b)\|c\\n# d"
    assert markdown("www.a.b_c") == r"www\.a.b\_c"
    assert [markdown(t) for t in ("# a", "- a", "1. a")] == [r"\# a", r"\- a", r"1\. a"]


def test_markdown_leaves_what_needs_no_escape() -> None:
    plain = "epoch 4 (70-10-20), config.toml: 0.85!"
    assert markdown(plain) == plain


def test_urls_are_searched_for_in_a_time_that_grows_with_the_text() -> None:
    # By the square of its length this would take hours.
    word = "v" * 3_000_000
    assert redact_url(word) == word
    assert redact_url(f"{word}https://me:secret@host/x") == f"{word}https://host/x"


def test_a_url_that_lost_a_slash_to_pathlib_says_no_secret_either() -> None:
    shown = redact_url(str(Path("https://me:hunter2@host/x?sig=hunter2")))
    assert shown == "https://host/x?sig=***"
    assert redact_url("C:/photos/a@b?c.jpg") == "C:/photos/a@b?c.jpg"
