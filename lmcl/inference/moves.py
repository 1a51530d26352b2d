"""Move images aside and put them back: nothing is written over, and every move is on record.

A line of `moves.csv` is on disk before its file is moved, so that a killed process leaves no file
without a trace. A target that appears meanwhile is never replaced, whoever made it.
"""

import csv
import ctypes
import errno
import filecmp
import io
import json
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

from lmcl.errors import LmclError
from lmcl.inference.inputs import MOVES_COLUMNS, MOVES_NAME, is_moves_file, resolver
from lmcl.inference.scores_file import read_note, write_note
from shards.files import atomic_write, sync, temporary_beside
from shards.source_files import MAX_TABLE_BYTES, open_regular
from shards.text import printable

MOVES_KEY = "moves"
"""In a scores file's note: the records of its moves, as a JSON list."""
_HEADER = ",".join(MOVES_COLUMNS) + "\n"
_NOWHERE = "it is a link that would lead nowhere from there"
_HERE, _NO_REPLACE = -100, 1  # AT_FDCWD, RENAME_NOREPLACE
_NOT_BY_RENAME = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_NOT_BY_LINK = (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One image to be moved aside."""

    source: Path
    target: Path
    quality: float
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class MoveOutcome:
    """What became of a move."""

    move: Move
    problem: str = ""
    """Why the file was left where it is; empty if it was moved."""


@dataclass(frozen=True)
class MoveRecord:
    """A line of `moves.csv`."""

    old: str
    """Where the file lay: absolute, its folder without links."""
    new: str
    score: str
    size: int
    """Bytes of the file; -1 for a link."""
    mtime_ns: int
    """When it was last written; -1 for a link."""
    link: str
    """What a link led to, as it was spelled."""


def carry_out(moves: Sequence[Move], folder: Path) -> Iterator[MoveOutcome]:
    """Move files into `folder` one by one, each on record in its `moves.csv`; links come last.

    A target that is taken gets a number. A link that would lead nowhere from its new place stays,
    as does what would leave `folder` through a link.

    Raises:
        LmclError: If `folder` holds a `moves.csv` that is no record of moves (exit code 2).
    """
    if not moves:
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = _Recorder(folder / MOVES_NAME)
    # What a link leads to may be moved as well, and the link then leads to its new place.
    ordered = sorted(moves, key=lambda move: move.source.is_symlink())
    for move in ordered:
        yield _carry_out(move, folder, record)


def _carry_out(move: Move, folder: Path, record: "_Recorder") -> MoveOutcome:
    try:
        if finished := record.finish(move):
            return MoveOutcome(move=finished)
        move.target.parent.mkdir(parents=True, exist_ok=True)
        if not move.target.parent.resolve().is_relative_to(folder.resolve()):
            return MoveOutcome(move=move, problem=f"a link leads out of {folder}")
        final = _final_target(move.source, record) if move.source.is_symlink() else ""
        number, target = 1, move.target
        while True:
            if not os.path.lexists(target):
                done = Move(
                    source=move.source, target=target, quality=move.quality, score=move.score
                )
                record.write(done)
                try:
                    _move(done, final)
                    return MoveOutcome(move=done)
                except FileExistsError:
                    pass
            number += 1
            target = numbered(move.target, number)
    except OSError as error:
        return MoveOutcome(move=move, problem=error.strerror or str(error))


def numbered(target: Path, number: int) -> Path:
    """Another name for a target that is taken."""
    return target.with_name(f"{target.stem}-{number}{target.suffix}")


def undo_moves(file: Path) -> Iterator[MoveOutcome]:
    """Put back what a `moves.csv` says was moved, and is still there as it was; links come last.

    Nothing is written over: what lies at the old place stays, and so does the moved file.

    Raises:
        LmclError: If it is no record of moves (exit code 3), or missing (4).
    """
    check_record(file)
    inside = os.path.join(os.path.realpath(file.parent), "")
    latest = {record.new: record for record in read_moves(file)}
    records = sorted(latest.values(), key=lambda record: bool(record.link))
    # A link may lead to one that comes later: what leads nowhere yet is tried again.
    count = -1
    while len(records) != count:
        count, waiting = len(records), []
        for record in records:
            outcome = _undo(record, inside)
            if outcome is not None and outcome.problem == _NOWHERE:
                waiting.append(record)
            elif outcome is not None:
                yield outcome
        records = waiting
    for record in records:
        outcome = _undo(record, inside, respell=True)
        if outcome is not None:
            yield outcome


def _undo(record: MoveRecord, inside: str, *, respell: bool = False) -> MoveOutcome | None:
    """Put one file back, a link also by another spelling if asked; None if it is back already."""
    move = Move(source=Path(record.new), target=Path(record.old), quality=0.0)
    if not os.path.lexists(record.new):
        if os.path.lexists(record.old):
            return None
        return MoveOutcome(move=move, problem="is at neither place")
    if not record.new.startswith(inside):
        return MoveOutcome(move=move, problem=f"lies outside {inside}")
    return _put_back(record, move, respell=respell)


def check_record(file: Path) -> None:
    """Refuse what is no record of moves.

    Raises:
        LmclError: If it is another file (exit code 3), or missing (4).
    """
    if not os.path.exists(file):
        raise LmclError(
            f"{printable(file)}: there is no such file; `--move-to FOLDER` writes "
            f"FOLDER/{MOVES_NAME}",
            exit_code=4,
        )
    if not is_moves_file(file):
        raise LmclError(
            f"{printable(file)}: is no record of moves; name the {MOVES_NAME} in the folder of "
            "--move-to",
            exit_code=3,
        )


def _put_back(record: MoveRecord, move: Move, *, respell: bool) -> MoveOutcome:
    try:
        if not record.link and _stat(move.source) != (record.size, record.mtime_ns):
            return MoveOutcome(move=move, problem="is not the file that was moved there")
        if bool(record.link) != move.source.is_symlink():
            return MoveOutcome(move=move, problem="is not the link that was moved there")
        if not os.path.isdir(move.target.parent):
            return MoveOutcome(move=move, problem=f"the folder {move.target.parent} is gone")
        if record.link:
            texts = (record.link, os.readlink(move.source)) if respell else (record.link,)
            _move_link(move.source, move.target, texts=texts)
        else:
            rename_no_replace(move.source, move.target)
    except FileExistsError:
        if not record.link and _is_copy(move.source, move.target):
            move.source.unlink()  # a killed process had come as far as the copy
            return MoveOutcome(move=move)
        return MoveOutcome(move=move, problem="its old place is taken")
    except OSError as error:
        return MoveOutcome(move=move, problem=error.strerror or str(error))
    return MoveOutcome(move=move)


def _is_copy(first: Path, second: Path) -> bool:
    return (
        _stat(first) == _stat(second)
        and first.is_file()
        and filecmp.cmp(first, second, shallow=False)
    )


def rename_no_replace(source: Path, target: Path) -> None:
    """Move a file, on the same file system or not, unless something lies at its target.

    Raises:
        FileExistsError: If something does, also a link that leads nowhere.
        OSError: If it cannot be moved; the source is as it was.
    """
    if _rename(source, target) or _link(source, target):
        return
    # Another file system: whole under a temporary name first, so that no target is ever half.
    temporary = temporary_beside(target)
    try:
        with open(source, "rb") as read, open(temporary, "xb") as write:
            shutil.copyfileobj(read, write, 1 << 20)
        shutil.copystat(source, temporary)
        sync(temporary)
        if not (_rename(temporary, target) or _link(temporary, target)):
            raise OSError(errno.ENOTSUP, "the file system can name a file only by replacing")
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)
    source.unlink()


def read_moves(file: Path) -> list[MoveRecord]:
    """The lines of a `moves.csv` that are whole."""
    with open_regular(file, limit_bytes=MAX_TABLE_BYTES) as opened:
        text = io.TextIOWrapper(opened, encoding="utf-8", errors="surrogateescape", newline="")
        records = []
        try:
            for row in csv.DictReader(text):
                if None in row or None in row.values():
                    continue  # torn: its file was not moved yet
                old, new, score, size, mtime_ns, link = (row[name] for name in MOVES_COLUMNS)
                records.append(MoveRecord(old, new, score, int(size), int(mtime_ns), link))
        except (ValueError, KeyError, csv.Error) as error:
            raise LmclError(
                f"{printable(file)}: cannot be read as a record of moves ({printable(error)}); "
                "restore it, or move the files by hand",
                exit_code=3,
            ) from error
    return records


def remember_moves(output: Path, folder: Path) -> None:
    """Note beside a scores file where its moves are on record, so that `--resume` finds them."""
    note = read_note(output)
    file = os.path.realpath(folder / MOVES_NAME)
    files = _noted(note)
    if file not in files:
        write_note(output, note | {MOVES_KEY: json.dumps([*files, file])})


def recorded_moves(output: Path) -> dict[str, str]:
    """Where the images of a scores file have been moved: new place by old place."""
    moves: dict[str, str] = {}
    for file in map(Path, _noted(read_note(output))):
        if is_moves_file(file):
            moves |= {record.old: record.new for record in read_moves(file)}
    return moves


def _noted(note: dict[str, str]) -> list[str]:
    try:
        files = json.loads(note.get(MOVES_KEY, "[]"))
    except (ValueError, RecursionError):
        return []
    return [file for file in files if isinstance(file, str)] if isinstance(files, list) else []


class _Recorder:
    """Appends to a `moves.csv`, line by line and durably; a torn end is taken off first."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._resolve = resolver()
        self._records: dict[str, MoveRecord] = {}
        if os.path.lexists(file):
            self._records = self._reopen()
        else:
            _write_records(file, [])

    def write(self, move: Move) -> None:
        """Record a move that is about to be made."""
        is_link = move.source.is_symlink()
        size, mtime_ns = (-1, -1) if is_link else _stat(move.source)
        record = MoveRecord(
            self._resolve(str(move.source)),
            self._resolve(str(move.target)),
            "" if move.score is None else repr(move.score),
            size,
            mtime_ns,
            os.readlink(move.source) if is_link else "",
        )
        # Recorded by a process that was killed before it could move it.
        if self._records.get(record.old) == record:
            return
        self._records[record.old] = record
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(handle, _line(record))
            os.fsync(handle)
        finally:
            os.close(handle)

    def finish(self, move: Move) -> Move | None:
        """Take away a source that a killed process had copied to its target already."""
        record = self._records.get(self._resolve(str(move.source)))
        if record is None or record.link or move.source.is_symlink():
            return None
        if _stat(move.source) != (record.size, record.mtime_ns):
            return None
        if not _is_copy(move.source, Path(record.new)):
            return None
        move.source.unlink()
        return Move(
            source=move.source,
            target=Path(record.new),
            quality=move.quality,
            score=move.score,
        )

    def new_place(self, old: str) -> str | None:
        """Where a file was moved that lay at `old`, if it is there."""
        record = self._records.get(old)
        return record.new if record is not None and os.path.lexists(record.new) else None

    def _reopen(self) -> dict[str, MoveRecord]:
        if not is_moves_file(self._file):
            raise LmclError(
                f"{printable(self._file)}: is no record of moves, which would be written there; "
                "move it elsewhere, or choose another --move-to",
                exit_code=2,
            )
        records = read_moves(self._file)
        whole = b"".join([_HEADER.encode(), *map(_line, records)])
        if whole != self._file.read_bytes():
            _write_records(self._file, records)
        return {record.old: record for record in records}


def _write_records(file: Path, records: Sequence[MoveRecord]) -> None:
    with atomic_write(file) as out:
        out.write(_HEADER.encode())
        out.writelines(map(_line, records))


def _line(record: MoveRecord) -> bytes:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerow(astuple(record))
    return out.getvalue().encode("utf-8", "surrogateescape")


def _final_target(link: Path, record: _Recorder) -> str:
    """The file a link leads to, where it lies now."""
    final = os.path.realpath(link)
    if not os.path.exists(final):
        final = record.new_place(final) or final
    if not os.path.exists(final):
        raise FileNotFoundError(errno.ENOENT, "it is a link that leads nowhere")
    return final


def _move(move: Move, final: str) -> None:
    if not move.source.is_symlink():
        rename_no_replace(move.source, move.target)
        return
    text = os.readlink(move.source)
    # Moved as it is, a relative link would lead elsewhere.
    absolute = os.path.join(os.path.realpath(move.source.parent), text)
    # A link to a link would break when that one is moved.
    texts = (final,) if os.path.islink(absolute) else (absolute, final)
    _move_link(move.source, move.target, texts=texts)


def _move_link(source: Path, target: Path, *, texts: Sequence[str]) -> None:
    """A link at `target` with the first text by which it leads to a file, instead of `source`."""
    for text in texts:
        os.symlink(text, target)
        if os.path.exists(target):
            source.unlink()
            return
        target.unlink()
    raise FileNotFoundError(errno.ENOENT, _NOWHERE)


def _rename(source: Path, target: Path) -> bool:
    """Rename in one step unless there is a target; False where the system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(source), _HERE, os.fsencode(target), _NO_REPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (*_NOT_BY_RENAME, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(source), None, str(target))


def _link(source: Path, target: Path) -> bool:
    """A second name for the file, then the first one off; False where the system cannot."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno in _NOT_BY_LINK:
            return False
        raise
    source.unlink()
    return True


def _stat(path: Path) -> tuple[int, int]:
    try:
        found = path.lstat()
    except OSError:
        return -1, -1
    if not stat.S_ISREG(found.st_mode):
        return -2, -2
    return found.st_size, found.st_mtime_ns
