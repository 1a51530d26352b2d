"""The password and the signature of a data URL stand in no file of a run and in no message."""

import base64
import functools
import http.server
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lmcl.cli.main import main

BEFORE = Path(__file__).resolve().parents[1] / "data" / "before_move"
PASSWORD, SIGNATURE, TOKEN = "hunter2-password", "hunter2-signature", "hunter2-token"
AUTHORISATION = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
SECRETS = (PASSWORD, SIGNATURE, TOKEN, AUTHORISATION)
QUERY = f"X-Amz-Signature={SIGNATURE}&X-Amz-Security-Token={TOKEN}"


class _Presigned(http.server.SimpleHTTPRequestHandler):
    """Files of a folder for whoever has the password and the signature."""

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        if query != QUERY or self.headers.get("Authorization") != f"Basic {AUTHORISATION}":
            self.send_error(403)
            return
        self.path = path
        super().do_GET()

    do_HEAD = do_GET  # noqa: N815 - the name is http.server's

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    """The set of `before_move` behind a password and a signature."""
    handler = functools.partial(_Presigned, directory=str(BEFORE / "set"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://user:{PASSWORD}@127.0.0.1:{server.server_port}/?{QUERY}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def everything_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Every name and every byte below a folder, those inside archives unpacked."""
    for path in sorted(folder.rglob("*")):
        yield "name", str(path).encode()
        if path.is_file():
            yield str(path), path.read_bytes()
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    for name in archive.namelist():
                        yield f"{path}: {name}", archive.read(name)


def holding(folder: Path, said: str) -> list[tuple[str, str]]:
    texts = [*everything_in(folder), ("what was said", said.encode())]
    return [(where, word) for where, data in texts for word in SECRETS if word.encode() in data]


def lmcl(*arguments: str) -> int:
    try:
        main(list(arguments))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.filterwarnings("ignore")
def test_a_whole_run_holds_no_secret_of_its_data_url(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMCL_CACHE", str(tmp_path / "cache"))
    text = (BEFORE / "half" / "config.toml").read_text()
    root = 'root = "set"'
    assert root in text
    Path("run.toml").write_text(text.replace(root, 'root = "nowhere"'))
    train = ("train", "--config", "run.toml", "--output", "work/run", "--no-progress")
    told = ("--set", f'data.root="{url}"', "--set", "train.epochs=1")
    assert lmcl(*train, *told) == 0, capfd.readouterr().err
    assert lmcl(*train, *told, "--resume", "auto") == 0, capfd.readouterr().err
    assert lmcl("show-config", "run.toml", *told) == 0
    assert lmcl("report", "work/run") == 0
    said = [*capfd.readouterr()]
    # Faults: another password, no such set, a set that is not there, in the words of each command.
    wrong = url.replace("@127", "-wrong@127"), url.replace("/?", "/none?"), url.split("?")[0]
    for broken in wrong:
        change = ("--set", f'data.root="{broken}"', "--set", "train.epochs=1")
        assert lmcl(*train[:3], "--output", "work/other", *change) in (1, 3, 4)
        assert lmcl("score", broken, "--model", "work/run/model", "--output", "work/s.csv") != 0
    said += capfd.readouterr()
    assert "127.0.0.1" in "".join(said)
    assert (tmp_path / "work/run/report.html").is_file()
    assert any((tmp_path / "work/run/checkpoints").glob("*.pt"))
    assert holding(tmp_path, "".join(said)) == []
