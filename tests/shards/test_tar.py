import contextlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import ShardError
from shards.tar import Member, TarWriter, iterate_members, read_members


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


def listed(data: bytes) -> list[Member]:
    return list(iterate_members(io.BytesIO(data), size_bytes=len(data), where="x.tar"))


NAMES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=150
)
KINDS = st.sampled_from([b"0", b"0", b"0", b"7", b"1", b"2", b"3", b"5", b"6"])
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@given(entries=st.lists(st.tuples(NAMES, KINDS, st.integers(0, 1200)), max_size=6), format=FORMATS)
def test_tars_of_others_are_listed_as_python_lists_them(entries, format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, kind, size in entries:
            info = tarfile.TarInfo(f"folder/{name}")
            info.type, info.size = kind, size if kind in b"07" else 0
            info.linkname = "somewhere/" * 12 if kind in b"12" else ""
            with contextlib.suppress(ValueError):
                archive.addfile(info, io.BytesIO(b"x" * info.size))
    with tarfile.open(fileobj=io.BytesIO(out.getvalue()), encoding="utf-8") as archive:
        # Python takes slashes at the end of a name away.
        expected = [
            (info.name, info.offset_data, info.size)
            for info in archive
            if info.isfile() and info.name == f"folder/{info.name.partition('/')[2]}"
        ]
    found = [(member.name, member.offset, member.size) for member in listed(out.getvalue())]
    assert found == expected


def header(name: str, kind: bytes = b"0", *, size: int = 0, body: bytes = b"") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size or len(body)
    padded = body + bytes(-len(body) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + padded


def raw_size(size: bytes) -> bytes:
    """A header whose size field holds these bytes."""
    block = bytearray(header("a.jpg"))
    block[124:136] = size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax(*records: tuple[str, str]) -> bytes:
    body = b""
    for key, value in records:
        text = f" {key}={value}\n".encode()
        length = len(text) + 1
        while len(str(length)) + len(text) != length:
            length = len(str(length)) + len(text)
        body += f"{length}".encode() + text
    return header("pax", b"x", body=body)


GOOD = header("good.jpg", body=b"12345")
END = bytes(1024)
LONG = header("././@LongLink", b"L", body=b"n" * 200 + b"\0")
PAX = pax(("path", "b" * 300))
HOSTILE = {
    "3,000 chained long names": (LONG * 3000 + GOOD, "more than 16 extension headers"),
    "3,000 chained pax headers": (PAX * 3000 + GOOD, "more than 16 extension headers"),
    "3,000 chained mixed headers": ((LONG + PAX) * 1500 + GOOD, "more than 16 extension headers"),
    "a long name of 2 MB": (header("L", b"L", body=b"n" * (1 << 21)), "1,048,576 that are read"),
    "a pax header of 2 MB": (header("p", b"x", body=b"9" * (1 << 21)), "1,048,576 that are read"),
    "8 GB claimed": (header("a.jpg", size=1 << 33), "claims 8,589,934,592 bytes"),
    "1 TB claimed": (header("a.jpg", size=1 << 40), "claims 1,099,511,627,776 bytes"),
    "1 TB claimed by pax": (pax(("size", str(1 << 40))) + GOOD, "claims 1,099,511,627,776 bytes"),
    "1 TB of long name": (header("L", b"L", size=1 << 40), "claims 1,099,511,627,776 bytes"),
    "a negative size": (raw_size(b"\xff" * 11 + b"\xfe"), "claims -2 bytes"),
    "a negative octal size": (raw_size(b"-0000000017\0"), "number is '-0000000017'"),
    "a size with an underscore": (raw_size(b"00000001_0\0\0"), "number is '00000001_0'"),
    "a negative size in pax": (pax(("size", "-5")) + GOOD, "claims '-5' bytes"),
    "a size of 4,000 digits": (pax(("size", "9" * 4000)) + GOOD, "claims '999"),
    "a pax record that ends outside": (
        header("p", b"x", body=b"99 path=x\n"),
        "pax header at byte",
    ),
    "a pax record of no length": (header("p", b"x", body=b"path=x\n"), "pax header at byte"),
    "a global name": (header("p", b"g", body=b"10 path=x\n"), "global header at byte"),
    "a global size": (header("p", b"g", body=b"9 size=1\n"), "global header at byte"),
    "a checksum that does not fit": (GOOD[:3] + b"?" + GOOD[4:], "checksum does not fit"),
    "half a header": (GOOD[:300], "ends inside a header"),
    "no tar": (b"\x7fELF" * 300, "not a tar file"),
    "no byte": (b"", "not a tar file"),
}


@pytest.mark.timeout(10)
@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tars_are_a_sentence_and_what_came_before_is_listed(kind: str, place: str) -> None:
    data, message = HOSTILE[kind]
    if place == "second" and kind not in ("no tar", "no byte"):
        data = GOOD + data
    if kind not in ("half a header", "no byte"):
        data += END
    found: list[str] = []
    members = iterate_members(io.BytesIO(data), size_bytes=len(data), where="x\n.tar")
    with pytest.raises(ShardError, match=message) as caught:
        found.extend(member.name for member in members)
    assert found == (["good.jpg"] if place == "second" and data.startswith(GOOD) else [])
    assert str(caught.value).startswith(r"x\n.tar: ")
    with pytest.raises(ShardError):
        read(data)


SPARSE = bytearray(header("s.jpg", b"S", body=b"12345"))
SPARSE[482:483] = b"\1"
SPARSE[148:156] = b" " * 8
SPARSE[148:156] = b"%06o\0 " % sum(SPARSE[:512])
MAPS = (bytes(504) + b"\1" + bytes(7)) * 2 + bytes(512)


@pytest.mark.parametrize(
    "others",
    [
        bytes(SPARSE[:512]) + MAPS + bytes(SPARSE[512:]),
        pax(("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9")) + header("s.jpg", body=b"x"),
        header("folder/", b"5"),
        header("old-folder/"),
        header("link.jpg", b"2"),
        header("null.jpg", b"3"),
        header("hard.jpg", b"1", size=999),
        header("volume.jpg", b"V", body=b"x"),
    ],
)  # fmt: skip
def test_what_is_no_plain_file_is_passed_over_and_refused_in_a_shard(others: bytes) -> None:
    data = others + GOOD + END
    assert [(member.name, member.size) for member in listed(data)] == [("good.jpg", 5)]
    with pytest.raises(ShardError, match="not a regular file"):
        read(data)


def test_an_endless_sparse_map_ends_with_the_file() -> None:
    data = bytes(SPARSE[:512]) + (bytes(504) + b"\1" + bytes(7)) * 5000
    with pytest.raises(ShardError, match="truncated or forged"):
        listed(data)


def test_a_tar_cut_at_a_members_border_is_listed_and_refused_as_a_shard() -> None:
    assert [member.name for member in listed(GOOD)] == ["good.jpg"]
    with pytest.raises(ShardError, match="end-of-archive blocks are missing"):
        read(GOOD)
