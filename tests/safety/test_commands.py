"""Commands against mutated sets, runs, models, checkpoints and splits, in a canary tree.

Every case copies a small sound tree, spoils one file of it at random, and runs one command. Held:
an exit code of the list in docs/architecture.md, never a traceback; messages of bounded length
without control characters; nothing outside the tree read into the output, changed or removed; no
socket opened, no process started but this program's own. `make test` runs a share of
LMCL_FUZZ_CASES (500), the nightly target 10,000.
"""

import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcl.cli.main import main as lmcl
from shards.cli import main as shards_main
from tests.conftest import SafetyTally

BEFORE = Path(__file__).resolve().parents[1] / "data" / "before_move"
CASES = max(40, int(os.environ.get("LMCL_FUZZ_CASES", "500")) // 5)
EXIT_CODES = {0, 1, 2, 3, 4, 5}
HANG_S = 600.0
SECRET = "canary-4f1d8a2b"
_ABSURD: list[Any] = [
    None, True, -1, 0, 1e308, float("nan"), 2**70, "", "x" * 70_000, "../../outside/secret.txt",
    "\x1b[2J\nerror: all is well", "\0", [], {}, [[]] * 1000, "hf-hub:somebody/model",
    "https://user:pw@host/x",
]  # fmt: skip


def lmcl_shard(arguments: list[str]) -> None:
    """`lmcl-shard` with these arguments."""
    before, sys.argv = sys.argv, ["lmcl-shard", *arguments]
    try:
        shards_main()
    finally:
        sys.argv = before


Command = tuple[Callable[[list[str]], None], str, list[str]]
"""The entry point, the folder that is spoiled, and the arguments."""
QUICK: dict[str, Command] = {
    "info": (lmcl_shard, "set", ["info", "set"]),
    "verify": (lmcl_shard, "set", ["verify", "set", "--deep", "--no-progress"]),
    "split": (lmcl_shard, "set", ["split", "set", "--protocol", "k-fold", "--overwrite"]),
    "show-config": (lmcl, "half/config.toml", ["show-config", "half/config.toml"]),
    "score": (lmcl, "finished/model", ["score", "photo.jpg", "--model", "finished/model"]),
}
SLOW: dict[str, Command] = {
    "report": (lmcl, "finished", ["report", "finished"]),
    "eval": (lmcl, "finished", ["eval", "finished", "--no-progress"]),
    "eval-set": (lmcl, "set", ["eval", "finished", "--no-progress"]),
    "train": (
        lmcl, "half",
        ["train", "--config", "run.toml", "--output", "half", "--resume", "auto", "--no-progress"],
    ),
    "score-resume": (
        lmcl, "scores.csv",
        ["score", "photo.jpg", "--model", "finished/model", "--output", "scores.csv", "--resume"],
    ),
}  # fmt: skip

_opened: list[str] = []
_watching = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event in ("socket.connect", "socket.getaddrinfo"):
        _opened.append(f"{event} {arguments!r}"[:200])
    if event in ("subprocess.Popen", "os.system", "os.posix_spawn", "os.exec"):
        words = " ".join(map(str, arguments[1] if len(arguments) > 1 else arguments))
        # The commit and the processor for environment.json; torch looks for its libraries.
        if words.split()[:1] not in (["git"], ["uname"], ["/sbin/ldconfig"]):
            _opened.append(f"{event} {words}"[:200])


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
    """Sockets and processes that are opened within."""
    global _watching
    _opened.clear()
    _watching = True
    try:
        yield _opened
    finally:
        _watching = False


@pytest.fixture(scope="module", autouse=True)
def hook() -> Iterator[None]:
    sys.addaudithook(_watch)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (48 << 30, hard))  # DALI and torch map much, use little
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A sound tree beside things of the user's that nobody may touch."""
    outside = tmp_path / "outside"
    (outside / "Documents").mkdir(parents=True)
    (outside / "secret.txt").write_text(SECRET)
    (outside / "Documents" / "letter.txt").write_text("dear " + SECRET)
    return outside


def files_of(folder: Path) -> dict[str, bytes]:
    """Kind and bytes of everything below a folder, by name."""
    return {
        str(path.relative_to(folder)): f"{path.lstat().st_mode}:".encode()
        + (path.read_bytes() if path.is_file() and not path.is_symlink() else b"")
        for path in folder.rglob("*")
    }


def changed_bytes(before: dict[str, bytes], after: dict[str, bytes]) -> int:
    """Bytes of what is new, gone or different."""
    names = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    return sum(max(len(before.get(name, b"")), len(after.get(name, b""))) for name in names)


