"""A stand-in for a model hub: the few endpoints that `huggingface_hub` asks, in a thread."""

import base64
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

_RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/models/([^/]+/[^/]+?)(?:/(revision|paths-info|preupload|commit)/([^/]+))?")
_LFS = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")


@dataclasses.dataclass
class Repository:
    is_private: bool = False
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)
    refs: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *, ref: str = "main") -> str:
        oid = hashlib.sha1(f"{len(self.commits)}{sorted(files)}".encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None

    @property
    def newest(self) -> dict[str, bytes]:
        return self.commits[self.refs["main"]]


class HubServer(http.server.ThreadingHTTPServer):
    """Repositories, whoever asks for them, and what goes wrong."""

    daemon_threads = True
    token = "hf_standin-of-a-secret"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.large: dict[str, bytes] = {}
        self.spoil: Callable[[str, str, bytes], bytes] = lambda method, file, data: data
        """What a file's bytes become on their way; the size is said of the true ones."""
        self.said_size: dict[str, int] = {}
        self.refuses: tuple[int, str] | None = None
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no error of the stand-in."""

    def end(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    @property
    def files_asked(self) -> set[str]:
        # Not the API: the client asks it for more than files, by what runs it.
        return {
            line.rpartition("/")[2]
            for line in self.asked
            if line.startswith("GET /") and "/resolve/" in line
        }


class _Handler(http.server.BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: Any) -> None:
        self._answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def _repository(self, name: str) -> Repository | None:
        """The repository, for whoever may see it; else the answer is given here."""
        found = self.server.repositories.get(name)
        if found is None or (found.is_private and not self._has_token):
            self._answer(404 if self._has_token else 401, X_Error_Code="RepoNotFound")
            return None
        return found

    @property
    def _has_token(self) -> bool:
        return bool(self.headers.get("Authorization") == f"Bearer {self.server.token}")

    def _handle(self) -> None:
        path = urlsplit(self.path).path
        self.server.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.refuses:
            status, said = self.server.refuses
            self._answer(status, X_Error_Message=said)
        elif found := _RESOLVE.fullmatch(path):
            self._resolve(*map(unquote, found.groups()))
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif path == "/api/repos/create" and not self._has_token:
            self._answer(401, X_Error_Message="Invalid username or password.")
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            made = Repository(
                is_private=asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            made.commit({".gitattributes": b""})
            self.server.repositories[name] = made
            self._json({"url": f"{self.server.url}/{name}"})
        elif found := _LFS.fullmatch(path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif path.startswith("/large/"):
            self.server.large[path.removeprefix("/large/")] = body
            self._answer(200)
        elif (found := _API.fullmatch(path)) and (there := self._repository(found[1])):
            self._api(there, found[1], found[2] or "", unquote(found[3] or "main"), body)
        elif not found:
            self._answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = _handle  # noqa: N815 - the names are http.server's

    def _resolve(self, name: str, revision: str, file: str) -> None:
        there = self._repository(name)
        if there is None:
            return
        commit = there.find(revision)
        if commit is None:
            self._answer(404, X_Error_Code="RevisionNotFound")
            return
        data = there.commits[commit].get(file)
        if data is None:
            self._answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
            return
        size = self.server.said_size.get(file, len(data))
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        if self.command == "HEAD":
            self._answer(200, ETag=etag, X_Repo_Commit=commit, X_Linked_Size=str(size))
            return
        sent = self.server.spoil(self.command, file, data)
        # Clients of earlier versions go on where a download broke off.
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        span = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        self._answer(206 if begin else 200, sent[begin:], ETag=etag, Content_Range=span)

    def _api(self, there: Repository, name: str, action: str, revision: str, body: bytes) -> None:
        commit = there.find(revision)
        assert commit is not None
        files = there.commits[commit]
        if action in ("", "revision"):
            self._json({"id": name, "sha": commit, "private": there.is_private})
        elif action == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            self._json(
                [
                    {"type": "file", "path": one, "size": len(files[one]), "oid": "0" * 40}
                    for one in asked
                    if one in files
                ]
            )
        elif action == "preupload":
            self._json(
                {
                    "files": [
                        {
                            "path": one["path"],
                            "uploadMode": "lfs" if "safetensors" in one["path"] else "regular",
                            "shouldIgnore": False,
                        }
                        for one in json.loads(body)["files"]
                    ]
                }
            )
        else:
            oid = there.commit(self._changed(files, body))
            self._json({"commitUrl": f"{self.server.url}/{name}/commit/{oid}", "commitOid": oid})

    def _changed(self, files: dict[str, bytes], body: bytes) -> dict[str, bytes]:
        new = dict(files)
        for line in body.splitlines():
            entry = json.loads(line)
            kind, value = entry["key"], entry["value"]
            if kind == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                new[value["path"]] = self.server.large[value["oid"]]
            elif kind == "deletedFile":
                new.pop(value["path"])
        return new
