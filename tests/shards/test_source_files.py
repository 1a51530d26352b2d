import os
import socket
import threading
from pathlib import Path

import pytest

from shards.errors import ShardError
from shards.source_files import (
    MAX_FILE_BYTES,
    is_regular,
    need_regular,
    open_regular,
    read_regular,
    read_text,
    text_lines,
)


@pytest.fixture
def strange(tmp_path: Path) -> dict[str, Path]:
    """What a table may name and is no file of bytes."""
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link-to-fifo.jpg").symlink_to("fifo.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(5 * MAX_FILE_BYTES)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
    return {path.stem: path for path in tmp_path.iterdir()} | {
        "nothing": tmp_path / "nothing.jpg",
        "nul": Path("a\0b"),
        "zero": Path("/dev/zero"),
    }


STRANGE = {
    "fifo": "is a FIFO",
    "link-to-fifo": "is a FIFO",
    "folder": "is a folder",
    "socket": "is a socket",
    "zero": "is a character device",
    "device": "is a character device",
    "sparse": "5,368,709,120 bytes, more than the 1,073,741,824",
    "nothing": "there is no such file",
    "loop": "symbolic links",
    "nul": r"a\\x00b: cannot be read",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("read", [read_regular, open_regular, read_text])
def test_what_is_no_regular_file_of_sane_size_is_refused_by_name(strange, kind, read) -> None:
    with pytest.raises(ShardError, match=STRANGE[kind]) as caught:
        read(strange[kind])
    assert caught.value.exit_code in (3, 4)


def test_a_fifo_is_not_even_opened(tmp_path) -> None:
    """Whoever waits to write into it would be woken by an opening."""
    os.mkfifo(tmp_path / "f")
    opened = threading.Event()

    def write() -> None:
        with open(tmp_path / "f", "wb"):
            opened.set()

    threading.Thread(target=write, daemon=True).start()
    with pytest.raises(ShardError):
        read_regular(tmp_path / "f")
    assert not opened.wait(0.2)
    os.close(os.open(tmp_path / "f", os.O_RDONLY))


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 24) + 7])
def test_a_regular_file_comes_whole(tmp_path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "x").write_bytes(data)
    (tmp_path / "link").symlink_to("x")
    assert read_regular(tmp_path / "x") == read_regular(str(tmp_path / "link")) == data
    with open_regular(tmp_path / "x") as stream:
        assert stream.read() == data


def test_a_part_of_a_file_is_limited_by_its_own_size(tmp_path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert read_regular(tmp_path / "x", offset=3, size=4, limit_bytes=4) == b"3456"
    for size, message in ((5, "5 bytes, more than the 4"), (4, "ends 1 bytes before the 4 from")):
        with pytest.raises(ShardError, match=message):
            read_regular(tmp_path / "x", offset=7, size=size, limit_bytes=4)


def test_links_are_not_followed_where_they_must_not_be(tmp_path) -> None:
    (tmp_path / "secret").write_text("s")
    (tmp_path / "picture.png").symlink_to("secret")
    with pytest.raises(ShardError, match="symbolic link, which is not followed"):
        read_regular(tmp_path / "picture.png", follow_links=False)


def test_files_of_the_system_that_claim_no_bytes_are_limited_too() -> None:
    assert read_regular("/proc/self/cmdline", limit_bytes=1 << 16)
    with pytest.raises(ShardError, match="more than the 4 such a file"):
        read_regular("/proc/self/status", limit_bytes=4)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mark_at_the_start_is_no_part_of_the_text(tmp_path, encoding: str) -> None:
    path = tmp_path / "x.csv"
    path.write_bytes("päth,score\r\na,1".encode(encoding))
    assert read_text(path) == "päth,score\r\na,1"
    assert list(text_lines(path)) == ["päth,score\r\n", "a,1"]


def test_a_line_without_an_end_is_not_read_into_memory(tmp_path) -> None:
    with open(tmp_path / "x.csv", "wb") as file:
        file.write(b"path,score\n")
        file.truncate(3 << 30)
    with pytest.raises(ShardError, match="a line of more than 16 MB"):
        list(text_lines(tmp_path / "x.csv"))


def test_bytes_that_are_no_text_are_a_sentence(tmp_path) -> None:
    (tmp_path / "x.csv").write_bytes(b"caf\xe9\n")
    for read in (read_text, lambda path: list(text_lines(path))):
        with pytest.raises(ShardError, match=r"x\.csv: cannot be read as text .*save it as UTF-8"):
            read(tmp_path / "x.csv")


def test_a_needed_file_is_named_with_the_way_out(strange, tmp_path) -> None:
    (tmp_path / "x").write_text("x")
    assert need_regular(tmp_path / "x", what="give it") == tmp_path / "x"
    assert is_regular(tmp_path / "x")
    for kind in ("fifo", "folder", "nothing", "nul"):
        assert not is_regular(strange[kind])
        with pytest.raises(ShardError, match="give it") as caught:
            need_regular(strange[kind], what="give it")
        assert caught.value.exit_code == 4
