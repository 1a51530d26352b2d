"""Pickles of plain containers, read by an interpreter of a few opcodes that can do nothing else.

The standard unpickler, told to build no class, can still be made to allocate gigabytes (an index of
the memo) or to compute for ever (the hash of a tuple of tuples as a key). Here every opcode is on a
list, keys are texts and numbers, and bytes, opcodes, nesting and the memo are limited.

Source: PEP 3154 and the comments of CPython's `pickletools`.
"""

import pickletools
from collections.abc import Callable
from typing import Any, Final

from shards.errors import ShardError
from shards.text import printable

MAX_PICKLE_BYTES: Final = 1 << 24
"""pyiqa's pickles hold ten splits of up to 40,000 numbers of three bytes: about 1 MB."""

_MOST_OPCODES = 2_000_000
_MOST_DEPTH = 8
_MOST_BITS = 63

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT")
_TEXTS = ("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")
_BYTE_TEXTS = ("STRING", "BINSTRING", "SHORT_BINSTRING")
_VALUES = frozenset({*_NUMBERS, *_TEXTS, *_BYTE_TEXTS})
_NOTHING = frozenset({"PROTO", "FRAME", "STOP"})


class _Mark:
    """Where a list of values begins on the stack."""


def load_plain_pickle(data: bytes, *, where: str) -> object:
    """What a pickle of dictionaries, lists, tuples, texts and numbers holds.

    Raises:
        ShardError: If it holds anything else, is damaged, or exceeds the limits.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ShardError(
            f"{printable(where)}: {len(data):,} bytes, more than the {MAX_PICKLE_BYTES:,} that a "
            "pickle of splits may have",
            exit_code=3,
        )
    try:
        return _Machine().run(data)
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, EOFError) as error:
        raise ShardError(
            f"{printable(where)}: not a pickle of plain lists ({printable(error)})", exit_code=3
        ) from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.depths: dict[int, int] = {}
        # Everything built is kept, so that an id is never given to something else.
        self.kept: list[Any] = []
        self.done: dict[str, Callable[[Any], None]] = {
            "MARK": lambda arg: self.stack.append(_Mark),
            "POP": lambda arg: self.stack.__delitem__(-1),
            "POP_MARK": lambda arg: self._since_mark().clear(),
            "EMPTY_LIST": lambda arg: self._push([]),
            "EMPTY_TUPLE": lambda arg: self._push(()),
            "EMPTY_DICT": lambda arg: self._push({}),
            "LIST": lambda arg: self._push(self._since_mark()),
            "TUPLE": lambda arg: self._push(tuple(self._since_mark())),
            "TUPLE1": lambda arg: self._push(tuple(self._last(1))),
            "TUPLE2": lambda arg: self._push(tuple(self._last(2))),
            "TUPLE3": lambda arg: self._push(tuple(self._last(3))),
            "APPEND": lambda arg: self._extend(self._last(1)),
            "APPENDS": lambda arg: self._extend(self._since_mark()),
            "DICT": lambda arg: self._make_dict(),
            "SETITEM": lambda arg: self._set_items(self._last(2)),
            "SETITEMS": lambda arg: self._set_items(self._since_mark()),
            **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), self._put),
            "MEMOIZE": lambda arg: self._put(len(self.memo)),
            **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), self._get),
        }

    def run(self, data: bytes) -> object:
        for count, (opcode, argument, at) in enumerate(pickletools.genops(data)):
            if count > _MOST_OPCODES:
                raise ValueError(f"more than {_MOST_OPCODES:,} instructions")
            name = opcode.name
            if name in _VALUES:
                self._push(_checked(argument))
            elif name in _CONSTANTS:
                self._push(_CONSTANTS[name])
            elif name in self.done:
                self.done[name](argument)
            elif name not in _NOTHING:
                raise ValueError(f"asks for {name} at byte {at}, which is refused")
        (found,) = self.stack
        if found is _Mark:
            raise ValueError("holds nothing")
        return found

    def _push(self, value: Any) -> None:
        if isinstance(value, list | tuple | dict):
            self._note_depth(value, value.values() if isinstance(value, dict) else value)
        self.stack.append(value)

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count or _Mark in self.stack[-count:]:
            raise ValueError("takes what is not there")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        for at in range(len(self.stack) - 1, -1, -1):
            if self.stack[at] is _Mark:
                taken = self.stack[at + 1 :]
                del self.stack[at:]
                return taken
        raise ValueError("has no mark")

    def _extend(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, list):
            raise ValueError("appends to what is no list")
        target.extend(values)
        self._note_depth(target, values)

    def _make_dict(self) -> None:
        values = self._since_mark()
        self._push({})
        self._set_items(values)

    def _set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(values) % 2:
            raise ValueError("sets items of what is no dictionary")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise ValueError(f"has a key of type {type(key).__name__}")
            if key in target:
                raise ValueError(f"has the key {printable(key, 60)!r} twice")
            target[key] = value
        self._note_depth(target, values[1::2])

    def _put(self, index: int) -> None:
        # A dictionary: the standard unpickler has an array as long as the largest index.
        self.memo[index] = self.stack[-1]

    def _get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    def _note_depth(self, holder: Any, values: Any) -> None:
        """Nesting is counted as it grows; what holds itself would grow for ever."""
        inner = (self.depths.get(id(v), 0) for v in values if isinstance(v, list | tuple | dict))
        depth = 1 + max(inner, default=0)
        if depth > _MOST_DEPTH or any(value is holder for value in values):
            raise ValueError(f"nests more than {_MOST_DEPTH} containers")
        self.depths[id(holder)] = max(depth, self.depths.get(id(holder), 0))
        self.kept.append(holder)


def _checked(value: Any) -> Any:
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"holds a number of {value.bit_length():,} bits")
    return value
