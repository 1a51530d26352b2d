import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.tar import TarWriter, read_members


def pack(members: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    tar = TarWriter(out)
    for name, data in members:
        tar.add(name, data)
    tar.close()
    return out.getvalue()


def read(data: bytes) -> list[tuple[str, bytes]]:
    members = read_members(io.BytesIO(data), size_bytes=len(data), where="x.tar")
    return [(member.name, data[member.offset : member.offset + member.size]) for member in members]


def foreign(*infos: tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for info in infos:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return out.getvalue()


@given(st.lists(st.binary(max_size=1500), max_size=5))
def test_reading_inverts_writing(contents: list[bytes]) -> None:
    members = [(f"set-{k:08d}.bin", data) for k, data in enumerate(contents)]
    assert read(pack(members)) == members


def test_python_and_we_agree_on_the_format() -> None:
    data = pack([("a.jpg", b"1" * 700), ("a.json", b"{}")])
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(info.name, info.size, info.mtime, info.uid) for info in archive] == [
            ("a.jpg", 700, 0, 0),
            ("a.json", 2, 0, 0),
        ]


@given(name=st.text("abcz09-_.", min_size=1, max_size=100), size=st.integers(0, 3000))
def test_pythons_tarfile_reads_every_header(name: str, size: int) -> None:
    data = pack([(name, b"x" * size)])
    info = tarfile.TarInfo.frombuf(data[:512], "ascii", "strict")
    assert (info.name.rstrip("/"), info.size, info.mtime) == (name, size, 0)
    assert (info.mode, info.uid, info.gid, info.type) == (0o644, 0, 0, tarfile.REGTYPE)


@pytest.mark.parametrize("name", ["", "x" * 101, "é.jpg"])
def test_names_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"does not fit|codec can't encode"):
        pack([(name, b"")])


@pytest.mark.parametrize("cut", [1, 512, 1023, 1024, 1025, 1536])
def test_a_truncated_tar_is_refused(cut: int) -> None:
    data = pack([("a.jpg", b"1" * 700), ("a.json", b"{}")])
    with pytest.raises(ShardError, match=r"x\.tar"):
        read(data[:-cut])


@pytest.mark.parametrize("name", ["/etc/passwd", "../up", "a/../../b", "C:evil", "a\\..\\b"])
def test_names_that_leave_the_folder_are_refused(name: str) -> None:
    with pytest.raises(ShardError, match="outside the shard"):
        read(foreign(tarfile.TarInfo(name)))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE]
)
def test_links_and_devices_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("a")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(ShardError, match="not a regular file"):
        read(foreign(info))


def test_a_member_that_claims_a_terabyte_is_refused_at_once() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = 1 << 40
    data = info.tobuf(format=tarfile.GNU_FORMAT) + b"x" * 2048
    with pytest.raises(ShardError, match=r"claims 1,099,511,627,776 bytes|damaged"):
        read(data)


def test_a_long_name_that_claims_a_terabyte_allocates_nothing() -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 1 << 40
    with pytest.raises(ShardError):
        read(info.tobuf(format=tarfile.GNU_FORMAT) + b"x" * 2048)
