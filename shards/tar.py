"""Deterministic tar files, and a reader that believes nothing a tar file says.

Written members carry no time, owner or machine, so equal samples make equal bytes. The reader is
the one place where tars are read: for verification (`read_members`), and for tars of others
(`iterate_members`). It never extracts to disk, and every size, name and chain of headers is bounded
before anything is read: `tarfile` of the standard library recurses over chained long names and
believes sizes.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from shards.errors import ShardError
from shards.text import printable

BLOCK = 512
_NAME = 100
_MOST = 1 << 33
# Up to here joining header and bytes is cheaper than two calls to the stream and the hash.
_SMALL = 1 << 16
_TAIL = b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
_END = b"\0" * (2 * BLOCK)
_REGULAR = frozenset({b"0", b"\0", b"7"})
_FOLDER = b"5"
# Programs fill the last record of 20 blocks with zeros.
_RECORD_BLOCKS = 20
# A long name, a long link (GNU); headers for the next member and for all (POSIX, Solaris).
_EXTENSIONS = frozenset({b"L", b"K", b"x", b"X", b"g"})
_PLACES = frozenset({b"path", b"size"})
# Three stand before a member at most: a long name, a long link, a pax header.
_MOST_EXTENSIONS = 16
_MOST_EXTENSION = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Member:
    """One regular file inside a tar."""

    name: str
    """Its name, as stored."""
    offset: int
    """Where its bytes start, counted from the start of the tar."""
    size: int
    """How many bytes it has."""


class TarWriter:
    """Writes members to a stream and hashes what it writes; `close` ends the archive."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self._padding = b""
        self.size_bytes = 0

    def add(self, name: str, data: bytes) -> Member:
        """Append one member.

        Raises:
            ValueError: If the name does not fit a plain tar header.
        """
        head = self._padding + _header(name, len(data))
        offset = self.size_bytes + len(head)
        if len(data) < _SMALL:
            self._write(head + data)
        else:
            self._write(head)
            self._write(data)
        self._padding = b"\0" * (-len(data) % BLOCK)
        return Member(name=name, offset=offset, size=len(data))

    def close(self) -> str:
        """Write the end of the archive; returns the sha256 of everything written."""
        self._write(self._padding + _END)
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._stream.write(data)
        self._hash.update(data)
        self.size_bytes += len(data)


