import dataclasses

import msgspec
import pytest

from shards.errors import ShardError
from shards.manifest import Manifest, ShardInfo, decode, encode
from shards.read import ShardSet
from shards.sample import Facts
from shards.score_scale import ScoreScale


@pytest.fixture
def manifest() -> Manifest:
    shard = ShardInfo(
        name="a-000000.tar", size_bytes=10, sha256="0" * 64, samples=2, first_id=0, rows=3
    )
    return Manifest(
        format_version=1,
        producer="test",
        name="a",
        score=ScoreScale(kind="mos", low=0.0, high=1.0, higher_is_better=True),
        num_samples=2,
        num_rejected=1,
        shards=(shard,),
        samples_sha256="1" * 64,
        ids_sha256="2" * 64,
        source_sha256="3" * 64,
        facts=Facts(title="A"),
    )


def test_decode_inverts_encode(manifest: Manifest) -> None:
    assert decode(encode(manifest), where="x") == manifest


def test_a_written_set_has_a_readable_manifest(packed: ShardSet) -> None:
    assert decode(encode(packed.manifest), where="x") == packed.manifest


def test_an_unknown_format_version_is_refused(manifest: Manifest) -> None:
    data = encode(dataclasses.replace(manifest, format_version=2))
    with pytest.raises(ShardError, match="format version 2, this program reads 1"):
        decode(data, where="x")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_samples", 3, "says 3 samples, its shards hold 2"),
        ("num_rejected", -1, "not a manifest"),
        ("shards", "no", "not a manifest"),
        ("score", {"kind": "mos", "low": 1, "high": 0, "higher_is_better": True}, "low < high"),
    ],
)
def test_contradictions_are_named(
    manifest: Manifest, field: str, value: object, message: str
) -> None:
    fields = msgspec.json.decode(encode(manifest))
    fields[field] = value
    with pytest.raises(ShardError, match=message):
        decode(msgspec.json.encode(fields), where="x")


@pytest.mark.parametrize("name", ["../a.tar", "/a.tar", "a.txt", ".a.tar", "b\\a.tar"])
def test_shard_names_stay_inside_the_folder(manifest: Manifest, name: str) -> None:
    shard = dataclasses.replace(manifest.shards[0], name=name)
    with pytest.raises(ShardError, match="no file name of a shard"):
        decode(encode(dataclasses.replace(manifest, shards=(shard,))), where="x")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(ShardError):
        decode(data, where="x")
