r"""How text from elsewhere is shown: paths, cells of tables, names, URLs, words of other programs.

Such text may hold escape sequences that clear a terminal, newlines that forge a line of a log,
marks that turn the direction of writing, formulas that a spreadsheet runs, and megabytes.
`printable` spells out what is not a visible character and bounds the length; every terminal line,
message and log entry shows foreign text through it. `ShardError` sends its whole message through
`bounded_message`.

Tables that people open in spreadsheets have a rule of their own (docs/formats.md): a cell that
begins like a formula gets an apostrophe in front (`spreadsheet_cell`), and a relative path gets
`./` (`spreadsheet_path`), so that it still names the same file for whoever reads it.
"""

import os
import re
import reprlib
import unicodedata
from pathlib import Path
from typing import Final

MAX_MESSAGE_BYTES: Final = 2048
"""No message is longer, in bytes of UTF-8: a terminal shows it whole, a log line holds it."""

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t", "\0": r"\x00", "\x1b": r"\x1b"}
_MARK = "…"
# Schemes are short; without a bound the search takes the square of a long word.
# With one slash too, for the usual schemes: a URL that went through `pathlib`.
_SQUEEZED = "https?|ftps?|sftp|s3a?|gs|gcs|az|abfss?|hdfs|webdavs?"
_URL = re.compile(
    rf"([a-z][a-z0-9+.-]{{0,30}}(?=://)|\b(?:{_SQUEEZED})(?=:/)):/{{1,2}}([^\s'\"<>]+)",
    re.IGNORECASE,
)
_PORT = re.compile(r"[^:]*(:\d*)?\Z")
_FORMULA = re.compile(r"'*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
# What has a meaning anywhere; at the beginning only; and what makes a link without brackets.
_MARKDOWN = re.compile(r"[\\`*_\[\]|~$]|\A[#+\-=]|(?<=:)(?=//)|(?<=www)\.", re.IGNORECASE)
_MARKDOWN_NUMBER = re.compile(r"\A(\d{1,9})([.)])")
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60
_REPR.maxlevel = 3


def printable(text: object, limit: int = 200) -> str:
    r"""One line of visible characters that shows `text`, of at most `limit` characters.

    Control and format characters (escape, newline, marks of direction, zero width), surrogates and
    unassigned code points are spelled out as in Python (`\n`, `\x1b`, `\u202e`); a byte of a file
    name that is no UTF-8 is shown as `\xff`. What is too long keeps its beginning and its end
    (of a path the file's name), with `…` between.

    Args:
        text: A string or a path; of an exception its message, or its name if it has none; anything
            else is shown by a bounded `repr`, so that a structure of bytes is never dumped.
        limit: Most characters of the result, at least 8.
    """
    whole = _as_text(text)
    if len(whole) <= limit and whole.isprintable():
        return whole
    # Nothing behind this can be part of the result, and a cell may hold a gigabyte.
    head, tail = whole, ""
    if len(whole) > 2 * limit:
        head, tail = whole[:limit], whole[-limit:]
    pieces = [_visible(character) for character in head]
    if not tail and sum(map(len, pieces)) <= limit:
        return "".join(pieces)
    ends = [_visible(character) for character in tail] if tail else pieces
    return _both_ends(pieces, ends, limit)


def bounded_message(text: object, limit_bytes: int = MAX_MESSAGE_BYTES) -> str:
    """A message of at most `limit_bytes` bytes of UTF-8, on one line of visible characters.

    A message that is longer keeps its beginning (what was asked) and its end (the way out).
    """
    whole = _as_text(text)
    # A character is shown by at most ten, each of at most four bytes; the loop ends at once if the
    # text is plain.
    shown = printable(whole, max(8, min(len(whole) * 10, limit_bytes)))
    size = len(shown.encode())
    while size > limit_bytes and limit_bytes >= 32:
        shown = printable(whole, max(8, len(shown) * limit_bytes // size - 1))
        size = len(shown.encode())
    return shown


def is_url(root: str | Path) -> bool:
    """True for an fsspec URL, False for a path of this machine."""
    return isinstance(root, str) and "://" in root


def redact_url(text: object) -> str:
    """The text with what is secret taken out of every URL in it.

    `https://user:password@host/path?signature=x#y` becomes `https://host/path?signature=***#***`:
    the address still tells where, and works for whoever has the credentials in the environment. A
    text without a URL (a path of this machine) comes back as it is.
    """
    return _URL.sub(_redacted, _as_text(text))


def spreadsheet_cell(text: str) -> str:
    """A cell of a CSV that no spreadsheet takes for a formula; `plain_cell` undoes it.

    A cell that begins with `=`, `+`, `-`, `@` (or their wide forms, a tab, a carriage return) and
    is no number gets an apostrophe in front, which spreadsheets understand as "this is text"; so
    does a cell that begins with an apostrophe followed by one of these.
    """
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def plain_cell(text: str) -> str:
    """The inverse of `spreadsheet_cell`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def spreadsheet_path(path: str) -> str:
    """A path for a cell of a CSV: `./` in front of a relative one that begins like a formula.

    It names the same file for every program that reads the table, so nothing undoes it; two
    spellings of a path are compared by `os.path.normpath`.
    """
    return f"./{path}" if _FORMULA.match(path) else path


def markdown(text: object, limit: int = 200) -> str:
    """Foreign text inside Markdown: one line, without HTML, links, emphasis or a table's bars."""
    shown = printable(text, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN_NUMBER.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", shown))


def _as_text(text: object) -> str:
    if isinstance(text, str):
        return text
    if isinstance(text, os.PathLike):
        text = os.fspath(text)
    if isinstance(text, BaseException):
        return _message_of(text)
    if isinstance(text, bytes | bytearray | memoryview):
        return bytes(text[:4096]).decode("utf-8", "surrogateescape")
    return text if isinstance(text, str) else _bounded_repr(text)


def _message_of(error: BaseException) -> str:
    try:
        return str(error) or type(error).__name__
    except Exception:
        # The message of an error is whatever its class makes of it.
        return type(error).__name__


def _bounded_repr(value: object) -> str:
    try:
        return _REPR.repr(value)
    except Exception:
        # An integer of more digits than Python prints, or a class of somebody's.
        return f"<{type(value).__name__}>"


def _visible(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    if unicodedata.category(character) not in _HIDDEN:
        return character
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        # A byte of a file name that is no UTF-8 (surrogateescape).
        return f"\\x{code - 0xDC00:02x}"
    return (
        f"\\x{code:02x}"
        if code < 0x100
        else f"\\u{code:04x}"
        if code < 1 << 16
        else f"\\U{code:08x}"
    )


def _both_ends(first: list[str], last: list[str], limit: int) -> str:
    """The beginning and the end, in whole pieces; two thirds are the beginning."""
    room = limit - len(_MARK)
    left = room * 2 // 3
    head = _fitting(first, left)
    tail = _fitting(last[::-1], room - left)
    return "".join(head) + _MARK + "".join(reversed(tail))


def looked_at(path: str | Path) -> str:
    """Where a relative path was looked for, in brackets; empty for one that says so itself."""
    text = str(path)
    if is_url(text) or os.path.isabs(text):
        return ""
    return f" (looked at {printable(os.path.abspath(text))})"


def _fitting(pieces: list[str], room: int) -> list[str]:
    fitting = []
    for piece in pieces:
        room -= len(piece)
        if room < 0:
            break
        fitting.append(piece)
    return fitting


def _redacted(found: re.Match[str]) -> str:
    scheme, rest = found[1], found[2]
    rest, has_fragment, _ = rest.partition("#")
    rest, has_query, query = rest.partition("?")
    place, slash, path = rest.partition("/")
    if "@" in place:
        place = place.rpartition("@")[2]
    elif "@" in path and not _PORT.match(place):
        # A password with a slash that was not escaped: what follows the colon is no port.
        place, slash, path = "", "", path.rpartition("@")[2]
    hidden = "&".join(
        f"{name}=***" if equals else "***"
        for name, equals, _ in (pair.partition("=") for pair in query.split("&"))
    )
    return (
        f"{scheme}://{place}{slash}{path}"
        + (f"?{hidden}" if has_query else "")
        + ("#***" if has_fragment else "")
    )
