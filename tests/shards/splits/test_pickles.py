import pickle
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.splits.pickles import load_plain_pickle

PLAIN = st.dictionaries(
    st.one_of(st.integers(0, 99), st.text(max_size=5)),
    st.dictionaries(
        st.sampled_from(["train", "val", "test"]),
        st.one_of(
            st.lists(
                st.one_of(st.integers(-(2**40), 2**40), st.floats(allow_nan=False)), max_size=9
            ),
            st.tuples(st.text(max_size=3), st.booleans()),
            st.none(),
        ),
        max_size=3,
    ),
    max_size=4,
)


@given(value=PLAIN, protocol=st.integers(0, pickle.HIGHEST_PROTOCOL))
def test_plain_containers_are_read_as_python_reads_them(value: Any, protocol: int) -> None:
    assert load_plain_pickle(pickle.dumps(value, protocol), where="x") == value


def test_lists_that_are_shared_stay_what_they_are() -> None:
    rows = list(range(5))
    value = {k: {"train": rows, "test": rows} for k in range(3)}
    assert load_plain_pickle(pickle.dumps(value), where="x") == value


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


def _endless_key() -> bytes:
    """The hash of a tuple of two of itself, sixty deep, takes 2 ** 60 steps."""
    return b"\x80\x02}(K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01u."


def _deep(levels: int) -> bytes:
    return b"\x80\x02" + b"]" * levels + b"a" * (levels - 1) + b"."


def _growing(levels: int) -> bytes:
    """A list of two of the last list, again and again."""
    out = b"\x80\x02]q\x00"
    for _ in range(levels):
        out += b"0](h\x00h\x00eq\x00"
    return out + b"."


HOSTILE = {
    "code": (pickle.dumps(_Runs()), "asks for (GLOBAL|STACK_GLOBAL)"),
    "a set": (pickle.dumps({1, 2}), "asks for"),
    "2 GB of memo": (b"Nr" + struct.pack("<I", 0x7FFFFFFF) + b"s.", "not a pickle"),
    "a key that hashes for ever": (_endless_key(), "nests more than|key of type tuple"),
    "deep lists": (_deep(100_000), "nests more than 8"),
    "lists that double": (_growing(60), "nests more than 8"),
    "a list of itself": (b"\x80\x02]q\x00h\x00a.", "nests more than 8"),
    "a key twice": (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "the key '1' twice"),
    "a million bits": (b"\x8b\x48\xe8\x01\0" + b"\x7f" * 125_000 + b".", "of 999,999 bits"),
    "digits for ever": (b"I" + b"9" * 100_000 + b"\n.", "not a pickle"),
    "a text that claims gigabytes": (b"\x8d" + struct.pack("<Q", 1 << 40) + b"x.", "not a pickle"),
    "no end": (b"\x80\x02]", "not a pickle"),
    "nothing": (b"", "not a pickle"),
    "two values": (b"NN.", "not a pickle"),
    "a marked nothing": (b"(.", "mark|not a pickle"),
    "persistent": (b"Pabc\n.", "asks for PERSID"),
    "extension": (b"\x82\x01.", "asks for EXT1"),
    "too many bytes": (b"N" * (1 << 24) + b"..", "16,777,216"),
    "too many instructions": (b"N0" * 2_000_000 + b"N.", "more than 2,000,000 instructions"),
}  # fmt: skip


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pickles_are_a_sentence_within_a_minute(kind: str, capsys: Any) -> None:
    data, message = HOSTILE[kind]
    with pytest.raises(ShardError, match=message) as caught:
        load_plain_pickle(data, where="split.pkl")
    assert len(str(caught.value).encode()) <= 2048
    assert capsys.readouterr().out == ""


@settings(deadline=5000)
@given(st.binary(max_size=200))
def test_any_bytes_are_plain_values_or_a_sentence(data: bytes) -> None:
    try:
        load_plain_pickle(data, where="x")
    except ShardError as error:
        assert error.exit_code == 3  # noqa: PT017
