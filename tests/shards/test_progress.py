"""Long jobs tell how far they are, on a terminal and in a log."""

import io
import re
import sys

import pytest

from shards import progress
from shards.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, **options: object) -> str:
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(total=4, desc="scoring", unit="img", **options) as bar:
        for _ in range(3):
            bar.set_postfix_str("1 failed", refresh=False)
            bar.update()
    return stream.getvalue()


def test_a_log_gets_plain_lines_with_rate_time_left_and_failures(monkeypatch) -> None:
    monkeypatch.setattr(progress, "EVERY_S", 0.0)
    text = told(monkeypatch, io.StringIO())
    lines = text.splitlines()
    assert "\r" not in text
    assert len(lines) >= 3
    assert re.fullmatch(
        r"scoring: 3 / 4 img, +[\d.?]+(img/s|s/img), [\d:?]+ left, 1 failed", lines[-1]
    )


def test_a_job_of_less_than_a_minute_writes_nothing_into_a_log(monkeypatch) -> None:
    assert told(monkeypatch, io.StringIO()) == ""


def test_a_terminal_gets_a_bar_and_no_progress_nothing(monkeypatch) -> None:
    assert "\rscoring" in told(monkeypatch, Terminal())
    assert told(monkeypatch, Terminal(), off=True) == ""


def test_what_is_worked_through_comes_out_unchanged(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(progress_bar(range(5), desc="x", unit="y")) == [0, 1, 2, 3, 4]
