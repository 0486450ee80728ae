"""A server on loopback that speaks the API of the Hugging Face hub, and a process in which the hub's real client runs.

`Hub` serves repositories with several commits, plain files under /files/, and faults: refused requests, cut
connections and wrong content. Large files are redirected to a second server, as the hub redirects to its storage. With
the token, clients can make repositories of `WRITABLE` and commit to them.
`ClientProcess` runs programs in one process of its own, because the client reads HF_ENDPOINT when it is imported.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
TOKEN = "hf_secretOfThisTest"
WRITABLE = "org"
"""The organisation to which the account of the token may write."""
LARGE = (".bin", ".safetensors", ".zip", ".parquet")
"""Suffixes of files in large file storage."""
_PAGE = 3
"""Entries of one page of a listing."""


@dataclass
class Repository:
    """A repository: its commits, the newest last, as {path: content}; main is the newest."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    licence: str | None = None

    def push(self, files: Mapping[str, bytes]) -> str:
        """Adds a commit with these files and returns its name."""
        digest = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode(), usedforsecurity=False)
        self.commits[digest.hexdigest()] = dict(files)
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or commit; None if there is none."""
        if revision == "main":
            return list(self.commits)[-1]
        return revision if revision in self.commits else None


@dataclass
class Fault:
    """What happens instead of an answer to the next `times` requests whose path matches.

    Attributes:
        status: an answer without content.
        headers: of that answer.
        cut_after: the connection is closed after so many bytes of the content.
        content: is sent in place of the file.
    """

    path: str
    times: int = 1
    method: str = "GET"
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    content: bytes | None = None


@dataclass(frozen=True)
class Request:
    """A request that was made. `server` is hub or storage."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


