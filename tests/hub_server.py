"""A hub on 127.0.0.1 for tests: real sockets, two hosts, and faults that are asked for one by one.

`with running_hub() as hub:` serves what `hub.put(repo, name, data)` was given, the way the hub
does: the answer for /{repo}/resolve/{revision}/{name} carries X-Repo-Commit, X-Linked-Size and
X-Linked-Etag; a large file redirects to a second host (localhost, another port), which serves the
bytes with ranges and an ETag of its own; a small one redirects to a relative address of the same
host. Refusals carry X-Error-Code. Each request for bytes takes one Fault from the list
`hub.faults`, or `hub.always` where it is empty; every other request takes one from
`hub.hub_faults`. `hub.log` holds them all.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


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

    A mirror may serve below a path, `prefix`; `gated` repositories are open to no token.
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
        self._lock = threading.Lock()
        self.servers = [_server(self, "hub"), _server(self, "cdn")]
        # clients up to 1.33 take another port of one host for the hub itself
        hub, cdn = (server.server_address[1] for server in self.servers)
        self.endpoint, self.cdn = f"http://127.0.0.1:{hub}", f"http://localhost:{cdn}"

    def put(self, repo: str, name: str, data: bytes, large: bool = True) -> None:
        """Offer a file; a large one is kept on the second host."""
        self.files[repo, name] = Stored(data, large)

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

    def _answer(self) -> None:
        get = self.headers.get
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
        place = re.fullmatch(r"(/api/resolve-cache/models)?/(.+?)(?:/resolve)?/([^/]+)/([^/]+)", path)
        cached, repo, revision, name = place.groups() if place else (None, "", "", "")
        key = repo, name
        stored = self.hub.files.get(key)
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
        elif has_bytes and stored:
            self._send_file(stored, fault)
        elif stored is None or repo in self.hub.gated or revision not in ("main", COMMIT):
            self._refuse(*key)
        else:
            there = f"/api/resolve-cache/models/{repo}/{COMMIT}/{name}?etag=%22{stored.etag}%22"
            location = self.hub.cdn + self.path if stored.large else self.hub.prefix + there
            headers = {**self._names(stored, fault), "Location": location, **fault.headers}
            self._reply(302 if stored.large else 307, headers, b"")

    def _refuse(self, repo: str, name: str) -> None:
        """The hub answers 401 for a repository that does not exist, too."""
        repos = {there for there, _ in self.hub.files}
        status, code = 401, "RepoNotFound"
        if repo in self.hub.gated:
            status, code = (403 if self.headers.get("Authorization") else 401), "GatedRepo"
        elif (repo, name) in self.hub.files:
            status, code = 404, "RevisionNotFound"
        elif repo in repos:
            status, code = 404, "EntryNotFound"
        self._reply(status, {"X-Error-Code": code, "X-Error-Message": code, "X-Repo-Commit": COMMIT}, b"refused")

    def _names(self, stored: Stored, fault: Fault) -> dict[str, str]:
        return {
            "X-Repo-Commit": COMMIT,
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
