"""The results of scripts/gpu_check.sh: JSON lines that say what need not be done again.

A line belongs to a step and a key. A step that was stopped goes on with the first key that has no
line; a step with all its lines has one more, which scripts/gpu_check.sh looks for.
"""

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""JSON values; `wrong` lists what is not as it should be, `left_out` says why there is nothing."""
Task = tuple[str, Callable[[], Figures]]


class Book:
    """One file of lines; several processes may append to it at once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def lines(self) -> list[Figures]:
        """All lines that are whole; a process that was killed may leave half of one."""
        if not self.path.is_file():
            return []
        found = []
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
        return found

    def of(self, step: str) -> list[Figures]:
        """The lines of a step, without the one that says it is finished."""
        return [line for line in self.lines() if line.get("step") == step]

    def add(self, line: Figures) -> None:
        """Append one line in one write, on the disk before this returns."""
        whole = not self.path.is_file() or self.path.read_bytes()[-1:] in (b"", b"\n")
        # A line of its own even behind half a line.
        data = (("" if whole else "\n") + json.dumps(line) + "\n").encode()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)

    def fill(self, step: str, tasks: Iterable[Task]) -> bool:
        """Do the tasks of a step that have no line yet; True if no line of the step is wrong.

        A task that fails is a line too: it is named, and the others go on, unless the GPU is lost
        to this process; then the next call goes on behind it.
        """
        there = {line["key"]: line for line in self.of(step)}
        for key, task in tasks:
            if key in there:
                continue
            began = time.perf_counter()
            figures = _attempt(task)
            line = {"step": step, "key": key, **figures, "took_s": time.perf_counter() - began}
            self.add(line)
            print(json.dumps(line), flush=True)
            there[key] = line
            if figures.get("gpu_lost"):
                raise SystemExit(1)
        good = not any(line.get("wrong") for line in there.values())
        # A step with something wrong is never finished: every call says so again.
        if good:
            self.add({"finished": step})
        return good


def _attempt(task: Callable[[], Figures]) -> Figures:
    try:
        return task()
    except Exception as error:
        # Whatever it is, it belongs into the results: nobody watches the machine that runs this.
        sentence = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if "out of memory" in sentence.lower():
            return {"left_out": sentence}
        lost = "CUDA error" in sentence or "illegal" in sentence
        return {"left_out": sentence, "wrong": [sentence], "gpu_lost": lost}
