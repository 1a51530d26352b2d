"""Errors of every package, of the system and of click end a command in one sentence and a code."""

import errno

import click
import pytest

from lmcl.errors import ConfigError, LmclError
from pipeline.errors import PipelineError
from shards.errors import ShardError
from shards.exit_codes import report_errors

FULL = OSError(errno.ENOSPC, "No space left on device", "/data/x.pt")
CASES = {
    "ours": (LmclError("bad", exit_code=5), 5, "error: bad\n"),
    "configuration": (ConfigError("bad"), 2, "error: bad\n"),
    "shards": (ShardError("bad", exit_code=4), 4, "error: bad\n"),
    "pipeline": (PipelineError("x\x1b[2J\nerror: fine", exit_code=3), 3, "error: x"),
    "full disk": (FULL, 1, "error: /data/x.pt: No space left on device; make room"),
    "no rights": (PermissionError(errno.EACCES, "Permission denied", b"/x"), 1, "error: /x: Permi"),
    "no name": (OSError("told so"), 1, "error: told so\n"),
    "url": (OSError(5, "no", "https://me:pw@h/x?sig=pw"), 1, "error: https://h/x?sig=***: no; "),
    "usage": (click.UsageError("no such option"), 2, "no such option"),
    "interrupt": (KeyboardInterrupt(), 130, "interrupted; go on\n"),
    "abort": (click.Abort(), 130, "interrupted; go on\n"),
    "package": (
        ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"),
        4,
        "error: this needs the package pillow, which is not installed; `pip install 'pillow>=",
    ),
    "long": (ShardError("x" * 10_000), 1, "error: xxx"),
}


@pytest.mark.parametrize("kind", CASES)
def test_an_error_is_one_sentence_and_its_exit_code(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error, code, words = CASES[kind]
    with pytest.raises(SystemExit) as ended, report_errors(way_on="go on"):
        raise error
    said = capsys.readouterr().err
    assert ended.value.code == code
    assert words in said
    assert said.count("\n") <= 2
    assert "\x1b" not in said
    assert "pw" not in said
    assert len(said) < 2100
    assert said.endswith("go on\n") == (kind in ("full disk", "interrupt", "abort"))


@pytest.mark.parametrize(
    "bug", [TypeError("a bug"), AssertionError(), ModuleNotFoundError("no", name="lmcl.nowhere")]
)
def test_a_bug_keeps_its_traceback(bug: Exception) -> None:
    with pytest.raises(type(bug)), report_errors():
        raise bug
