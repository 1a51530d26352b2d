"""Processes that have imported torch already: real ones, without seconds of imports at each start.

`start` and `run` take the command lines and the keywords of `subprocess.Popen` and
`subprocess.run` that the tests use. A line that begins with this Python and goes on with a file,
`-m` or `-c` is run by a fork of a server (this file as a program) that did nothing but import. The
fork is a process of its own, with its own environment, folder and session; it can be killed, and
ends as Python does but for its modules, which are not taken down. What is decided while importing
(interpreted kernels, threads) is the server's: a test of imports, of memory or of a command as it
is typed starts a Python of its own.
"""

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

REPO = Path(__file__).resolve().parents[1]
IMPORTED = (
    *("lmcl.training.setup", "lmcl.report.write", "lmcl.inference.scorer", "shards.cli"),
    *("lmcl.cli.main", "lmcl.cli.train", "lmcl.cli.score", "lmcl.cli.eval", "lmcl.cli.export"),
    *("pytest", "pyarrow.compute", "PIL.JpegImagePlugin", "PIL.PngImagePlugin"),
    *(("nvidia.dali.fn",) if importlib.util.find_spec("nvidia") else ()),
)
FIXED = ("OMP_NUM_THREADS", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "LD_PRELOAD")
"""Read once, by the imports: a process may not ask for other values."""
spent = 0.0
"""Processor seconds of all processes that have ended."""


class Warm:
    """What `subprocess.Popen` is, as far as the tests need it; output goes to files."""

    def __init__(
        self,
        args: Sequence[object],
        *,
        cwd: Path = REPO,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        text: bool = True,
        start_new_session: bool = False,
    ) -> None:
        self.args = [
            os.fspath(word) if isinstance(word, os.PathLike) else str(word) for word in args
        ]
        assert self.args[0] == sys.executable, f"not this Python: {self.args[0]}"
        environment = dict(os.environ if env is None else env)
        address, fixed = _server()
        for name, ours in fixed.items():
            assert environment.get(name, ours) == ours, f"{name} is read by the imports"
        self.returncode: int | None = None
        self._text = text
        self._said: dict[str, str | bytes] = {}
        self._files = {"stdout": _place(stdout), "stderr": _place(stderr)}
        asked = {
            "words": self.args[1:],
            "cwd": os.fspath(cwd),
            "env": environment,
            "session": start_new_session,
        }
        with open(os.devnull) as nothing:
            fds = [nothing.fileno() if stdin is None else stdin]
            for name, given in (("stdout", stdout), ("stderr", stderr)):
                file = self._files[name]
                kept = {None: 1 if name == "stdout" else 2, subprocess.DEVNULL: fds[0]}
                fds.append(file.fileno() if file else kept.get(given, given))
            self._line = socket.socket(socket.AF_UNIX)
            self._line.connect(address)
            socket.send_fds(self._line, [b"-"], fds)
        self._line.sendall(json.dumps(asked).encode() + b"\n")
        self._answers = self._line.makefile("r")
        self.pid = int(self._answers.readline())

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        if self.returncode is None and select.select([self._line], [], [], 0)[0]:
            self._finish()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            TimeoutExpired: If there is none.
        """
        if self.returncode is None:
            if not select.select([self._line], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._finish()
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Wait for the end; what it said."""
        self.wait(timeout)
        return self._said.get("stdout"), self._said.get("stderr")

    def send_signal(self, number: int) -> None:
        """Send it, if there is somebody."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _finish(self) -> None:
        global spent
        code, seconds = self._answers.readline().split()
        self.returncode = int(code)
        spent += float(seconds)
        self._answers.close()
        self._line.close()
        for name, file in self._files.items():
            if file:
                file.seek(0)
                data = file.read()
                self._said[name] = data.decode(errors="surrogateescape") if self._text else data
                file.close()


def start(args: Sequence[object], **options: Any) -> Warm:
    """As `subprocess.Popen`."""
    return Warm(args, **options)


def run(
    args: Sequence[object],
    *,
    capture_output: bool = False,
    check: bool = False,
    timeout: float | None = None,
    input: str | bytes | None = None,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """As `subprocess.run`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with tempfile.TemporaryFile() as given:
        if input is not None:
            given.write(input.encode() if isinstance(input, str) else input)
            given.seek(0)
            options["stdin"] = given.fileno()
        process = Warm(args, **options)
    try:
        out, errors = process.communicate(timeout)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, process.args, out, errors)
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _place(wanted: int | None) -> IO[bytes] | None:
    return tempfile.TemporaryFile() if wanted == subprocess.PIPE else None


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}


@functools.cache
def _server() -> tuple[str, dict[str, str | None]]:
    """Where the server listens, and what its imports read; the first call starts it."""
    address = os.path.join(tempfile.mkdtemp(prefix="lmcl-warm-"), "socket")
    environment = _environment()
    process = subprocess.Popen(
        [sys.executable, __file__, address],
        cwd=REPO,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n", "the server of warm processes did not start"
    atexit.register(process.communicate)
    return address, {name: environment.get(name) for name in FIXED}


def _serve(address: str) -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    names = {place.read_text().strip() for place in Path("/proc/self/task").glob("*/comm")}
    # A fork has one thread; pyarrow's allocator is the only one that knows how to live with it.
    assert len(names - {"jemalloc_bg_thd"}) == 1, f"threads that a fork would lose: {names}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen()
    print("ready", flush=True)
    while True:
        heard = select.select([listener, 0], [], [], 1.0)[0]
        if listener in heard:
            line, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _watch(line)
            line.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if 0 in heard:  # whoever wanted processes is gone
            os.unlink(address)
            os.rmdir(os.path.dirname(address))
            return


def _watch(line: socket.socket) -> None:
    """Start what is asked for, and say how it ended."""
    _, fds, _, _ = socket.recv_fds(line, 1, 3)
    with line.makefile("r") as lines:
        asked = json.loads(lines.readline())
    child = os.fork()
    if child == 0:
        line.close()
        _become(asked, fds)
        return
    for fd in fds:
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        line.sendall(f"{child}\n".encode())
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        line.sendall(f"{os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
    os._exit(0)


def _become(asked: dict[str, Any], fds: list[int]) -> None:
    """Be the process of a command line, to its end."""
    if asked["session"]:
        os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        if fd > 2:
            os.close(fd)
    # The old ones hold what they had buffered before the fork, which is nothing.
    for name, mode, errors in (
        ("stdin", "r", "surrogateescape"),
        ("stdout", "w", "surrogateescape"),
        ("stderr", "w", "backslashreplace"),
    ):
        number = ("stdin", "stdout", "stderr").index(name)
        stream = os.fdopen(
            number, mode, 1 if os.isatty(number) else -1, errors=errors, closefd=False
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    raise _Become(asked["words"])


class _Become(BaseException):
    """Leaves the server's loop, so that nothing of it is below the command."""


def _command(words: list[str]) -> None:
    kind, rest = words[0], words[1:]
    if kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = rest
        sys.path[0] = os.getcwd()
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path[0] = str(Path(kind).resolve().parent)
        runpy.run_path(kind, run_name="__main__")


def _end_of(words: list[str]) -> int:
    """Run a command line as Python does; the exit code."""
    try:
        _command(words)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


if __name__ == "__main__":
    code = 0
    try:
        _serve(sys.argv[1])
    except _Become as become:
        wanted = become.args[0]
        code = _end_of(wanted)
        threading._shutdown()
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # All but the taking down of thousands of modules, which takes half a second.
    os._exit(code)