class Hub:
    """The servers and what they serve; tests change the attributes while it runs.

    Attributes:
        repositories: by `datasets/ORG/NAME` or `models/ORG/NAME`.
        files: plain files by the part of their path behind /files/.
        redirects: {path: Location} of plain redirects.
        faults: are used up in their order.
        requests: every request so far.
        uploads: contents of large files by sha256, of which a commit can consist.
        url: of the hub, for HF_ENDPOINT.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.files: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.content_types: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.uploads: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._servers = [self._start("hub"), self._start("storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def add(self, source: str, files: Mapping[str, bytes], **settings: Any) -> Repository:
        """Adds a repository with one commit."""
        repository = self.repositories[source] = Repository(**settings)
        repository.push(files)
        return repository

    def downloads(self, start: int = 0) -> list[str]:
        """Paths of the contents that were sent since the request of this number."""
        sent = self.requests[start:]
        return [each.path for each in sent if each.method == "GET" and not each.path.startswith("/api/")]

    def close(self) -> None:
        """Ends the servers."""
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def take_fault(self, method: str, path: str) -> Fault | None:
        """The fault of a request, which is used up."""
        with self._lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def _start(self, name: str) -> ThreadingHTTPServer:
        hub = self

        class Handler(_Handler):
            server_name, served = name, hub

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    server_name: str
    served: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._handle()

    def do_HEAD(self) -> None:
        self._handle()

    def do_POST(self) -> None:
        self._upload()

    def do_PUT(self) -> None:
        self._upload()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""

    def _handle(self) -> None:
        url = urlsplit(self.path)  # of a request through a proxy it has a host
        path = unquote(url.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.served.requests.append(Request(self.server_name, self.command, path, headers))
        fault = self.served.take_fault(self.command, path)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, b"", fault.headers)
        elif path in self.served.redirects:
            self._answer(302, b"", {"Location": self.served.redirects[path]})
        elif path.startswith("/files/"):
            self._plain_file(path.removeprefix("/files/"), fault)
        elif path.startswith("/storage/"):
            self._stored_file(path.removeprefix("/storage/"), fault)
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), parse_qs(url.query))
        else:
            self._resolve(path.removeprefix("/"), fault)

    def _upload(self) -> None:
        """Requests of a client that makes a repository or a commit."""
        url, hub = urlsplit(self.path), self.served
        path = unquote(url.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        hub.requests.append(Request(self.server_name, self.command, path, headers))
        body = self.rfile.read(int(headers.get("content-length", 0)))
        fault = hub.take_fault(self.command, path)
        if fault is not None and fault.status is not None:
            self._answer(fault.status, b"", fault.headers)
        elif path.startswith("/storage/"):
            hub.uploads[path.removeprefix("/storage/")] = body
            self._answer(200, b"", {})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []}, {})
        elif headers.get("authorization") != f"Bearer {TOKEN}":
            self._answer(401, b"", {})
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            links = [{"upload": {"href": f"{hub.storage_url}/storage/{each['oid']}"}} for each in wanted]
            objects = [{**each, "actions": actions} for each, actions in zip(wanted, links, strict=True)]
            self._json({"transfer": "basic", "objects": objects}, {"Content-Type": "application/vnd.git-lfs+json"})
        elif "/preupload/" in path:
            modes = [
                {"path": each["path"], "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular"}
                for each in json.loads(body)["files"]
            ]
            self._json({"files": [{**mode, "shouldIgnore": False, "oid": None} for mode in modes]}, {})
        else:
            self._commit(path.removeprefix("/api/").partition("/commit/")[0], body)

    def _create(self, wanted: dict[str, Any]) -> None:
        owner, name = wanted.get("organization") or "tester", wanted["name"]
        if owner != WRITABLE:
            self._answer(403, b"", {})
            return
        status = 409 if f"models/{owner}/{name}" in self.served.repositories else 200
        if status == 200:
            is_private = wanted.get("private") or wanted.get("visibility") == "private"
            self.served.repositories[f"models/{owner}/{name}"] = Repository(private=bool(is_private))
        address = json.dumps({"url": f"{self.served.url}/{owner}/{name}"}).encode()
        self._answer(status, address, {"Content-Type": "application/json"})

    def _commit(self, source: str, body: bytes) -> None:
        repository, files = self.served.repositories[source], {}
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.served.uploads[value["oid"]]
        commit = repository.push(files)
        address = f"{self.served.url}/{source.removeprefix('models/')}/commit/{commit}"
        self._json({"success": True, "commitUrl": address, "commitOid": commit}, {})

    def _plain_file(self, name: str, fault: Fault | None) -> None:
        content = self.served.files.get(name)
        if content is None:
            self._answer(404, b"", {})
            return
        kind = self.served.content_types.get(name, "application/octet-stream")
        self._content(content, {"ETag": f'"{_sha256(content)[:16]}"', "Content-Type": kind}, fault)

    def _stored_file(self, digest: str, fault: Fault | None) -> None:
        contents = (
            content
            for repository in self.served.repositories.values()
            for files in repository.commits.values()
            for content in files.values()
        )
        self._content(next(each for each in contents if _sha256(each) == digest), {"ETag": f'"{digest}"'}, fault)

    def _repository(self, source: str) -> Repository | None:
        """The repository if this request may see it; otherwise the answer is sent."""
        repository = self.served.repositories.get(source)
        authorization = self.headers.get("Authorization")
        if authorization not in (None, f"Bearer {TOKEN}"):
            self._answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return None
        if repository is None or (repository.private and authorization is None):
            self._answer(401 if authorization is None else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        return repository

    def _may_download(self, repository: Repository) -> bool:
        authorization = self.headers.get("Authorization")
        if repository.gated and authorization is None:
            self._answer(401, b"", {"X-Error-Code": "GatedRepo"})
            return False
        return True

    def _api(self, path: str, query: dict[str, list[str]]) -> None:
        if path == "whoami-v2":
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                self._json({"type": "user", "name": "tester", "orgs": []}, {})
            else:
                self._answer(401, b"", {})
            return
        kind, owner, name, *rest = path.split("/")
        repository = self._repository(f"{kind}/{owner}/{name}")
        if repository is None:
            return
        if rest[:1] == ["auth-check"]:
            if self._may_download(repository):
                self._json({}, {})
            return
        commit = repository.resolve(rest[1] if len(rest) > 1 else "main")
        if commit is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif rest[:1] == ["tree"]:
            self._tree(repository.commits[commit], int(query.get("cursor", ["0"])[0]))
        else:
            values: dict[str, Any] = {
                "id": f"{owner}/{name}",
                "sha": commit,
                "gated": repository.gated and "auto",
                "private": repository.private,
            }
            if repository.licence:
                values["cardData"] = {"license": repository.licence}
            self._json(values, {})

    def _tree(self, files: Mapping[str, bytes], start: int) -> None:
        entries = []
        for path, content in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _git_blob(content)}
            if path.endswith(LARGE):
                entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
            entries.append(entry)
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries += [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)]
        more = {}
        if start + _PAGE < len(entries):
            more["Link"] = f'<{self.served.url}{urlsplit(self.path).path}?cursor={start + _PAGE}>; rel="next"'
        self._json(entries[start : start + _PAGE], more)

    def _resolve(self, path: str, fault: Fault | None) -> None:
        head, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        source = head if head.startswith("datasets/") else f"models/{head}"
        repository = self._repository(source)
        if repository is None or not self._may_download(repository):
            return
        commit = repository.resolve(revision)
        content = None if commit is None else repository.commits[commit].get(name)
        if commit is None or content is None:
            self._answer(404, b"", {"X-Error-Code": "RevisionNotFound" if commit is None else "EntryNotFound"})
        elif name.endswith(LARGE):
            linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
            location = {"Location": f"{self.served.storage_url}/storage/{_sha256(content)}"}
            self._answer(302, b"", {"X-Repo-Commit": commit, **linked, **location})
        else:
            self._content(content, {"X-Repo-Commit": commit, "ETag": f'"{_git_blob(content)}"'}, fault)

    def _content(self, content: bytes, headers: dict[str, str], fault: Fault | None) -> None:
        """Sends a file, or the range of it that is asked for."""
        if fault is not None and fault.content is not None:
            content = fault.content
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        version = self.headers.get("If-Range")
        status, start = 200, 0
        if wanted and version in (None, headers.get("ETag")):
            start = int(wanted[1])
            if start >= len(content):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self._answer(status, content[start:], headers, cut_after=None if fault is None else fault.cut_after)

    def _json(self, value: Any, headers: dict[str, str]) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})

    def _answer(self, status: int, content: bytes, headers: Mapping[str, str], cut_after: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        with suppress(ConnectionError):  # a client that has stopped
            self.wfile.write(content if cut_after is None else content[:cut_after])
        if cut_after is not None:
            self.close_connection = True


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


_WORKER = """
import contextlib, importlib, io, json, os, sys, time
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.02))  # the client waits a second before it tries again
answers = sys.stdout
for line in sys.stdin:
    call = json.loads(line)
    for name, value in call["environment"].items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = importlib.import_module(call["module"]).main(call["arguments"])
        except SystemExit as end:
            code = end.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), file=answers, flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """How a program ended: its exit code and what it has written."""

    code: int
    stdout: str
    stderr: str


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """The environment of a process whose client asks this hub and keeps its cache below `home`; without Xet."""
    hidden = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")
    proxies = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
    environment = {
        name: value for name, value in os.environ.items() if name not in hidden and name.lower() not in proxies
    }
    return environment | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "LLAVA_NEXT_CACHE": str(home / "cache"),
        "LLAVA_NEXT_MODELS": str(home / "models"),
        "PYTHONPATH": str(ROOT),
    }


class ClientProcess:
    """Runs programs with the hub's client, one after another in one process.

    Args:
        hub: is asked by the client.
        home: for its cache.
    """

    def __init__(self, hub: Hub, home: Path) -> None:
        self.home = home
        self._process = subprocess.Popen(
            [sys.executable, "-c", _WORKER],
            env=client_environment(hub, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, arguments: Sequence[str], **environment: str | None) -> Ended:
        """Runs `main` of a module with these arguments; None removes a variable of the environment."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        call = {"module": module, "arguments": list(arguments), "environment": environment}
        self._process.stdin.write(json.dumps(call) + "\n")
        self._process.stdin.flush()
        code, stdout, stderr = json.loads(self._process.stdout.readline())
        return Ended(code, stdout, stderr)

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate(timeout=30)


@contextmanager
def running_hub(home: Path) -> Iterator[tuple[Hub, ClientProcess]]:
    """A hub and a process of its client."""
    hub = Hub()
    client = ClientProcess(hub, home)
    try:
        yield hub, client
    finally:
        client.close()
        hub.close()
