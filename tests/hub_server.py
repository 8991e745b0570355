"""A hub on 127.0.0.1 for tests: real sockets, two hosts, and faults that are asked for one by one.

`with running_hub() as hub:` serves what `hub.put(repo, name, data)` was given, the way the hub
does: the answer for /{repo}/resolve/{revision}/{name} carries X-Repo-Commit, X-Linked-Size and
X-Linked-Etag; a large file redirects to a second host (localhost, another port), which serves the
bytes with ranges and an ETag of its own; a small one redirects to a relative address of the same
host. Refusals carry X-Error-Code. Each request for bytes takes one Fault from the list
`hub.faults`, or `hub.always` where it is empty; every other request takes one from
`hub.hub_faults`. `hub.log` holds them all.

The API has the routes that huggingface_hub asks for the description and the listing of a repository, and to make one
and commit to it: regular files in the commit itself, large ones by git LFS. Writing needs the token `WRITER`. Each
commit keeps its files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
WRITER = "hf_writer"
#: Endings of files that the hub keeps in git itself.
REGULAR = (".md", ".yaml", ".json", ".txt")


@dataclass(frozen=True)
class Fault:
    """What one request gets in place of the right answer.

    Args:
        status: answer this status (with `headers`) and no file.
        headers: sent too, in place of those of the same name.
        late: seconds of silence before the answer.
        drop_after: bytes of the body after which the connection is closed.
        stall: seconds of silence after `drop_after` bytes, before the connection is closed.
        pace: bytes per second, in small pieces; as fast as it goes where it is None.
        ignore_range: answer 200 with the whole file, whatever range was asked for.
        ignore_if_range: answer a range even where the file is another than the one asked for.
        wrong_bytes: the right length, other bytes.
        html: a web page in place of the file.
        lie: bytes that each header's size is larger (or, below 0, smaller) than the file's.
        short: bytes that the end of the body and its Content-Length lack; the other sizes are right.
        becomes: the file's content from the next request on.
        from_start: answer a range with the bytes from the first one on, and say so.
        drip: seconds between two bytes of the body (above 0) or of the header (below 0).
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    late: float = 0.0
    drop_after: int | None = None
    stall: float = 0.0
    pace: int | None = None
    ignore_range: bool = False
    ignore_if_range: bool = False
    wrong_bytes: bool = False
    html: bool = False
    lie: int = 0
    short: int = 0
    becomes: bytes | None = None
    from_start: bool = False
    drip: float = 0.0


@dataclass(frozen=True)
class Seen:
    """One request as it came: which host, method, path, range, If-Range, token and wanted encoding."""

    host: str
    method: str
    path: str
    range: str | None
    if_range: str | None
    token: str | None
    encoding: str | None


@dataclass
class Stored:
    data: bytes
    large: bool

    @property
    def etag(self) -> str:
        """The hub names a large file by its sha256 and a small one by its git blob hash."""
        if self.large:
            return hashlib.sha256(self.data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.data) + self.data).hexdigest()


