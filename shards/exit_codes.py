"""How a command ends: every error becomes one sentence on stderr and an exit code, in one place.

Errors of ours carry their exit code as an attribute (docs/architecture.md lists the codes), so
nothing of the packages that raise them is imported here. What is neither ours nor the system's is a
bug and keeps its traceback.
"""

import contextlib
import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import click

from shards.text import bounded_message, redact_url

FAILED = 1
"""A failure at run time: the disk, the network, a limit of the system."""
INTERRUPTED = 130
_MISSING = 4

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def report_errors(*, way_on: str = "") -> Iterator[None]:
    """Turn the exceptions of ours, the system and click, and an interrupt, into a sentence.

    Args:
        way_on: What was kept and how to go on, for what was interrupted or found the disk full.

    Raises:
        SystemExit: With the exit code; anything that is a bug goes on as it is.
    """
    after = f"; {way_on}" if way_on else ""
    try:
        yield
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        end(f"interrupted{after}", INTERRUPTED)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        is_full = isinstance(error, OSError) and error.errno in _FULL
        end(f"error: {sentence_of(error)}{after if is_full else ''}", code)


def exit_code_of(error: Exception) -> int | None:
    """The exit code of what is wrong with the world; None for a bug."""
    code = getattr(error, "exit_code", None)
    if isinstance(code, int):
        return code
    if isinstance(error, ModuleNotFoundError):
        return _MISSING if _missing_package(error) else None
    return FAILED if isinstance(error, OSError) else None


def sentence_of(error: Exception) -> str:
    """What is said of an error: one line of at most 2 KB, without credentials."""
    if isinstance(error, ModuleNotFoundError) and (missing := _missing_package(error)):
        return bounded_message(missing)
    if isinstance(error, OSError) and error.strerror and not hasattr(error, "exit_code"):
        # A folder that may not be written, a full disk: the system's words, without its number.
        place = "" if error.filename is None else f"{redact_url(_name(error.filename))}: "
        way_out = "make room" if error.errno in _FULL else "check its rights and space"
        return bounded_message(f"{place}{error.strerror}; {way_out}, or name another place")
    return bounded_message(redact_url(str(error)))


def _missing_package(error: ModuleNotFoundError) -> str | None:
    # Looking packages up takes longer than `--help`.
    from shards.packages import missing_package

    return missing_package(error)


def end(text: str, exit_code: int) -> NoReturn:
    """Say it on stderr and leave the process."""
    with contextlib.suppress(OSError):  # the terminal may be gone
        click.echo(text, err=True)
    sys.exit(exit_code)


def _name(filename: object) -> str:
    return filename.decode(errors="replace") if isinstance(filename, bytes) else str(filename)