def _header(name: str, size: int) -> bytes:
    """A ustar header, field by field: four times as fast as the general one in `tarfile`."""
    stored = name.encode("ascii")
    if not 0 < len(stored) <= _NAME or not 0 <= size < _MOST:
        raise ValueError(f"{name!r} of {size:,} bytes does not fit a plain tar header")
    # Name; mode 644, owner 0, group 0; size; time 0.
    head = stored.ljust(_NAME, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size
    head += b"0" * 11 + b"\0"
    checksum = sum(head) + 8 * ord(" ") + sum(_TAIL)
    return head + b"%06o\0 " % checksum + _TAIL


def read_members(
    stream: BinaryIO, *, size_bytes: int, where: str, hand_made: bool = False
) -> Iterator[Member]:
    """The members of a shard in order, checked against the size of the file.

    Only regular files with relative names are accepted: links, devices, absolute names and names
    that climb out of the folder have no business in a shard, and an end must be there.

    Args:
        stream: The tar.
        size_bytes: Size of the file.
        where: Its name, for messages.
        hand_made: Whether it may hold folders, as `tar cf x.tar folder/` makes them: they are
            passed over. A second archive behind the end is refused, as its members would be
            left out.

    Raises:
        ShardError: On any damage or hostile member, naming it and its place.
    """
    end = 0
    for entry in _entries(stream, size_bytes, where):
        if hand_made and entry.is_folder:
            end = entry.offset + entry.size
            continue
        if not entry.is_file:
            raise _damaged(
                where,
                f"member {printable(entry.name)!r} is not a regular file (type {entry.kind!r}); a "
                "shard holds only plain files",
            )
        _refuse_climbing(entry.name, where)
        yield Member(name=entry.name, offset=entry.offset, size=entry.size)
        end = entry.offset + entry.size
    _check_end(stream, end, size_bytes, where)
    if hand_made:
        _refuse_second(stream, end, where)


def iterate_members(stream: BinaryIO, *, size_bytes: int, where: str) -> Iterator[Member]:
    """The regular files of anyone's tar in order; folders, links and devices are passed over.

    Names are as stored (bytes that are no UTF-8 as surrogates) and must not be used as paths. What
    was listed before a damage is sound.

    Raises:
        ShardError: On damage, a forged size, or headers that would cost more than they are worth.
    """
    for entry in _entries(stream, size_bytes, where):
        if entry.is_file:
            yield Member(name=entry.name, offset=entry.offset, size=entry.size)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One header block with what the extension headers before it say."""

    name: str
    kind: bytes
    offset: int
    size: int
    is_file: bool
    is_folder: bool


@dataclass(kw_only=True)
class _Extension:
    """What extension headers say about the next member; at most a few stand before one."""

    count: int = 0
    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


def _entries(stream: BinaryIO, size_bytes: int, where: str) -> Iterator[_Entry]:
    at, extension = 0, _Extension()
    while (block := _block(stream, at, size_bytes, where)) is not None:
        kind = block[156:157]
        is_extension = kind in _EXTENSIONS
        size = _number(block[124:136], where, at)
        if extension.size is not None and not is_extension:
            size = extension.size
        start = at + BLOCK + (_sparse_map_bytes(stream, at, block) if kind == b"S" else 0)
        # As in `tarfile`: links, devices, folders and FIFOs have no bytes, whatever their size.
        held = 0 if kind in b"123456" else size
        if held < 0 or start + held > size_bytes:
            raise _damaged(
                where,
                f"member {printable(_name(block, extension))!r} claims {size:,} bytes from byte "
                f"{start:,}, the file has {size_bytes:,}: truncated or forged",
            )
        if is_extension:
            _extend(extension, kind, _extension_body(stream, at, size, where), where=where, at=at)
        else:
            yield _entry(block, extension, offset=start, size=held)
            extension = _Extension()
        at = start + -(-held // BLOCK) * BLOCK


def _entry(block: bytes, extension: _Extension, *, offset: int, size: int) -> _Entry:
    name, kind = _name(block, extension), block[156:157]
    # Before there was a type for folders, a slash told them.
    is_plain = kind in _REGULAR and not extension.is_sparse
    is_folder = kind == _FOLDER or (is_plain and name.endswith("/"))
    is_file = is_plain and not is_folder
    return _Entry(
        name=name, kind=kind, offset=offset, size=size, is_file=is_file, is_folder=is_folder
    )


def _sparse_map_bytes(stream: BinaryIO, at: int, block: bytes) -> int:
    """Bytes of the blocks that go on with a sparse file's map (old GNU format)."""
    more, held = block[482:483], 0
    while more not in (b"", b"\0"):
        held += BLOCK
        stream.seek(at + held)
        more = stream.read(BLOCK)[504:505]
    return held


def _block(stream: BinaryIO, at: int, size_bytes: int, where: str) -> bytes | None:
    """The header block at `at`, its checksum right; None at the end of the archive."""
    stream.seek(at)
    block = stream.read(BLOCK)
    if at and (not block or at >= size_bytes):
        return None
    if len(block) < BLOCK:
        what = "not a tar file" if not at else f"the tar is damaged after byte {at:,}"
        raise _damaged(where, f"{what} (it ends inside a header)")
    if not block.strip(b"\0"):
        return None
    written = _number(block[148:156], where, at)
    # Some old programs added signed bytes.
    plain = sum(block) - sum(block[148:156]) + 8 * ord(" ")
    if written != plain and written != plain - 256 * _count_high(block):
        what = "not a tar file" if not at else f"the tar is damaged after byte {at:,}"
        raise _damaged(where, f"{what} (a header's checksum does not fit); build it again")
    return block


def _count_high(block: bytes) -> int:
    """Bytes of a header, its checksum left out, that are negative where bytes are signed."""
    return sum(byte > 127 for byte in block[:148] + block[156:])


def _number(stored: bytes, where: str, at: int) -> int:
    """A number of a header: octal text, or base 256 if the first bit is set (GNU)."""
    if stored[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(stored[1:], "big", signed=False) - (
            256 ** (len(stored) - 1) if stored[:1] == b"\xff" else 0
        )
    digits = stored.partition(b"\0")[0].strip()
    if not digits:
        return 0
    if not digits.isdigit() or set(digits) & set(b"89"):
        what = "not a tar file" if not at else f"the tar is damaged after byte {at:,}"
        raise _damaged(where, f"{what} (a header's number is {printable(digits)!r})")
    return int(digits, 8)


def _name(block: bytes, extension: _Extension) -> str:
    if extension.name is not None:
        return extension.name
    name = block[:_NAME].partition(b"\0")[0]
    # GNU's own format keeps times where POSIX keeps the beginning of a long name.
    prefix = block[345:500].partition(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _decoded(prefix + b"/" + name if prefix else name)


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _extension_body(stream: BinaryIO, at: int, size: int, where: str) -> bytes:
    if size > _MOST_EXTENSION:
        raise _damaged(
            where,
            f"an extension header at byte {at:,} of {size:,} bytes, more than the "
            f"{_MOST_EXTENSION:,} that are read; refused",
        )
    stream.seek(at + BLOCK)
    return stream.read(size)


def _extend(extension: _Extension, kind: bytes, body: bytes, *, where: str, at: int) -> None:
    extension.count += 1
    if extension.count > _MOST_EXTENSIONS:
        raise _damaged(
            where,
            f"more than {_MOST_EXTENSIONS} extension headers before one member, up to byte {at:,}; "
            "refused",
        )
    if kind == b"L":
        extension.name = _decoded(body.partition(b"\0")[0])
    elif kind in b"xXg":
        records = _pax_records(body, where, at)
        if kind == b"g":
            # A name or a size for all members that follow: readers disagree about what is where.
            if any(key in _PLACES or key.startswith(b"GNU.sparse.") for key in records):
                raise _damaged(where, f"the global header at byte {at:,} names a member; refused")
            return
        _apply_pax(extension, records, where=where, at=at)


def _apply_pax(extension: _Extension, records: dict[bytes, bytes], *, where: str, at: int) -> None:
    if b"path" in records:
        extension.name = _decoded(records[b"path"].partition(b"\0")[0])
    if b"size" in records:
        if not records[b"size"].isdigit() or len(records[b"size"]) > 20:
            raise _damaged(
                where,
                f"the header at byte {at:,} claims {printable(records[b'size'], 40)!r} bytes; "
                "refused",
            )
        extension.size = int(records[b"size"])
    if any(key.startswith(b"GNU.sparse.") for key in records):
        extension.is_sparse = True


def _pax_records(body: bytes, where: str, at: int) -> dict[bytes, bytes]:
    """`LENGTH KEY=VALUE` and a newline, one after the other; LENGTH counts all of it."""
    records, start = dict[bytes, bytes](), 0
    while start < len(body) and body[start] != 0:
        length, space, _ = body[start : start + 21].partition(b" ")
        end = start + int(length) if space and length.isdigit() else 0
        key, equals, value = body[start + len(length) + 1 : max(end, start)].partition(b"=")
        if not equals or end > len(body) or not value.endswith(b"\n"):
            raise _damaged(where, f"the pax header at byte {at:,} is damaged")
        records[key] = value[:-1]
        start = end
    return records


def _refuse_climbing(name: str, where: str) -> None:
    parts = name.replace("\\", "/").split("/")
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        raise _damaged(where, f"member {printable(name)!r} points outside the shard; refused")


def _check_end(stream: BinaryIO, end: int, size_bytes: int, where: str) -> None:
    """A tar cut at a member's border reads well to its last member; the end blocks tell."""
    padded = -(-end // BLOCK) * BLOCK
    stream.seek(padded)
    tail = stream.read(2 * BLOCK)
    if tail != _END:
        raise _damaged(
            where,
            f"the end-of-archive blocks are missing at byte {padded:,} of {size_bytes:,}: "
            "truncated or damaged; build it again",
        )


def _refuse_second(stream: BinaryIO, end: int, where: str) -> None:
    """Refuse an archive that was joined to another by `cat`: readers stop at the first one's end.

    Only the record that holds the end, and the block behind it, are looked at.
    """
    first = -(-end // BLOCK) * BLOCK + len(_END)
    stream.seek(first)
    rest = stream.read((_RECORD_BLOCKS + 1) * BLOCK)
    for start in range(0, len(rest) - BLOCK + 1, BLOCK):
        if rest[start + 257 : start + 262] == b"ustar":
            raise _damaged(
                where,
                f"a second archive begins at byte {first + start:,}, behind the end of the first; "
                "join tars by `tar --concatenate --file ONE.tar OTHER.tar`, or give each its own "
                "file",
            )


def _damaged(where: str, reason: str) -> ShardError:
    return ShardError(f"{printable(where)}: {reason}", exit_code=3)
