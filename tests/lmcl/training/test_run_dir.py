"""The log of a run that goes on: what was written after the position goes, damage is counted."""

import json
import logging
from pathlib import Path

import pytest

from lmcl.training.run_dir import RunDir

GOOD = [{"epoch": 0, "step": 0}, {"epoch": 0, "step": 1}, {"epoch": 0}, {"epoch": 1, "step": 0}]
DAMAGED = {
    "torn": b'{"epoch": 0, "st',
    "no UTF-8": b'{"epoch": 0, "step": 0, "x": "\xf2"}',
    "no object": b"[1, 2]",
    "null": b"null",
    "no epoch": b'{"step": 1}',
    "a text": b'{"epoch": "0", "step": 0}',
    "a list": b'{"epoch": 0, "step": [1]}',
    "deep": b"[" * 100_000,
    "a huge number": b'{"epoch": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_line_of_the_log_is_left_out_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    lines = [json.dumps(entry).encode() for entry in GOOD]
    (tmp_path / "log.jsonl").write_bytes(b"\n".join([*lines[:2], DAMAGED[kind], *lines[2:]]))
    with caplog.at_level(logging.WARNING):
        RunDir(tmp_path).rewind_log(epoch=1, step=0)
    kept = (tmp_path / "log.jsonl").read_bytes().splitlines()
    assert kept == lines[:3]
    assert "1 torn or damaged lines are left out" in caplog.text
