"""Label files that other programs' formats need much code for, read in a process of their own.

MATLAB files, workbooks and Parquet are parsed by code in C or by deep stacks of Python; a damaged
or hostile file can end the process, take all memory, or never finish. So a child reads them, with
limits on memory, processor time and files, and hands back plain values (`msgpack`); whatever
becomes of the child is one sentence here. The child ends with its parent.
"""

import contextlib
import fcntl
import importlib
import json
import os
import resource
import select
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec

from shards.errors import ShardError
from shards.processes import end_with_parent
from shards.source_files import MAX_FILE_BYTES, need_regular, open_regular
from shards.text import printable

_MEMORY = 3 << 30
_SILENCE_S = 300
"""So long may a child take for one answer before it is given up (a loaded machine is slow)."""
_MOST_ANSWER = 256 << 20
_PIPE_BYTES = 1 << 20
_HEAD = struct.Struct("<cQ")
_CODE = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from shards.datasets.foreign import serve; serve(*sys.argv[2:])"
)

Reader = Callable[[Path, Any], Iterator[Any]]


def read_in_child(
    reader: str, path: Path, options: object = None, *, limit_bytes: int = MAX_FILE_BYTES
) -> Iterator[Any]:
    """What `reader(path, options)` yields, computed in a child process with limits.

    Args:
        reader: `module:function`; the function yields plain values (numbers, texts, lists, dicts).
        path: A regular file.
        options: Plain values for it.
        limit_bytes: Most bytes the file may have.

    Raises:
        ShardError: What the reader raised; or that the child was ended by a signal, needed too much
            memory or time, or gave no answer.
    """
    need_regular(path, what="give a file")
    with open_regular(path, limit_bytes=limit_bytes) as stream:
        size = os.fstat(stream.fileno()).st_size
    arguments = [json.dumps(sys.path), reader, os.fspath(path), json.dumps(options), str(size)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _CODE, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    ) as child:
        _widen(child.stdout)
        try:
            yield from _answers(child, path)
        finally:
            child.kill()


def _widen(pipe: IO[bytes] | None) -> None:
    """Let the child read ahead while answers are used: a pipe of 64 kB holds no photograph."""
    set_size = getattr(fcntl, "F_SETPIPE_SZ", None)
    if pipe is not None and set_size is not None:
        # Refused to a user who has many pipes open; then it only waits more often.
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, set_size, _PIPE_BYTES)


def _answers(child: "subprocess.Popen[bytes]", path: Path) -> Iterator[Any]:
    assert child.stdout is not None
    while True:
        head = _read(child.stdout, _HEAD.size, path)
        if len(head) < _HEAD.size:
            raise _ended(child, path)
        kind, size = _HEAD.unpack(head)
        if size > _MOST_ANSWER:
            raise ShardError(f"{printable(path)}: one row of it is {size:,} bytes", exit_code=3)
        body = _read(child.stdout, size, path)
        if len(body) < size:
            raise _ended(child, path)
        if kind == b"E":
            return
        value = msgspec.msgpack.decode(body)
        if kind == b"X":
            raise ShardError(value[0], exit_code=value[1])
        yield value


def _read(stream: IO[bytes], size: int, path: Path) -> bytes:
    data = bytearray()
    while len(data) < size:
        ready, _, _ = select.select([stream], [], [], _SILENCE_S)
        if not ready:
            raise ShardError(
                f"{printable(path)}: reading it took more than {_SILENCE_S} s without a row; is it "
                "damaged?",
                exit_code=3,
            )
        part = os.read(stream.fileno(), size - len(data))
        if not part:
            break
        data += part
    return bytes(data)


def _ended(child: "subprocess.Popen[bytes]", path: Path) -> ShardError:
    code = child.wait(timeout=_SILENCE_S)
    if code == -signal.SIGXCPU:
        how = "took too long"
    elif code < 0:
        how = f"ended the process that did it ({signal.Signals(-code).name})"
    else:
        how = f"ended early (status {code})"
    return ShardError(
        f"{printable(path)}: reading it {how}; the file is damaged, or made to do harm: unpack it "
        "again",
        exit_code=3,
    )


def serve(reader: str, path: str, options: str, size: str) -> None:
    """The child: set limits, read, answer on standard output."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "wb")
    # A library's print must not stand between two answers.
    os.dup2(2, 1)
    _limit(int(size))
    module, _, function = reader.partition(":")
    try:
        read: Reader = getattr(importlib.import_module(module), function)
        for value in read(Path(path), json.loads(options)):
            _answer(answers, b"V", value)
        _answer(answers, b"E", None)
    except ShardError as error:
        _answer(answers, b"X", [str(error), error.exit_code])
    except MemoryError:
        _answer(answers, b"X", [f"{printable(path)}: reading it takes too much memory", 3])
    except BrokenPipeError:
        pass
    except Exception as error:
        # Parsers fail in many ways on hostile bytes (zlib.error, struct.error, KeyError, ...).
        reason = f"{type(error).__name__}: {printable(error)}"
        _answer(
            answers, b"X", [f"{printable(path)}: cannot be read ({reason}); unpack it again", 3]
        )
    with contextlib.suppress(BrokenPipeError):
        answers.close()
    # Whatever a library has left running does not matter any more.
    os._exit(0)


def _answer(stream: BinaryIO, kind: bytes, value: object) -> None:
    body = msgspec.msgpack.encode(value)
    with contextlib.suppress(BrokenPipeError):
        stream.write(_HEAD.pack(kind, len(body)) + body)
        stream.flush()


def _limit(size: int) -> None:
    """Limits that grow with the file: a sound one of a million rows takes a minute."""
    seconds = 60 + size // 100_000
    for what, most in (
        (resource.RLIMIT_AS, _MEMORY + 4 * size),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(what, (most, most))