class Hub:
    """Both hosts, their files, their faults and what was asked of them.

    A mirror may serve below a path, `prefix`; `gated` repositories are open to no token, `private` ones to `WRITER`.
    `commits` holds those of each repository that was pushed to, the newest last; one that `put` made has `COMMIT`.
    """

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], Stored] = {}
        self.faults: list[Fault] = []
        self.hub_faults: list[Fault] = []
        self.always: Fault | None = None
        self.log: list[Seen] = []
        self.sent = 0
        self.prefix = ""
        self.gated: set[str] = set()
        self.private: set[str] = set()
        self.commits: dict[str, list[str]] = {}
        self.uploaded: dict[str, bytes] = {}
        self._trees: dict[str, dict[str, Stored]] = {}
        self._lock = threading.Lock()
        self.servers = [_server(self, "hub"), _server(self, "cdn")]
        # clients up to 1.33 take another port of one host for the hub itself
        hub, cdn = (server.server_address[1] for server in self.servers)
        self.endpoint, self.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"

    def put(self, repo: str, name: str, data: bytes, large: bool = True) -> None:
        """Offer a file; a large one is kept on the second host."""
        self.files[repo, name] = Stored(data, large)

    def tree(self, repo: str, revision: str) -> tuple[str, dict[str, Stored]] | None:
        """The commit that a revision stands for, and its files; None if there is no such revision."""
        newest = self.commits.get(repo, [COMMIT])[-1]
        if revision in ("main", newest):
            return newest, {name: stored for (there, name), stored in self.files.items() if there == repo}
        return (revision, self._trees[revision]) if revision in self.commits.get(repo, []) else None

    def commit(self, repo: str, changes: dict[str, Stored | None]) -> str:
        """Put files into a repository, or take those that are None out of it, and return the commit."""
        for name, stored in changes.items():
            self.files.pop((repo, name), None)
            if stored is not None:
                self.files[repo, name] = stored
        number = len(self.commits.setdefault(repo, []))
        made = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        self.commits[repo].append(made)
        self._trees[made] = self.tree(repo, "main")[1]  # type: ignore[index]
        return made

    def repos(self) -> set[str]:
        """Every repository that there is."""
        return {repo for repo, _ in self.files} | {*self.commits}

    def take(self, for_bytes: bool) -> Fault:
        """The fault of the next request for bytes (where none is left: the one that always holds)
        or of the next other request.
        """
        faults, standing = (self.faults, self.always) if for_bytes else (self.hub_faults, None)
        with self._lock:
            return faults.pop(0) if faults else standing or Fault()

    def ranges(self) -> list[str | None]:
        """The Range headers of the requests for bytes, in turn."""
        return [seen.range for seen in self.log if seen.method == "GET" and seen.host == "cdn"]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    for server in hub.servers:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in hub.servers:
            server.shutdown()
            server.server_close()