def spoil(target: Path, chance: random.Random, outside: Path) -> str:
    """Spoil one file below `target`; says how."""
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    path = chance.choice(files)
    data = bytearray(path.read_bytes())
    ways = ["cut", "flip", "empty", "noise", "delete", "link", "fifo", "folder", "grow"]
    if path.suffix == ".json" or path.name.endswith(".jsonl"):
        ways = ["json"] * 12 + ways
    way = chance.choice(ways)
    if way in ("delete", "link", "fifo", "folder"):
        path.unlink()
        {
            "delete": lambda: None,
            "link": lambda: path.symlink_to(outside / "secret.txt"),
            "fifo": lambda: os.mkfifo(path),
            "folder": path.mkdir,
        }[way]()
    elif way == "json":
        path.write_text(spoil_json(path.read_text(), chance))
    else:
        if way == "cut":
            data = data[: chance.randrange(len(data) + 1)]
        elif way == "flip":
            for _ in range(chance.choice([1, 1, 3, 40]) if data else 0):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        elif way == "noise":
            data = bytearray(chance.randbytes(4000))
        elif way == "grow":
            data += chance.randbytes(50) * 1000
        path.write_bytes(b"" if way == "empty" else data)
    return f"{way} {path.name}"


def spoil_json(text: str, chance: random.Random) -> str:
    """Replace one value of a JSON document, or of one of its lines, by an absurd one."""
    lines = text.splitlines() if text.startswith('{"event"') else [text]
    number = chance.randrange(len(lines))
    tree = json.loads(lines[number])
    node: Any = tree
    while True:
        key = chance.choice(list(node) if isinstance(node, dict) else list(range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or chance.random() < 0.2:
            node[key] = chance.choice(_ABSURD)
            break
        node = node[key]
    lines[number] = json.dumps(tree)
    return "\n".join(lines) + "\n"


def run(main: Callable[[list[str]], None], arguments: list[str]) -> tuple[int, str]:
    """Exit code and all that was said; any other exception than SystemExit is the test's failure.

    Raises:
        Exception: What the command let through: a traceback for its user.
    """
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logging.getLogger().addHandler(handler)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(arguments)
    except SystemExit as end:
        return (
            end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        ), out.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)
    return 0, out.getvalue()


def check_case(
    tmp_path: Path,
    outside: Path,
    seed: int,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tally: SafetyTally,
) -> list[str]:
    """What was wrong with one case; empty if nothing was."""
    main, target, arguments = command
    work = tmp_path / f"case-{seed}"
    shutil.copytree(BEFORE, work)
    shutil.copy(work / "half" / "config.toml", work / "run.toml")
    _photo(work / "photo.jpg")
    monkeypatch.chdir(work)
    before = files_of(outside)
    how = spoil(work / target, random.Random(seed), outside)
    code, said, wrong = 0, "", []
    with watched() as opened:
        try:
            with limited(HANG_S):
                code, said = run(main, arguments)
        except HangError:
            tally.hangs += 1
            wrong.append(f"still at work after {HANG_S} s")
        except Exception as error:
            tally.tracebacks += 1
            wrong.append("".join(traceback.format_exception(error))[-1500:])
        wrong += opened
    touched = changed_bytes(before, files_of(outside))
    leaked = [page.name for page in (work / "finished").glob("report.*") if _holds_secret(page)]
    tally.inputs += 1
    tally.outside_bytes += touched
    checks = {
        f"exit code {code}": code not in EXIT_CODES,
        f"{touched} bytes outside were touched": touched > 0,
        "the secret was said": SECRET in said,
        f"the secret is in {leaked}": bool(leaked),
        f"control characters were said: {said!r:.300}": bool(set(said) & set("\x1b\0")),
        f"a long line: {said:.300}": max(map(len, said.splitlines() or [""])) > 4096,
        "a child was left": any(child.is_alive() for child in multiprocessing.active_children()),
    }
    wrong += [what for what, is_wrong in checks.items() if is_wrong]
    shutil.rmtree(work)
    return [f"seed {seed}: {' '.join(arguments[:1])} after {how}: {what}" for what in wrong]


def _holds_secret(page: Path) -> bool:
    return SECRET in page.read_text(errors="replace")


class HangError(BaseException):
    """A command that does not end; not an error, so that nothing on the way catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `HangError` in the block if it does not end in time.

    pytest's own limit is on SIGALRM and ends the whole test.
    """

    def stop(number: int, frame: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGUSR2, stop)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGUSR2))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGUSR2, before)


def _photo(path: Path) -> None:
    from PIL import Image

    Image.linear_gradient("L").convert("RGB").save(path)


def check_cases(
    count: int,
    tmp_path: Path,
    outside: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    tally: SafetyTally,
) -> None:
    wrong = []
    for seed in range(count):
        wrong += check_case(tmp_path, outside, seed, command, monkeypatch, tally)
    assert wrong == [], f"{len(wrong)} wrong:\n" + "\n".join(wrong[:20])


@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_a_spoiled_file_is_a_sentence_and_nothing_outside_is_touched(
    tmp_path: Path, tree: Path, name: str, monkeypatch: pytest.MonkeyPatch, tally: SafetyTally
) -> None:
    count = max(8, CASES // len(QUICK))
    check_cases(count, tmp_path, tree, QUICK[name], monkeypatch, tally)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SLOW)
def test_a_spoiled_run_is_a_sentence_and_nothing_outside_is_touched(
    tmp_path: Path, tree: Path, name: str, monkeypatch: pytest.MonkeyPatch, tally: SafetyTally
) -> None:
    count = max(8, CASES // len(SLOW))
    check_cases(count, tmp_path, tree, SLOW[name], monkeypatch, tally)
