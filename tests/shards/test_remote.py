"""Sets behind URLs: a real S3 server as a process of its own, and fsspec's other file systems."""

import contextlib
import functools
import http.server
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from click.testing import CliRunner, Result

from lmcl.inference.inputs import TableOptions, list_items
from shards.build.build import build
from shards.build.plan import ShardSize
from shards.cache import Cache
from shards.cli import cli
from shards.errors import ShardError
from shards.read import ShardSet, open_set
from shards.remote import local_copy, local_folder
from shards.sample import DataSet
from shards.splits.draw import make_splits
from shards.splits.split import load_split, write_split
from shards.store import Store
from shards.verify import verify

FIVE = ShardSize(samples=5)


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """An empty bucket on a server that speaks S3."""
    pytest.importorskip("moto")
    pytest.importorskip("s3fs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from moto.server import main; main()", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    settings = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        _wait_for(url)
        fsspec.filesystem("s3").mkdir("bucket")
        yield "s3://bucket"
    finally:
        server.terminate()
        server.wait()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def _wait_for(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(url)


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://bucket"
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def data_of(shard_set: ShardSet) -> list[bytes]:
    return [data for _, data, _ in shard_set]


@pytest.mark.filterwarnings("ignore")
def test_a_set_on_s3_is_the_set_on_disk(
    s3: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    build(dataset, tmp_path / "local", workers=1, size=FIVE)
    build(dataset, f"{s3}/mine", workers=2, size=FIVE)
    remote = open_set(f"{s3}/mine", cache=tmp_path / "cache")
    local = open_set(tmp_path / "local")
    assert remote.manifest.shards == local.manifest.shards
    assert data_of(remote) == data_of(local)
    split = make_splits(remote, repeats=1)[0]
    write_split(remote.root, split)
    assert load_split(remote, split.name).hash == split.hash
    assert verify(f"{s3}/mine", deep=True, cache=tmp_path / "cache").findings == ()


@pytest.mark.filterwarnings("ignore")
def test_a_missing_shard_on_s3_is_named(
    s3: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(), f"{s3}/hole", workers=1, size=FIVE)
    fsspec.filesystem("s3").rm("bucket/hole/mine-000001.tar")
    shard_set = open_set(f"{s3}/hole", cache=tmp_path / "cache")
    assert len(shard_set.read_bytes(0)) > 0
    with pytest.raises(ShardError, match=r"hole/mine-000001\.tar: the manifest names it") as caught:
        shard_set.read_bytes(6)
    assert caught.value.exit_code == 4


@pytest.mark.filterwarnings("ignore")
def test_a_missing_bucket_is_exit_code_4(s3: str, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no packed set") as caught:
        open_set("s3://nowhere/mine", cache=tmp_path)
    assert caught.value.exit_code == 4


def test_a_set_in_memory_is_the_set_on_disk(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()
    build(dataset, memory, size=FIVE)
    build(dataset, tmp_path / "local", workers=1, size=FIVE)
    assert data_of(open_set(memory, cache=tmp_path / "c")) == data_of(open_set(tmp_path / "local"))
    assert verify(memory, cache=tmp_path / "c").ok


def test_a_remote_build_that_was_stopped_goes_on(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    dataset = table()

    def stop(images: int, total: int) -> None:
        if Store(memory).exists("mine-000001.tar"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(dataset, memory, size=FIVE, progress=stop)
    with pytest.raises(ShardError, match="unfinished build"):
        open_set(memory, cache=tmp_path / "c")
    build(dataset, memory, size=FIVE)
    build(dataset, tmp_path / "local", workers=1, size=FIVE)
    assert data_of(open_set(memory, cache=tmp_path / "c")) == data_of(open_set(tmp_path / "local"))


def test_a_changed_shard_is_refused_and_not_kept(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(), memory, size=FIVE)
    files = fsspec.filesystem("memory")
    data = bytearray(files.cat("/bucket/mine-000000.tar"))
    data[600] ^= 1
    files.pipe("/bucket/mine-000000.tar", bytes(data))
    store = Store(memory)
    shard = open_set(memory, cache=tmp_path / "c").manifest.shards[0]
    cache = Cache(store, tmp_path / "d", sleep=lambda seconds: None)
    with pytest.raises(ShardError, match="other bytes than the manifest says"):
        cache.path(shard.name, sha256=shard.sha256)
    assert list((tmp_path / "d").iterdir()) == []


class FailingStore(Store):
    """Fails a few times, as networks do."""

    def __init__(self, root: str, failures: int) -> None:
        super().__init__(root)
        self.failures = failures

    def fetch(self, name: str, target: Path) -> None:
        if self.failures:
            self.failures -= 1
            raise ShardError("connection reset")
        super().fetch(name, target)


def test_fetching_is_tried_again_with_growing_waits(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(), memory, size=FIVE)
    waits: list[float] = []
    cache = Cache(FailingStore(memory, 3), tmp_path / "c", sleep=waits.append)
    assert cache.path("manifest.json", sha256=None).is_file()
    assert waits == [0.5, 1.0, 2.0]
    with pytest.raises(ShardError, match=r"connection reset .tried 4 times"):
        Cache(FailingStore(memory, 9), tmp_path / "d", sleep=waits.append).path("x", sha256=None)


def test_the_cache_is_bounded_and_drops_the_least_recently_used(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(), memory, size=ShardSize(samples=3))
    shards = open_set(memory, cache=tmp_path / "x").manifest.shards
    sizes = [shard.size_bytes for shard in shards]
    limit = sizes[0] + sizes[2] + max(sizes[1], sizes[3])
    shard_set = open_set(memory, cache=tmp_path / "c", cache_bytes=limit)
    for index in (0, 1, 2):
        path = shard_set.shard_path(index)
        os.utime(path, (index, index))
    os.utime(shard_set.shard_path(0))
    shard_set.shard_path(3)
    held = sorted(path.name.partition("-")[2] for path in (tmp_path / "c").glob("*.tar"))
    assert held == ["mine-000000.tar", "mine-000002.tar", "mine-000003.tar"]
    assert len(data_of(shard_set)) == 12


def test_a_fetched_shard_is_not_fetched_again(
    memory: str, tmp_path: Path, table: Callable[..., DataSet]
) -> None:
    build(table(), memory, size=FIVE)
    before = data_of(open_set(memory, cache=tmp_path / "c"))
    files = fsspec.filesystem("memory")
    for name in ("mine-000000.tar", "mine-000001.tar", "mine-000002.tar"):
        files.rm(f"/bucket/{name}")
    assert data_of(open_set(memory, cache=tmp_path / "c")) == before


def test_an_unknown_kind_of_url_says_so(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no way to read this kind of URL") as caught:
        open_set("nosuch://bucket/mine", cache=tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/x"])
def test_a_store_writes_nowhere_but_below_its_root(tmp_path: Path, name: str) -> None:
    (tmp_path / "root").mkdir()
    with pytest.raises(ShardError, match="outside the set's folder"):
        Store(tmp_path / "root").write(name, b"x")
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with Store(tmp_path).writing("a.bin") as out:
            out.write(b"half")
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        stop_half_way()
    assert list(tmp_path.iterdir()) == []


class _Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder; asks for a signature, and fails the first answers."""

    failures = 0
    queries: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        type(self).queries.add(query)
        if type(self).failures > 0 and path.endswith(".json"):
            type(self).failures -= 1
            self.send_error(500)
        elif query != "sig=hunter2":
            self.send_error(403)
        else:
            self.path = path
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(packed: ShardSet) -> Iterator[str]:
    """A set behind presigned HTTP; the address without its signature."""
    handler = functools.partial(_Server, directory=packed.root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    _Server.failures, _Server.queries = 0, set()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_presigned_folder_is_read_and_a_fault_of_its_manifest_is_asked_again(
    web: str, packed: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shards.store.FIRST_WAIT_S", 0.01)
    _Server.failures = 2
    remote = open_set(f"{web}?sig=hunter2", cache=tmp_path / "cache")
    assert data_of(remote) == data_of(packed)
    assert _Server.queries == {"sig=hunter2"}


@pytest.mark.parametrize("failures", [0, 99], ids=["forbidden", "fault"])
def test_what_is_secret_in_a_url_is_never_said(
    web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int
) -> None:
    monkeypatch.setattr("shards.store.FIRST_WAIT_S", 0.01)
    _Server.failures = failures
    address = web.replace("http://", "http://user:hunter2@")
    with pytest.raises(ShardError) as caught:
        open_set(f"{address}/set?sig=hunter2x", cache=tmp_path / "cache")
    assert "hunter2" not in str(caught.value)
    assert web.removeprefix("http://") in str(caught.value)
    names = [str(path) for path in tmp_path.rglob("*")]
    assert not any("hunter2" in name for name in names)


def test_the_cache_of_a_set_keeps_files_that_are_no_copies(
    memory: str, packed: ShardSet, tmp_path: Path
) -> None:
    _copy(packed, memory)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "mine.tar").write_bytes(b"mine")
    remote = open_set(memory, cache=tmp_path / "cache", cache_bytes=1)
    assert data_of(remote) == data_of(packed)
    assert (tmp_path / "cache" / "mine.tar").read_bytes() == b"mine"


def _copy(shard_set: ShardSet, url: str) -> None:
    target = Store(url)
    for name in shard_set.store.names():
        target.write(name, shard_set.store.read(name))


def test_hostile_manifests_behind_a_url_reach_nothing_on_this_machine(
    memory: str, packed: ShardSet, tmp_path: Path, hostile_sets: list[Any]
) -> None:
    _copy(packed, memory)
    good = packed.store.read("manifest.json")
    folder, cache = tmp_path / "folder", tmp_path / "home" / "cache"
    victim = tmp_path / "home" / "victim.tar"
    cache.mkdir(parents=True)
    victim.write_bytes(b"mine")
    for case in hostile_sets:
        if not case.name.startswith("manifest ") or "link" in case.name or "FIFO" in case.name:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "splits").mkdir(parents=True)
        (folder / "splits" / "x.json").write_bytes(b"")
        (folder / "manifest.json").write_bytes(good)
        case.spoil(folder, tmp_path)
        if not (folder / "manifest.json").is_file():
            continue
        Store(memory).write("manifest.json", (folder / "manifest.json").read_bytes())
        with contextlib.suppress(ShardError):
            list(open_set(memory, cache=cache))
        assert victim.read_bytes() == b"mine", case.name
        assert {path.name for path in victim.parent.iterdir()} == {"cache", "victim.tar"}
        outside = {path.name for path in tmp_path.iterdir()}
        assert outside <= {"folder", "home", "mine", "mine.csv", "packed"}, case.name


class _Web(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def plain_web(tmp_path: Path) -> Iterator[str]:
    """A plain web server over `tmp_path / "web"`."""
    (tmp_path / "web").mkdir()
    handler = functools.partial(_Web, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def _pictures(folder: Path, picture: Callable[..., bytes]) -> list[bytes]:
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    found = [picture(k) for k in range(3)]
    for k, data in enumerate(found):
        (folder / "photos" / f"{k} b.png").write_bytes(data)
    (folder / "l.csv").write_text("path;mos\n" + "".join(f"{k} b.png;{k},5\n" for k in range(3)))
    return found


def _shard(*arguments: str) -> Result:
    command = ["build", "table", *arguments, "--workers", "1", "--no-progress"]
    return CliRunner().invoke(cli, command)


def test_a_table_with_letters_in_parts_finds_the_files_of_a_server(
    plain_web: str,
    tmp_path: Path,
    picture: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "web/caf\u00e9.png").write_bytes(picture(1))
    (tmp_path / "web/l.csv").write_text("path,score\ncafe\u0301.png,1\n")
    done = _shard(f"{plain_web}/l.csv", "--output", str(tmp_path / "o"))
    assert done.exit_code == 0, done.output
    assert open_set(tmp_path / "o").samples.path.tolist() == ["caf\u00e9.png"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["web", "memory"])
def test_tables_and_images_behind_urls_are_those_on_disk(
    kind: str,
    plain_web: str,
    memory: str,
    tmp_path: Path,
    picture: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    found = _pictures(tmp_path / "web", picture)
    root = {"web": plain_web, "memory": memory}[kind]
    fsspec.filesystem("memory").put(str(tmp_path / "web") + "/", "/bucket/", recursive=True)
    secret = f"{root}/l.csv?token=secret" if kind == "web" else f"{root}/l.csv"
    done = _shard(secret, "--images", f"{root}/photos", "--output", str(tmp_path / "o"))
    assert done.exit_code == 0, done.output
    assert "secret" not in done.output
    packed = open_set(tmp_path / "o")
    assert [data for _, data, _ in packed] == found
    assert packed.samples.mos.tolist() == [0.5, 1.5, 2.5]
    one = list_items([f"{root}/photos/1 b.png" if kind == "memory" else f"{root}/photos/1%20b.png"])
    assert (one[0].read(), one[0].is_file) == (found[1], False)
    assert one[0].path.startswith(f"{root}/photos/1")
    table = list_items([f"{root}/l.csv"], tables=TableOptions(images=tmp_path / "web/photos"))
    assert [item.read() for item in table] == found
    if kind == "memory":
        assert [item.read() for item in list_items([f"{root}/photos"])] == found
        (tmp_path / "new.png").write_bytes(found[0])
        fsspec.filesystem("memory").put(str(tmp_path / "new.png"), "/bucket/photos/1 b.png")
        again = list_items([f"{root}/photos"])
        assert again[1].read() == found[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://me:secret@127.0.0.1:1/l.csv?key=secret", "https://127.0.0.1:1/.*check the addr"),
        ("odd://bucket/l.csv", "odd://bucket: no way to read this kind of URL"),
        ("{web}/none.csv", "http://127.0.0.1:[0-9]+/none.csv: there is no such file"),
        ("{web}/photos", "a server on the web lists no folder"),
    ],
    ids=["offline", "kind", "missing", "folder"],
)
def test_a_url_that_gives_nothing_is_one_sentence(
    plain_web: str, tmp_path: Path, url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    url = url.replace("{web}", plain_web)
    done = _shard(url, "--output", str(tmp_path / "o"))
    assert isinstance(done.exception, ShardError)
    assert re.search(words, str(done.exception))
    (item,) = list_items([url])
    assert re.search(words, item.problem)
    assert "secret" not in str(done.exception) + item.problem + item.path
    assert "://" in item.path


def test_what_is_larger_than_the_cache_is_refused(memory: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe("/bucket/a/x.png", b"x" * 3000)
    for fetch in (local_copy, local_folder):
        with pytest.raises(ShardError, match=r"more than the .* the cache may have; copy it"):
            fetch(f"{memory}/a/x.png" if fetch is local_copy else f"{memory}/a", limit_bytes=1000)


@pytest.fixture
def table_of_urls(
    plain_web: str,
    memory: str,
    tmp_path: Path,
    picture: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[Path, list[bytes]]:
    """A table whose images are on the web, in a bucket, and in its own folder."""
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    found = _pictures(tmp_path / "web", picture)
    fsspec.filesystem("memory").pipe("/bucket/photos/1 b.png", found[1])
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "2.png").write_bytes(found[2])
    paths = [
        f"{plain_web}/photos/0%20b.png?token=secret",
        f"{memory}/photos/1 b.png",
        "2.png",
    ]
    rows = "".join(f"{path},{k}\n" for k, path in enumerate(paths))
    (tmp_path / "mixed" / "labels.csv").write_text("path,score\n" + rows)
    return tmp_path / "mixed" / "labels.csv", found


@pytest.mark.filterwarnings("ignore")
def test_urls_in_a_column_of_paths_are_the_files_behind_them(
    table_of_urls: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    table, found = table_of_urls
    done = _shard(str(table), "--output", str(tmp_path / "o"))
    assert done.exit_code == 0, (done.output, done.exception)
    packed = open_set(tmp_path / "o")
    assert [data for _, data, _ in packed] == found
    names = [str(name) for name in packed.samples.path]
    assert re.fullmatch(r"127\.0\.0\.1:\d+/photos/0 b-[0-9a-f]{8}\.png", names[0])
    assert names[1:] == ["bucket/photos/1 b.png", "2.png"]
    assert "secret" not in "".join(names) + done.output
    items = list_items([str(table)])
    assert [item.read() for item in items] == found
    assert [item.is_file for item in items] == [False, False, True]
    assert "secret" not in "".join(item.path for item in items)
    # They are here now: nothing is fetched again.
    fsspec.filesystem("memory").pipe("/bucket/photos/1 b.png", found[1])
    assert [item.read() for item in list_items([str(table)])] == found


@pytest.mark.filterwarnings("ignore")
def test_urls_that_give_nothing_are_named_with_their_rows(
    table_of_urls: tuple[Path, list[bytes]], plain_web: str, tmp_path: Path
) -> None:
    table, found = table_of_urls
    lines = table.read_text().replace("0%20b.png", "none.png")
    table.write_text(f"{lines}{plain_web}/..%2F..%2Fetc/passwd,3\n")
    done = _shard(str(table), "--output", str(tmp_path / "o"))
    assert isinstance(done.exception, ShardError)
    assert "row 2: " in str(done.exception)
    assert "none.png" in str(done.exception)
    assert "there is no such file" in str(done.exception)
    assert "secret" not in str(done.exception)
    done = _shard(str(table), "--output", str(tmp_path / "o"), "--on-error", "skip")
    assert done.exit_code == 0, (done.output, done.exception)
    assert [data for _, data, _ in open_set(tmp_path / "o")] == found[1:]
    problems = [item.problem for item in list_items([str(table)])]
    assert [bool(problem) for problem in problems] == [True, False, False, True]


@pytest.mark.filterwarnings("ignore")
def test_a_table_of_urls_alone_asks_for_no_labels_of_its_folder(
    table_of_urls: tuple[Path, list[bytes]], tmp_path: Path
) -> None:
    table, found = table_of_urls
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:3]))
    done = _shard(str(table), "--output", str(tmp_path / "o"))
    assert done.exit_code == 0, (done.output, done.exception)
    assert [data for _, data, _ in open_set(tmp_path / "o")] == found[:2]
