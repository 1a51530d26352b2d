import ast
import datetime
import decimal
import math
from pathlib import Path

import pytest

from shards.datasets.values import (
    cell_text,
    is_missing,
    name_text,
    one_name_each,
    parse_number,
)
from shards.errors import ShardError

ROOT = Path(__file__).resolve().parents[3]
READERS = [*(ROOT / "shards/datasets").glob("*.py"), ROOT / "shards/splits/import_splits.py"]


def _is_value(node: ast.expr, drawn: set[str]) -> bool:
    """A cell: what a mapping or a row holds, or the name of a loop that goes over one."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return _is_value(node.operand, drawn)
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in ("get", "strip", "lower"):
            return function.attr == "get" or _is_value(function.value, drawn)
        is_text = isinstance(function, ast.Name) and function.id == "str"
        return is_text and any(_is_value(argument, drawn) for argument in node.args)
    if isinstance(node, ast.Subscript):
        return not isinstance(node.slice, ast.Slice)
    return isinstance(node, ast.Name) and node.id in drawn


def _truth_tests(tree: ast.Module) -> list[int]:
    drawn = {
        name.id
        for node in ast.walk(tree)
        if isinstance(node, ast.comprehension | ast.For)
        for name in ast.walk(node.target)
        if isinstance(name, ast.Name)
        and name.id in ("cell", "cells", "value", "row", "word", "text")
    }
    found = []
    for node in ast.walk(tree):
        tests: list[ast.expr] = []
        if isinstance(node, ast.BoolOp):
            tests = node.values[:-1]
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            tests = [node.test]
        elif isinstance(node, ast.comprehension):
            tests = node.ifs
        found += [test.lineno for test in tests if _is_value(test, drawn)]
    return found


@pytest.mark.parametrize("path", READERS, ids=lambda path: path.name)
def test_no_reader_asks_whether_a_value_is_true(path: Path) -> None:
    """0, false and 0.0 are values: a group numbered 0 was once taken for no group."""
    assert _truth_tests(ast.parse(path.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "group = str(row.get('group') or path)",
        "name = str(row[0] or '').strip()",
        "x = [f(cell or 0) for cell in row]",
        "if copies[row]: pass",
        "x = 1 if not row.get('a') else 2",
        "x = [v for row in rows if not row[0]]",
    ],
)
def test_the_test_above_finds_the_idiom(code: str) -> None:
    assert _truth_tests(ast.parse(code)) != []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0"), (False, "False"), (True, "True"), ("0", "0"), (" a b ", "a b"),
        (1.0, "1"), (1.5, "1.5"), (decimal.Decimal("2.0"), "2"), ("007", "007"), ("1.0", "1"),
        ("-0.0", "0"), ("1.50", "1.50"), ("false", "false"),
        (datetime.date(2020, 1, 2), "2020-01-02"), (10**30, "1" + "0" * 30),
        (None, ""), (math.nan, ""), (decimal.Decimal("NaN"), ""), ("", ""), ("  ", ""),
        ("nan", ""), ("NaN", ""), ("Nancy", "Nancy"),
    ],
)  # fmt: skip
def test_only_null_and_nan_are_missing(value: object, text: str) -> None:
    assert cell_text(value, where="x") == text
    if text == "" and not isinstance(value, str):
        assert is_missing(value)
    if text != "":
        assert not is_missing(value)
        assert name_text(value, where="x") == (value.strip() if isinstance(value, str) else text)


PICTURE = {"bytes": b"\xff\xd8" * 200_000, "path": None}


@pytest.mark.parametrize("value", [PICTURE, [PICTURE], b"\xff" * 500_000, (1, 2), {1}])
def test_a_structure_in_a_cell_is_named_and_never_dumped(value: object) -> None:
    for read in (cell_text, name_text):
        with pytest.raises(ShardError, match="where a text or a number belongs") as caught:
            read(value, where="labels.parquet: row 2: image")
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("\N{MINUS SIGN}2.5", -2.5),
        ("1.5", 1.5), (" -2e3 ", -2000.0), ("+.5", 0.5), ("7.", 7.0), (3, 3.0), ("\ufeff4", 4.0),
        (decimal.Decimal("1.25"), 1.25), ("1e999", math.inf),
    ],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(value: object, number: float) -> None:
    assert parse_number(value) == number


@pytest.mark.parametrize(
    "value",
    ["1_0", "1 0", "0x1", "1,5", "nan", "inf", "infinity", "", "e5", "\u0661", True, None, [1],
     {"a": 1}, b"1", "9" * 5000 + "x"],
)  # fmt: skip
def test_what_is_no_number_is_none(value: object) -> None:
    assert math.isnan(parse_number(value))


@pytest.mark.parametrize(
    "names", [["score", "Score"], ["a", "path", " PATH "], ["\ufeffscore", "score"]]
)
def test_two_columns_of_one_name_are_refused(names: list[str]) -> None:
    with pytest.raises(ShardError, match="have one name"):
        one_name_each(names, where="x.csv")


def test_empty_names_may_stand_twice() -> None:
    assert one_name_each(["\ufeffPath", None, "", "Score "], where="x") == ["path", "", "", "score"]
