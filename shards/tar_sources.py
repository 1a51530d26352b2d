"""Which tars a text stands for: a file, a folder, a pattern, braces, `A::B`, `@list.txt`, `-`.

The spellings are those of the webdataset package and of shells. Tars are found in sub-folders too,
and each has a name that tells it from all others: its path below the folder they share. A
compressed tar is named with the command that unpacks it, since members are read in place.
"""

import glob
import itertools
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from shards.errors import ShardError
from shards.side_files import is_side_folder
from shards.source_files import need_regular, open_regular, text_lines
from shards.text import printable

COMPRESSED_TARS: Final = (
    *(".tar.gz", ".tgz", ".tar.zst", ".tzst", ".tar.xz", ".txz"),
    *(".tar.bz2", ".tbz2", ".tbz"),
)
"""Endings of compressed tars."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,9})\.\.(\d{1,9})(?:\.\.(\d{1,9}))?")
_MOST_TARS = 1_000_000
_MOST_DEPTH = 64
_NAMED = 5
# First bytes, name, command that unpacks beside the file, command that writes to standard output.
_KINDS = (
    (b"\x1f\x8b", "gzip", "gunzip -k", "gzip -dc", (".gz", ".tgz")),
    (b"BZh", "bzip2", "bunzip2 -k", "bzip2 -dc", (".bz2", ".tbz2", ".tbz")),
    (b"\xfd7zXZ", "xz", "unxz -k", "xz -dc", (".xz", ".txz")),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dk", "zstd -dc", (".zst", ".tzst")),
)


@dataclass(frozen=True, kw_only=True)
class TarSource:
    """One tar that was found."""

    path: Path
    """Where it lies."""
    name: str
    """Its path below the folder that all share, without `.tar`; unique, with `/`."""


def find_tars(source: str, *, stdin: Iterable[str] = ()) -> list[TarSource]:
    """The tars a text stands for, in order.

    Args:
        source: As in the description of this module.
        stdin: Lines for `-`.

    Raises:
        ShardError: If there is none, one is missing or compressed, or a list cannot be read.
    """
    places = list(expand_names(source, stdin=stdin))
    found: dict[Path, None] = {}
    for place in places:
        found.update(dict.fromkeys(_at(place)))
    if not found:
        raise ShardError(
            f"{printable(source)}: no .tar file is here or in a folder below", exit_code=4
        )
    for path in found:
        need_regular(path, what="give a folder of tars, a tar, or a pattern")
    refuse_compressed([path for path in found if _head_kind(path)])
    alone = len(places) == 1 and os.path.isdir(places[0])
    folder = places[0] if alone else os.path.commonpath([path.parent.absolute() for path in found])
    base = os.path.abspath(folder)
    return [TarSource(path=path, name=_name(path, base)) for path in found]


def expand_names(text: str, *, stdin: Iterable[str] = ()) -> Iterator[str]:
    """What `::`, `@list.txt`, `-` and braces stand for; a file of exactly this name is itself.

    Lines of a list are looked for beside the list first.

    Raises:
        ShardError: If a list is missing, or braces stand for too many names.
    """
    if os.path.lexists(text):
        yield text
        return
    for part in text.split("::"):
        if part == "-":
            for line in _lines(stdin):
                yield from expand_braces(line)
        elif part.startswith("@") and not os.path.lexists(part):
            yield from _from_list(Path(part[1:]))
        elif part:
            yield from expand_braces(part)


def expand_braces(text: str) -> list[str]:
    """A text with `{000..012}` and `{a,b}` written out as a shell does; each result once.

    Raises:
        ShardError: If it stands for more than a million names (exit code 2).
    """
    done, open_ = dict[str, None](), [text]
    while open_:
        one = open_.pop()
        match = next((m for m in _BRACES.finditer(one) if _options(m[1], text)), None)
        if match is None:
            done[one] = None
        else:
            options = _options(match[1], text)
            head, tail = one[: match.start()], one[match.end() :]
            # Last in, first out: the first option is finished first.
            open_ += [f"{head}{option}{tail}" for option in reversed(options)]
        if len(done) + len(open_) > _MOST_TARS:
            raise _too_many(text)
    return list(done)


def compression_of(head: bytes) -> str:
    """The name of the compression that bytes begin with; empty if there is none."""
    return next((name for magic, name, *_ in _KINDS if head.startswith(magic)), "")


def unpack_command(paths: Sequence[Path]) -> str:
    """A shell command that makes plain tars of compressed ones, all of one kind."""
    _, _, beside, to_stdout, endings = next(k for k in _KINDS if k[1] == _kind_of(paths[0]))
    if not paths[0].name.lower().endswith(endings):
        one, other = shlex.quote(str(paths[0])), shlex.quote(f"{paths[0]}.plain")
        return f"{to_stdout} {one} > {other} && mv {other} {one}"
    if len(paths) <= _NAMED:
        return f"{beside} {shlex.join(map(str, paths))}"
    folder = shlex.quote(os.path.commonpath([path.parent for path in paths]))
    ending = endings[0] if paths[0].name.lower().endswith(endings[0]) else paths[0].suffix
    return f"find {folder} -name '*{ending}' -exec {beside} {{}} +"


def refuse_compressed(paths: Sequence[Path]) -> None:
    """Refuse compressed tars with the command that unpacks them.

    Raises:
        ShardError: If there is one.
    """
    if not paths:
        return
    kind = _kind_of(paths[0])
    alike = [path for path in paths if _kind_of(path) == kind]
    more = f" (and {len(alike) - 1:,} others)" if len(alike) > 1 else ""
    raise ShardError(
        f"{printable(paths[0])}{more}: {kind}-compressed; members are read in place, so unpack it "
        f"first: `{unpack_command(alike)}`",
        exit_code=3,
    )


def plain_twin(path: Path) -> Path | None:
    """What unpacking a compressed tar beside itself makes; None if it is called otherwise."""
    lower = path.name.lower()
    for ending in COMPRESSED_TARS:
        if lower.endswith(ending):
            return path.with_name(path.name[: -len(ending)] + ".tar")
    return None


def _kind_of(path: Path) -> str:
    kind = _head_kind(path)
    endings = ((name, endings) for _, name, _, _, endings in _KINDS)
    return kind or next(name for name, ends in endings if path.name.lower().endswith(ends))


def _head_kind(path: Path) -> str:
    with open_regular(path, limit_bytes=1 << 62) as stream:
        return compression_of(stream.read(8))


def _at(place: str) -> Iterator[Path]:
    """Tars at one place: the file, those of a folder, those that fit a pattern."""
    if os.path.isdir(place):
        yield from _below(Path(place))
    elif not os.path.lexists(place) and glob.has_magic(place):
        for match in sorted(glob.glob(place, recursive=True)):
            yield from _below(Path(match)) if os.path.isdir(match) else (Path(match),)
    else:
        yield Path(place)


def _below(folder: Path, depth: int = _MOST_DEPTH) -> Iterator[Path]:
    """Tars of a folder by name, then those of its folders; links to folders are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise ShardError(f"{printable(folder)}: cannot be listed ({error.strerror})") from error
    shown = [entry for entry in entries if not entry.name.startswith(".")]
    for entry in shown:
        path = Path(entry.path)
        lower = entry.name.lower()
        if lower.endswith(".tar") and not entry.is_dir():
            yield path
        elif lower.endswith(COMPRESSED_TARS) and not entry.is_dir():
            twin = plain_twin(path)
            # Unpacked beside itself it is there once, not twice.
            if twin is None or not twin.exists():
                yield path
    for entry in shown:
        if depth and entry.is_dir(follow_symlinks=False) and not is_side_folder(entry.name):
            yield from _below(Path(entry.path), depth - 1)


