"""One table of text in every dialect is one set; what may mean two things is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shards.datasets.dialect import recognise
from shards.datasets.roles import KNOWN_KEYS, PATH
from shards.datasets.table import open_table
from shards.errors import ShardError
from shards.sample import DataSet, Sample

NAMES = ("a.jpg", "été 1,2.jpg", "sub/c;d.jpg", "x|y.jpg")
ROWS: list[tuple[Any, ...]] = [
    ("path", "score", "std", "group", "split"),
    (NAMES[0], 2.5, 0.25, "one", "train"),
    (NAMES[1], 3.125, None, "zwei, drei", "dev"),
    (NAMES[2], 4, 1.5, "one", "train"),
    (NAMES[3], -0.5, None, "x", "test"),
]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in NAMES:
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(b"")
    return tmp_path / "photos"


def written(delimiter: str, decimal: str = ".", *, end: str = "\n", surplus: str = "") -> str:
    def cell(value: Any) -> str:
        if isinstance(value, float):
            value = str(value).replace(".", decimal)
        text = "" if value is None else str(value)
        needs_quotes = any(mark in text for mark in (delimiter, '"'))
        return f'"{text}"' if needs_quotes else text

    return "".join(delimiter.join(map(cell, row)) + surplus + end for row in ROWS)


def read(file: Path, data: bytes, images: Path, **options: Any) -> tuple[DataSet, list[Sample]]:
    file.write_bytes(data)
    dataset = open_table(file, images=images, missing="error", **options)
    return dataset, list(dataset.samples())


DIALECTS: dict[str, tuple[str, str, str]] = {
    "plain": (written(","), "utf-8", ""),
    "mark": (written(",", end="\r\n"), "utf-8-sig", ""),
    "comma-decimal": (written(",", ","), "utf-8", "decimal commas"),
    "semicolon": (written(";", ",", end="\r\n"), "utf-8-sig", "semicolons, decimal commas"),
    "semicolon-point": (written(";"), "utf-8", "cells between semicolons"),
    "sep": ("sep=;\r\n" + written(";", ","), "utf-8", "semicolons, decimal commas"),
    "quoted-sep": ('"sep=;"\r\n' + written(";", ","), "utf-16", "UTF-16, cells between semi"),
    "surplus": (written(";", ",", surplus=";;") + ";;;;;;\n\n", "utf-8", "semicolons"),
    "tabs": (written("\t", ","), "utf-16", "UTF-16, cells between tabs, decimal commas"),
    "bars": (written("|"), "utf-8", "cells between bars"),
    "wide-le": (written("\t"), "utf-16-le", "UTF-16-LE, cells between tabs"),
    "wide-be": (written(";", ","), "utf-16-be", "UTF-16-BE, cells between semicolons"),
    "windows": (written(";", ","), "cp1252", "Windows-1252 (Latin-1), cells between semicolons"),
    "latin-1": (written(","), "latin-1", "Windows-1252 (Latin-1)"),
    "old-mac": (written(",", end="\r"), "utf-8", ""),
    "above": (
        "\n# made by hand, 2024\nStudy 3\n\n" + written(";", ","),
        "utf-8",
        "4 lines above the header",
    ),
    "blank-above": (";;;\n" + written(";", ","), "utf-8", "1 line above the header"),
    "commented-header": ("# " + written(","), "utf-8", ""),
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_table_in_every_dialect_is_the_same_set(
    images: Path, tmp_path: Path, dialect: str
) -> None:
    text, encoding, told = DIALECTS[dialect]
    plain, expected = read(tmp_path / "plain.csv", written(",").encode(), images)
    dataset, samples = read(tmp_path / "l.csv", text.encode(encoding), images)
    assert samples == expected
    assert dataset.score == plain.score
    assert [(s.mos, s.mos_std, s.group, s.part) for s in samples] == [
        (2.5, 0.25, "one", "train"),
        (3.125, None, "zwei, drei", "val"),
        (4.0, 1.5, "one", "train"),
        (-0.5, None, "x", "test"),
    ]
    assert [s.path for s in samples] == list(NAMES)
    assert len(dataset.notes) == bool(told)
    assert told in "".join(dataset.notes)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path\tscore\na.jpg\t2,345\n", "row 2 holds '2,345', which may be 2.345 or 2345"),
        ('path,score\na.jpg,"1,234"\n', "which may be 1.234 or 1234"),
        ("path;score\na.jpg;2,5\nx|y.jpg;2.5\n", "row 2 writes '2,5' .*row 3 '2.5' with a point"),
        ("path,score\na.jpg,2,5\n", r"row 2 has 3 cells, the header 2; put .* \(\"2,5\"\)"),
        ("path,score;mos\na.jpg,1;2\n", "row 2: score '1;2' is not a finite number"),
        ("a,b;c\n1,2;3\n", "may be separated by commas or by semicolons; put the line `sep=,`"),
        ("\u043f\u0443\u0442\u044c,score\n\u0430\u0431\u0432.jpg,1\n", "is not UTF-8, .*iconv"),
    ],
    ids=["thousand", "quoted-thousand", "mixed", "unquoted", "two-marks", "marks", "cyrillic"],
)
def test_what_may_mean_two_things_is_refused_by_name(
    images: Path, tmp_path: Path, text: str, words: str
) -> None:
    encoding = "utf-8" if text.isascii() else "cp1251"
    with pytest.raises(ShardError, match=words):
        read(tmp_path / "l.csv", text.encode(encoding), images)


@pytest.mark.parametrize(
    ("cells", "numbers"),
    [
        (["2,5", "1.234,5"], [2.5, 1234.5]),
        (["1,234", "2,5"], [1.234, 2.5]),
        (["0,123", "4"], [0.123, 4.0]),
    ],
)
def test_thousands_and_decimal_commas_are_told_apart(
    images: Path, tmp_path: Path, cells: list[str], numbers: list[float]
) -> None:
    rows = "".join(f"{name}\t{cell}\n" for name, cell in zip(NAMES, cells, strict=False))
    _, samples = read(
        tmp_path / "l.tsv", f"path\tscore\n{rows}".encode(), images, extra_files="ignore"
    )
    assert [sample.mos for sample in samples] == numbers


def test_the_advice_of_an_ambiguous_table_works(
    images: Path, tmp_path: Path, picture: Callable[..., bytes]
) -> None:
    (tmp_path / "l.csv").write_text("sep=;\na,b;c\n1,2;3\n")
    found = recognise(tmp_path / "l.csv", known=KNOWN_KEYS, wanted=PATH.keys)
    assert (found.delimiter, found.above) == (";", 1)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("l.csv", b"\xd0\xcf\x11\xe0\xa1\xb1" * 9, "workbook of the old kind"),
        ("l.csv", b"\x1f\x8b\x08" * 9, "compressed by gzip.*gunzip"),
        ("l.xls", b"<html><table></table>", "a page of HTML or XML"),
        ("l.ods", b"PK\3\4" + b"\0" * 26 + b"mimetypeapplication/vnd.oasis.opendocument.spre",
         "OpenDocument spreadsheet.*soffice --headless --convert-to csv"),
    ],
)  # fmt: skip
def test_what_is_no_table_is_named_with_the_way_out(
    images: Path, tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    with pytest.raises(ShardError, match=words):
        read(tmp_path / name, data, images)
