"""
A small server with the endpoints of the Hub that `huggingface_hub` uses to create repositories, to commit files
(directly or by Git LFS) and to download them. It keeps everything in memory, and can be made to break connections.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import transformers.utils.hub
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import _http


class HubState:
    """
    The state of the server.

    Attributes:
        endpoint (`str`): The address of the server.
        repos (`dict[str, dict[str, list[dict[str, bytes]]]]`): Repositories to branches to commits to files.
        private (`dict[str, bool]`): Whether a repository was created as a private one.
        objects (`dict[str, bytes]`): The LFS uploads, by their SHA-256.
        requests (`list[str]`): Method and path of every request, in order.
        messages (`list[str]`): The messages of the commits.
        tokens (`set[str]`): The tokens of the requests that came with one.
        breaks (`list[str]`): The requests to break off: each entry applies to one request whose method and path
            contain it.
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.repos: dict[str, dict[str, list[dict[str, bytes]]]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.tokens: set[str] = set()
        self.breaks: list[str] = []
        self.lock = threading.Lock()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[repo_id][revision][-1]


def commit_id(commits: list[dict[str, bytes]]) -> str:
    return hashlib.sha1(f"{len(commits)}:{sorted(commits[-1])}".encode()).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    ROUTES = (
        ("POST", r"/api/repos/create", "create_repo"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("POST", r"/api/models/(.+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/(.+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/(.+)/commit/([^/]+)", "commit"),
        ("POST", r"/(.+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models/(.+)/tree/([^/]+)(/.+)?", "tree"),
        ("GET", r"/api/models/(.+)/revision/([^/]+)", "info"),
        ("HEAD|GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    @property
    def hub(self) -> HubState:
        return self.server.hub

    def log_message(self, *args):
        pass

    def handle_request(self):
        path = urlsplit(self.path).path
        line = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(line)
            broken = next((entry for entry in self.hub.breaks if entry in line), None)
            if broken is not None:
                self.hub.breaks.remove(broken)
        length = int(self.headers.get("Content-Length", 0))
        if broken is not None:  # in the middle of the body, without an answer
            self.rfile.read(length // 2)
            self.close_connection = True
            return
        self.body = self._read_chunks() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        if self.headers.get("Authorization"):
            self.hub.tokens.add(self.headers["Authorization"].removeprefix("Bearer "))
        for methods, pattern, name in self.ROUTES:
            match = re.fullmatch(pattern, path)
            if self.command in methods.split("|") and match:
                return getattr(self, name)(*(unquote(group) for group in match.groups() if group))
        self.answer(404, {"error": f"no route for {line}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def _read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def answer(self, status: int, content: object = None, headers: dict[str, str] | None = None):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def missing(self, code: str):
        self.answer(404, {"error": code}, {"X-Error-Code": code, "X-Error-Message": code})

    def commits_of(self, repo_id: str, revision: str) -> list[dict[str, bytes]] | None:
        branches = self.hub.repos.get(repo_id)
        if branches is None:
            return self.missing("RepoNotFound")
        for name, commits in branches.items():
            for end in range(len(commits), 0, -1):
                if revision in (name, commit_id(commits[:end])) and (revision != name or end == len(commits)):
                    return commits if revision == name else commits[:end]
        return self.missing("RevisionNotFound")

    def create_repo(self):
        request = json.loads(self.body)
        repo_id = f"{request.get('organization') or 'tester'}/{request['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo_id}", "id": repo_id, "name": repo_id}
        if repo_id in self.hub.repos:
            return self.answer(409, {"error": "You already created this model repo", **url})
        self.hub.repos[repo_id] = {"main": [{".gitattributes": b"*.safetensors filter=lfs\n"}]}
        # earlier clients send `private`
        self.hub.private[repo_id] = request.get("visibility") == "private" or request.get("private") is True
        self.answer(200, url)

    def validate_yaml(self):
        self.answer(200, {"errors": [], "warnings": []})

    def create_branch(self, repo_id: str, branch: str):
        if branch in self.hub.repos[repo_id]:
            return self.answer(409, {"error": "Reference already exists"})
        self.hub.repos[repo_id][branch] = list(self.hub.repos[repo_id]["main"])
        self.answer(200, {})

    def preupload(self, repo_id: str, revision: str):
        if self.commits_of(repo_id, revision) is None:
            return
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(self.body)["files"]
        ]
        self.answer(200, {"files": files})

    def lfs_batch(self, repo_id: str):
        objects = [
            {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] in self.hub.objects  # then it need not be sent
            else {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}}
            for wanted in json.loads(self.body)["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.answer(400, {"error": "other content than its SHA-256 says"})
        self.hub.objects[oid] = self.body
        self.answer(200, {})

    def commit(self, repo_id: str, revision: str):
        commits = self.commits_of(repo_id, revision)
        if commits is None:
            return
        files, lines = dict(commits[-1]), [json.loads(line) for line in self.body.splitlines()]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commits.append(files)
        url = f"{self.hub.endpoint}/{repo_id}/commit/{commit_id(commits)}"
        self.answer(200, {"commitUrl": url, "commitOid": commit_id(commits)})

    def whoami(self):
        self.answer(200, {"type": "user", "name": "tester"})

    def tree(self, repo_id: str, revision: str, folder: str | None = None):
        commits = self.commits_of(repo_id, revision)
        if commits is not None:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in sorted(commits[-1].items())
                if name.startswith(f"{(folder or '').strip('/')}/".lstrip("/"))
            ]
            if folder and not entries:
                return self.missing("EntryNotFound")
            assert parse_qs(urlsplit(self.path).query).get("recursive") != ["false"]
            self.answer(200, entries)

    def info(self, repo_id: str, revision: str):
        commits = self.commits_of(repo_id, revision)
        if commits is not None:
            siblings = [{"rfilename": name} for name in sorted(commits[-1])]
            self.answer(
                200,
                {"id": repo_id, "sha": commit_id(commits), "private": self.hub.private[repo_id], "siblings": siblings},
            )

    def resolve(self, repo_id: str, revision: str, name: str):
        commits = self.commits_of(repo_id, revision)
        if commits is None:
            return
        if name not in commits[-1]:
            return self.missing("EntryNotFound")
        content = commits[-1][name]
        is_lfs = name.endswith(".safetensors")
        etag = (hashlib.sha256 if is_lfs else hashlib.sha1)(content).hexdigest()
        self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit_id(commits)})


@contextlib.contextmanager
def serve_hub() -> Iterator[HubState]:
    """
    Yields:
        `HubState`: The state of the server, and its `endpoint`, for `HF_ENDPOINT`.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.daemon_threads = True
    server.hub = HubState(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def direct_client(endpoint: str, folder: Path, set_attribute: Callable = setattr) -> None:
    """
    Direct the Hub client of this process to a server.

    Args:
        endpoint (`str`): The address of the server.
        folder (`Path`): Where the client has its cache.
        set_attribute (`Callable`, *optional*): What sets an attribute of an object.
    """
    for name, value in {
        "ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(folder / "cache"),
        "HF_TOKEN_PATH": str(folder / "no-token"),
    }.items():
        set_attribute(constants, name, value)
    set_attribute(hf_api.api, "endpoint", endpoint)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, with the Hub client of this process directed to it."""
    with serve_hub() as state:
        direct_client(state.endpoint, tmp_path, monkeypatch.setattr)
        # which earlier releases of transformers do not have
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
        # between attempts
        monkeypatch.setattr(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield state