def _server(hub: Hub, host: str) -> ThreadingHTTPServer:
    handler = type("Handler", (_Handler,), {"hub": hub, "host": host})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    host: str

    def log_message(self, *_: Any) -> None:
        """The log is hub.log, not stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        get = self.headers.get
        self.body = self._read_body() if self.command in ("POST", "PUT") else b""
        self.hub.log.append(
            Seen(
                self.host,
                self.command,
                self.path,
                get("Range"),
                get("If-Range"),
                get("Authorization"),
                get("Accept-Encoding"),
            )
        )
        path = unquote(urlsplit(self.path).path).removeprefix(self.hub.prefix)
        place = re.fullmatch(r"(/api/resolve-cache/models)?/([^/]+/[^/]+)(?:/resolve)?/([^/]+)/(.+)", path)
        cached, repo, revision, name = place.groups() if place else (None, "", "", "")
        key = repo, name
        tree = self.hub.tree(repo, revision)
        stored = tree[1].get(name) if tree else None
        self.commit = tree[0] if tree else COMMIT
        route = self._route(path) if self.command in ("POST", "PUT") or path.startswith("/api/models/") else None
        has_bytes = stored is not None and (self.host == "cdn" or cached is not None)
        fault = self.hub.take(has_bytes and self.command == "GET")
        time.sleep(fault.late)
        if stored and fault.becomes is not None:
            self.hub.put(*key, fault.becomes, stored.large)
        if fault.drip < 0:
            self._drip(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 60_000, -fault.drip)
        elif fault.status:
            self._reply(fault.status, fault.headers, b"refused")
        elif fault.html:
            self._reply(200, {"Content-Type": "text/html", **fault.headers}, b"<html>please log in</html>")
        elif route:
            route()
        elif has_bytes and stored:
            self._send_file(stored, fault)
        elif stored is None or tree is None or self._is_closed(repo):
            self._refuse(*key)
        else:
            there = f"/api/resolve-cache/models/{repo}/{tree[0]}/{name}?etag=%22{stored.etag}%22"
            location = self.hub.cdn + self.path if stored.large else self.hub.prefix + there
            headers = {**self._names(stored, fault), "Location": location, **fault.headers}
            self._reply(302 if stored.large else 307, headers, b"")

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _is_closed(self, repo: str) -> bool:
        return repo in self.hub.gated or (repo in self.hub.private and not self._may_write())

    def _may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {WRITER}"

    def _route(self, path: str) -> Callable[[], None] | None:
        """What answers a request to the API, None for another one."""
        routes: tuple[tuple[str, str, Callable[..., None]], ...] = (
            ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._describe),
            ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._list),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", self._preupload),
            ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._lfs_batch),
            ("PUT", r"/lfs/([0-9a-f]{64})", self._lfs_upload),
            ("POST", r"/api/models/([^/]+/[^/]+)/commit/[^/]+", self._commit),
        )
        for method, pattern, answer in routes:
            if method == self.command and (found := re.fullmatch(pattern, path)):
                return partial(answer, *found.groups())
        return partial(self._reply, 404, {}, b"no such route")

    def _json(self, content: Any, status: int = 200) -> None:
        self._reply(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _describe(self, repo: str, revision: str | None) -> None:
        if tree := self._readable(repo, revision or "main"):
            ids = {"_id": "0" * 24, "id": repo, "modelId": repo, "sha": tree[0], "tags": []}
            siblings = [{"rfilename": name} for name in tree[1]]
            self._json({**ids, "private": repo in self.hub.private, "gated": False, "siblings": siblings})

    def _readable(self, repo: str, revision: str) -> tuple[str, dict[str, Stored]] | None:
        """The commit and files of a repository; None, and a refusal is the answer, if they cannot be read."""
        tree = self.hub.tree(repo, revision)
        if tree and repo in self.hub.repos() and not self._is_closed(repo):
            return tree
        self._refuse(repo, next((name for there, name in self.hub.files if there == repo), ""))
        return None

    def _list(self, repo: str, revision: str) -> None:
        if not (tree := self._readable(repo, revision)):
            return
        listed = []
        for name, stored in tree[1].items():
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(stored.data), "oid": stored.etag[:40]}
            if stored.large:
                row["lfs"] = {"oid": stored.etag, "size": len(stored.data), "pointerSize": 130}
            listed.append(row)
        self._json(listed)

    def _writes(self) -> bool:
        """Whether the token may write; if not, the answer says so."""
        if not self._may_write():
            status = 403 if self.headers.get("Authorization") else 401
            self._json({"error": "you have no right to write here"}, status)
        return self._may_write()

    def _validate(self) -> None:
        content = json.loads(self.body)["content"]
        errors = [] if re.match(r"---\n(\w+:.*\n(- .*\n)*)+---\n", content) else [{"message": "no front matter"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _create(self) -> None:
        asked = json.loads(self.body)
        repo = f"{asked['organization']}/{asked['name']}"
        if not self._writes():
            return
        there = repo in self.hub.repos()
        if not there:
            self.hub.commit(repo, {".gitattributes": Stored(b"*.safetensors filter=lfs\n", False)})
            is_private = asked.get("private") or asked.get("visibility") == "private"  # by the client
            self.hub.private |= {repo} if is_private else set()
        answer = {"url": f"{self.hub.endpoint}/{repo}", "name": repo, "id": "0" * 24}
        self._json({**answer, "error": "it exists"} if there else answer, 409 if there else 200)

    def _preupload(self, repo: str) -> None:
        if not self._writes():
            return
        rows = []
        for file in json.loads(self.body)["files"]:
            mode = "regular" if file["path"].endswith(REGULAR) else "lfs"
            rows.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if stored := self.hub.files.get((repo, file["path"])):
                rows[-1]["oid"] = stored.etag
        self._json({"files": rows})

    def _lfs_batch(self, repo: str) -> None:
        if not self._writes():
            return
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.uploaded:
                row["actions"] = {"upload": {"href": f"{self.hub.cdn}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(row)
        self._json({"transfer": "basic", "objects": objects})

    def _lfs_upload(self, oid: str) -> None:
        right = hashlib.sha256(self.body).hexdigest() == oid
        if right:
            self.hub.uploaded[oid] = self.body
        self._reply(200 if right else 422, {}, b"")

    def _commit(self, repo: str) -> None:
        if not self._writes():
            return
        changes: dict[str, Stored | None] = {}
        for line in self.body.splitlines():
            kind, value = (json.loads(line)[key] for key in ("key", "value"))
            if kind == "file":
                changes[value["path"]] = Stored(base64.b64decode(value["content"]), False)
            elif kind == "lfsFile":
                changes[value["path"]] = Stored(self.hub.uploaded[value["oid"]], True)
            elif kind == "deletedFile":
                changes[value["path"]] = None
        made = self.hub.commit(repo, changes)
        self._json({"success": True, "commitOid": made, "commitUrl": f"{self.hub.endpoint}/{repo}/commit/{made}"})

    def _refuse(self, repo: str, name: str) -> None:
        """The hub answers 401 for a repository that does not exist, too."""
        repos = set() if repo in self.hub.private and not self._may_write() else self.hub.repos()
        status, code = 401, "RepoNotFound"
        if repo in self.hub.gated:
            status, code = (403 if self.headers.get("Authorization") else 401), "GatedRepo"
        elif repo in repos and (repo, name) in self.hub.files:
            status, code = 404, "RevisionNotFound"
        elif repo in repos:
            status, code = 404, "EntryNotFound"
        self._reply(status, {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT}, b"refused")

    def _names(self, stored: Stored, fault: Fault) -> dict[str, str]:
        return {
            "X-Repo-Commit": self.commit,
            "X-Linked-Etag": f'"{stored.etag}"',
            "X-Linked-Size": str(len(stored.data) + fault.lie),
        }

    def _reply(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _send_file(self, stored: Stored, fault: Fault) -> None:
        """The bytes from the start of the asked range, with the fault applied."""
        data, etag = stored.data, f'"cdn-{stored.etag[:12]}"'
        if fault.wrong_bytes:
            data = bytes(255 - byte for byte in data)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = fault.ignore_if_range or self.headers.get("If-Range", etag) == etag
        if fault.ignore_range or not same:
            asked = None
        start, size = int(asked[1]) if asked and not fault.from_start else 0, len(data) + fault.lie
        if asked and start >= len(data):
            self._reply(416, {"Content-Range": f"bytes */{len(data)}"}, b"")
            return
        headers = {"Content-Type": "application/octet-stream", "ETag": etag}
        if self.host == "hub":
            headers = {**self._names(stored, fault), **headers, "ETag": f'"{stored.etag}"'}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        headers["Content-Length"] = str(size - start - fault.short)
        self.send_response(206 if asked else 200)
        for key, value in {**headers, **fault.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        body = data[start : size - fault.short]
        cut = len(body) if fault.drop_after is None else fault.drop_after
        if fault.drip:
            self._drip(body[:cut], fault.drip)
        self._write(body[:cut], fault.pace)
        if fault.stall:
            time.sleep(fault.stall)
        if cut < len(body) or fault.lie:
            self.close_connection = True
            self.connection.close()

    def _drip(self, content: bytes, pause: float) -> None:
        """Send a byte at a time until the client goes away."""
        self.close_connection = True
        for number in range(len(content)):
            try:
                self.wfile.write(content[number : number + 1])
                self.wfile.flush()
            except OSError:
                return
            time.sleep(pause)

    def _write(self, body: bytes, pace: int | None) -> None:
        """Send `body`, all at once or in pieces of 1/100 second."""
        step = pace // 100 if pace else max(1, len(body))
        for start in range(0, len(body), step):
            piece = body[start : start + step]
            try:
                self.wfile.write(piece)
                self.wfile.flush()
            except OSError:  # the client went away, as a killed one does
                self.close_connection = True
                return
            self.hub.sent += len(piece)
            if pace:
                time.sleep(len(piece) / pace)
