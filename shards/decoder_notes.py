"""What decoders remark on while an image is opened and decoded, gathered for a note on that image.

Pillow warns through `warnings`, which name no file and show a remark once a process; decoders in
threads share them. From the first image on, Pillow's warnings go to whoever listens in the thread
that decodes (`decoder_notes`), and otherwise into the log at level debug; all other warnings are
left alone.
"""

import logging
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from shards.text import printable

logger = logging.getLogger(__name__)

_FILTER = ("always", None, Warning, re.compile(r"PIL\."), 0)
_MOST_REMARKS = 5
_ADDRESS = re.compile(r" at 0x[0-9a-f]+|<_io[^>]*>")


class DecoderNotes:
    """Remarks on one image, whole when it was decoded."""

    def __init__(self) -> None:
        self._remarks: list[str] = []
        self._later: list[Callable[[], str]] = []

    def add(self, remark: str) -> None:
        """Take up a remark, as a short phrase."""
        text = printable(_ADDRESS.sub("", remark).strip().rstrip("."), 120)
        if len(self._remarks) < _MOST_REMARKS and text not in self._remarks:
            self._remarks.append(text)

    def add_later(self, ask: Callable[[], str]) -> None:
        """Take up a remark that is known after decoding only."""
        self._later.append(ask)

    def all(self) -> tuple[str, ...]:
        """All remarks; call it after decoding."""
        later = dict.fromkeys(note for ask in self._later if (note := ask()))
        return (*later, *(f"decoder: {remark}" for remark in self._remarks))


class _Listening(threading.local):
    notes: DecoderNotes | None = None


_listening = _Listening()


@contextmanager
def decoder_notes() -> Iterator[DecoderNotes]:
    """Gathers what decoders remark on in this thread inside the block."""
    before, notes = _listening.notes, DecoderNotes()
    _listening.notes = notes
    try:
        yield notes
    finally:
        _listening.notes = before


def note_later(ask: Callable[[], str]) -> None:
    """Let whoever listens in this thread ask for a remark when the image is decoded."""
    if _listening.notes is not None:
        _listening.notes.add_later(ask)


def route_warnings() -> None:
    """Let Pillow's warnings go to `decoder_notes`, not to the terminal; harmless if done twice."""
    if _FILTER not in warnings.filters:
        # Compared by identity of its pattern; `filterwarnings` would compile another.
        warnings.filters.insert(0, _FILTER)  # type: ignore[attr-defined]
        warnings._filters_mutated()  # type: ignore[attr-defined]
    if not isinstance(warnings.showwarning, _Router):
        warnings.showwarning = _Router(warnings.showwarning)


class _Router:
    """Stands in the place of `warnings.showwarning`."""

    def __init__(self, before: Callable[..., None]) -> None:
        self._before = before

    def __call__(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        *rest: Any,
        **named: Any,
    ) -> None:
        if "/PIL/" not in filename.replace("\\", "/"):
            self._before(message, category, filename, lineno, *rest, **named)
        elif _listening.notes is not None:
            _listening.notes.add(str(message))
        else:
            logger.debug("%s:%s: %s", filename, lineno, message)