def _from_list(path: Path) -> Iterator[str]:
    need_regular(path, what="after @ stands the name of a text file that lists tars, one a line")
    for line in _lines(text_lines(path)):
        beside = os.path.join(path.parent, line)
        yield from expand_braces(beside if os.path.lexists(beside) else line)


def _lines(lines: Iterable[str]) -> Iterator[str]:
    for line in itertools.islice(lines, _MOST_TARS):
        text = line.strip()
        if text and not text.startswith("#"):
            yield text


def _options(inside: str, whole: str) -> list[str]:
    """What stands between braces as a list; empty if they mean nothing and are part of a name."""
    numbers = _RANGE.fullmatch(inside)
    if numbers is None:
        return inside.split(",") if "," in inside else []
    first, last, step = int(numbers[1]), int(numbers[2]), max(1, int(numbers[3] or 1))
    if abs(last - first) // step >= _MOST_TARS:
        raise _too_many(whole)
    counted = range(first, last + 1, step) if last >= first else range(first, last - 1, -step)
    return [f"{number:0{len(numbers[1])}d}" for number in counted]


def _too_many(text: str) -> ShardError:
    return ShardError(
        f"{printable(text)}: more than {_MOST_TARS:,} tars; name them by a folder or by `*`",
        exit_code=2,
    )


def _name(path: Path, base: str) -> str:
    relative = os.path.relpath(path.absolute(), base)
    return Path(relative).as_posix().removesuffix(".tar")
