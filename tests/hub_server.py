"""A small hub on the loopback address: what huggingface_hub's client asks of the real one, answered from memory.

It keeps repositories of models with their commits, takes uploads by the LFS protocol, and fails where a test says so.
Xet, the other way to upload, is not spoken: its servers are not part of the client.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN, READER = "hf_writes", "hf_reads"  # who may write, and who may only read
LFS = (".safetensors", ".bin", ".onnx", ".pt2")
Answer = tuple[int, dict[str, str], bytes]
MODEL = r"/api/models/(?P<repo>[^/]+/[^/]+)"
ID = r"(?P<repo>[^/]+/[^/]+)"


@dataclass
class Repo:
    """A repository: commits, oldest first, each the whole of its files, and names of some of them."""

    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit on the main branch and return its name."""
        told = repr([*((sha, None) for sha, _ in self.commits), *sorted(files.items())])
        self.names["main"] = hashlib.sha1(told.encode()).hexdigest()
        self.commits.append((self.names["main"], files))
        return self.names["main"]

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return a commit by its name, branch or tag."""
        return next((each for each in self.commits if each[0] == self.names.get(revision, revision)), None)


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Gone(Exception):
    """The server ends the connection without an answer."""


@dataclass
class Hub:
    """What a server holds, and what it was asked."""

    repos: dict[str, Repo] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    verified: list[str] = field(default_factory=list)
    lost: str | None = None  # a request whose line holds this is never answered, nor is any after it
    is_lost: bool = False
    url: str = ""

    def add(self, repo: str, files: dict[str, bytes], **about: Any) -> Repo:
        """Put a repository there."""
        self.repos[repo] = Repo(**about)
        self.repos[repo].commit(files)
        return self.repos[repo]


class Handler(BaseHTTPRequestHandler):
    """Answer one connection."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        length = int(self.headers.get("Content-Length") or 0)
        self.hub.asked.append(f"{method} {path}")
        try:
            if self.hub.is_lost or (self.hub.lost and self.hub.lost in f"{method} {path}"):
                self.hub.is_lost = True
                raise Gone
            body = self.rfile.read(length)
            for pattern, answer in ROUTES:
                found = re.fullmatch(pattern, f"{method} {path}")
                if found:
                    status, headers, content = answer(
                        self, body, **{k: unquote(v) for k, v in found.groupdict().items()}
                    )
                    break
            else:
                raise Refused(404, "EntryNotFound", f"nothing answers {method} {path}")
        except Gone:
            self.close_connection = True
            return
        except Refused as refused:
            status, content = refused.status, json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
        self.send_response(status)
        size = str(len(content))
        for name, value in {"Content-Type": "application/json", "Content-Length": size, **headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(content)

    # who asks, and for what

    def _token(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        if token not in (None, TOKEN, READER):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return token

    def _repo(self, name: str) -> Repo:
        token, repo = self._token(), self.hub.repos.get(name)
        if repo is None or (repo.private and token != TOKEN):
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _at(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self._repo(name).at(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def _written(self, name: str) -> Repo:
        if self._token() is None:
            raise Refused(401, "", "Invalid username or password.")
        repo = self._repo(name)
        if self._token() != TOKEN:
            raise Refused(403, "", f"You don't have the required permissions to write to {name}.")
        return repo

    # answers

    def create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if self._token() is None:
            raise Refused(401, "", "Invalid username or password.")
        if self._token() != TOKEN:
            raise Refused(
                403, "", f"You don't have the rights to create a model under the namespace {asked['organization']}"
            )
        made = name not in self.hub.repos
        if made:
            private = asked.get("visibility") == "private" or asked.get("private") is True
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        return _json({"url": f"{self.hub.url}/{name}", "name": name}, 200 if made else 409)

    def yaml(self, body: bytes) -> Answer:
        import yaml

        found = re.match(r"---\n(.*?)\n---", json.loads(body)["content"], re.S)
        is_sound = found is not None and isinstance(yaml.safe_load(found[1]), dict)
        return _json(
            {"errors": [] if is_sound else [{"message": "no front matter"}], "warnings": []}, 200 if is_sound else 400
        )

    def info(self, _: bytes, repo: str, revision: str = "main") -> Answer:
        import yaml

        sha, files = self._at(repo, revision)
        found = re.match(r"---\n(.*?)\n---", files.get("README.md", b"").decode(), re.S)
        card = yaml.safe_load(found[1]) if found else None
        about = self.hub.repos[repo]
        return _json({
            "_id": "1", "id": repo, "modelId": repo, "sha": sha, "private": about.private,
            "gated": "manual" if about.gated else False, "tags": [], "downloads": 0, "likes": 0,
            "siblings": [{"rfilename": name} for name in files], "cardData": card,
        })  # fmt: skip

    def tree(self, _: bytes, repo: str, revision: str) -> Answer:
        return _json([_entry(name, each) for name, each in self._at(repo, revision)[1].items()])

    def resolve(self, _: bytes, repo: str, revision: str, path: str) -> Answer:
        sha, files = self._at(repo, revision)
        if self.hub.repos[repo].gated:
            raise Refused(403 if self._token() else 401, "GatedRepo", f"Access to model {repo} is restricted.")
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            digest = hashlib.sha256(content).hexdigest()
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None:
            return 200, headers, content
        start, stop = int(asked[1]), int(asked[2] or len(content)) + 1
        part = content[start:stop]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return 206, headers, part

    def preupload(self, body: bytes, repo: str, revision: str) -> Answer:
        self._written(repo)
        there = self._at(repo, revision)[1]
        files = []
        for each in json.loads(body)["files"]:
            name = each["path"]
            mode = "lfs" if name.endswith(LFS) else "regular"
            oid = _entry(name, there[name]).get("lfs", {}).get("oid") or _oid(there[name]) if name in there else None
            files.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": files})

    def batch(self, body: bytes, repo: str) -> Answer:
        self._written(repo)
        objects = []
        for each in json.loads(body)["objects"]:
            put = {"href": f"{self.hub.url}/lfs/{each['oid']}"}
            verify = {"href": f"{self.hub.url}/verify/{each['oid']}"}
            known = {} if each["oid"] in self.hub.blobs else {"actions": {"upload": put, "verify": verify}}
            objects.append({"oid": each["oid"], "size": each["size"], **known})
        return _json({"transfer": "basic", "objects": objects})

    def upload(self, body: bytes, oid: str) -> Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "", "these are other bytes")
        self.hub.blobs[oid] = body
        return _json({})

    def verify(self, body: bytes, oid: str) -> Answer:
        asked = json.loads(body)
        if len(self.hub.blobs.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(404, "", "no such object")
        self.hub.verified.append(oid)
        return _json({})

    def commit(self, body: bytes, repo: str, revision: str) -> Answer:
        there = self._written(repo)
        sha, before = self._at(repo, revision)
        files = dict(before)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, sha):
                raise Refused(412, "", "A commit has happened since. Please refresh and try again.")
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refused(400, "", f"{value['path']} was never uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = there.commit(files)
        return _json({"commitUrl": f"{self.hub.url}/{repo}/commit/{made}", "commitOid": made, "success": True})


ROUTES = [
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.yaml),
    (rf"GET {MODEL}", Handler.info),
    (rf"GET {MODEL}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET {MODEL}/tree/(?P<revision>[^/]+)", Handler.tree),
    (rf"POST {MODEL}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST {MODEL}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST /{ID}\.git/info/lfs/objects/batch", Handler.batch),
    (r"PUT /lfs/(?P<oid>\w+)", Handler.upload),
    (r"POST /verify/(?P<oid>\w+)", Handler.verify),
    (rf"(?:GET|HEAD) /{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]


def _json(value: Any, status: int = 200) -> Answer:
    return status, {}, json.dumps(value).encode()


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
    if name.endswith(LFS):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def serving() -> Iterator[Hub]:
    """Serve an empty hub until the block ends; its ``url`` is for ``HF_ENDPOINT``."""
    hub = Hub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
