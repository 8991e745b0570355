"""A downloader over HTTP ranges that goes on where an earlier run stopped.

`huggingface_hub` gives the metadata (size, commit, hash). The bytes come by the standard library, because the hub's
own client (version 1.18 and later) starts an interrupted file again from nothing. They go to NAME.part beside
NAME.part.json, which takes the final name when its hash is right.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import queue
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from LightningDiT.console import Progress, duration, format_bytes
from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import (
    disk_errors,
    kind_of,
    open_own,
    open_regular,
    read_json,
    require_replaceable,
    require_space,
    set_aside,
    try_lock,
    write_text,
)
from setup_steps import project
from setup_steps.project import STEP2, STEP3, fix_packages, step_command

CHUNK = 1 << 20
ENOUGH = 1 << 16  # bytes of one answer after which failures are counted from the start: a byte a time is no progress
LARGEST = 10**15  # bytes of any file; a size beyond it is no answer of a hub
HASH_BEHIND = 4  # most chunks that wait for the hash
RENAMES_OPEN_FILES = os.name != "nt"
SPARE_BYTES = 64_000_000  # disk left free beside the downloads
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

#: The running command, or step 2, with other options.
again = partial(project.again, STEP2)


def no_network() -> str:
    """Return what to do if the hub does not answer."""
    return (
        "check the internet connection (Kaggle: Settings, Internet, On) and --endpoint or HF_ENDPOINT, "
        f"then {again()}; without internet: {step_command(STEP3, '--model', 'bundled')}"
    )


@dataclass(frozen=True)
class Patience:
    """How long a download waits and how often it tries again.

    Args:
        timeout: seconds without a byte after which a connection is given up.
        attempts: failures in a row, each with less than ENOUGH new bytes, that end the download.
        backoff: seconds before the second attempt; doubles with each failure in a row.
        longest_wait: bound of one wait; a longer Retry-After ends the download.
    """

    timeout: float = 30.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0
    window: float = 60.0  # seconds, over which at least `floor` bytes each have to come on average
    floor: float = 1000.0


PATIENCE = Patience()


@dataclass(frozen=True)
class RemoteFile:
    """A file of the hub: `url` is pinned to a commit; `etag` is the sha256 of a large file (64 hex digits) or the git
    blob hash of a small one (40).
    """

    name: str
    url: str
    size: int
    etag: str
    revision: str

    @property
    def hashed_by(self) -> str | None:
        """ "sha256", "git", or None if the hub gives no hash that can be checked."""
        if not re.fullmatch(r"[0-9a-f]+", self.etag):
            return None
        return {64: "sha256", 40: "git"}.get(len(self.etag))


@dataclass(frozen=True)
class Fetched:
    """A finished download: bytes of earlier runs, bytes of this one, seconds."""

    resumed_from: int
    fetched: int
    seconds: float


class _TryAgainError(Exception):
    """A failure that may pass by itself, with the seconds that the server asked to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def new_hash(remote: RemoteFile) -> Any:
    """Return a running hash of the kind of `remote.etag`, sha256 if that is unknown."""
    if remote.hashed_by == "git":
        return hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    return hashlib.sha256()


class BackgroundHash:
    """A hash that a second thread computes, in the order of the calls, while the next bytes arrive: hashlib releases
    the interpreter lock.
    """

    def __init__(self, remote: RemoteFile) -> None:
        self._digest = new_hash(remote)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: bytes) -> None:
        """Hand over bytes; wait while HASH_BEHIND others are not hashed yet."""
        self._waiting.append(self._thread.submit(self._digest.update, data))
        if len(self._waiting) > HASH_BEHIND:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """Return the hash of all bytes."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def read_through(path: Path, digest: Any, label: str) -> None:
    """Feed a file to a hash (of hashlib, or a BackgroundHash), with progress."""
    with open_regular(path) as file, Progress(path.stat().st_size, "byte", label=label) as progress:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update(len(chunk))


def hash_file(path: Path, remote: RemoteFile) -> str:
    """Return the hash of a file as the hub computes it, with progress."""
    digest = new_hash(remote)
    read_through(path, digest, f"hashing {path.name}")
    return digest.hexdigest()


def use_endpoint(endpoint: str | None) -> None:
    """Select a mirror, before anything imports huggingface_hub, which reads HF_ENDPOINT once.

    Raises:
        LightningDiTError: the address is not http(s)://host.
    """
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    if endpoint is None:
        return
    try:
        parts = urllib.parse.urlsplit(endpoint)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, brackets that are not closed
        fits = False
    if not fits or any(character.isspace() for character in endpoint):
        raise LightningDiTError(
            f"endpoint {endpoint!r} is no address, http://HOST or https://HOST was expected",
            f"{again('--endpoint', 'https://HOST', without=['--endpoint'])}, or unset HF_ENDPOINT",
        )
    os.environ["HF_ENDPOINT"] = endpoint.rstrip("/")


def hub_token() -> str | None:
    """Return the token of HF_TOKEN or of a hub login; raise LightningDiTError if no token looks like it."""
    from huggingface_hub import get_token

    token = get_token()
    if token and not (token.isascii() and token.isprintable()):
        fix = f"unset HF_TOKEN, then {again()}"
        raise LightningDiTError("HF_TOKEN holds characters that no token of the hub has", fix)
    return token


def describe(repo: str, name: str, patience: Patience = PATIENCE) -> RemoteFile:
    """Ask the hub for a file's size, commit and hash.

    Raises:
        LightningDiTError: huggingface_hub is absent, the hub is out of reach or refuses.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError as error:
        raise LightningDiTError(f"huggingface_hub does not import ({error})", fix_packages()) from error
    # The HTTP library beneath huggingface_hub has changed twice (requests, httpx, httpx2); its error for "no answer"
    # is a base of the hub's own error, or an OSError.
    hub_errors = (OSError, *HfHubHTTPError.__bases__)
    hub_token()
    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(repo, name, endpoint=endpoint)
    for attempt in range(1, patience.attempts + 1):
        try:
            limit = max(patience.window, 4 * patience.timeout)
            data = _within(limit, partial(get_hf_file_metadata, url, timeout=patience.timeout))
            break
        except ImportError as error:  # a kind of proxy that the HTTP library has no package for
            raise LightningDiTError(
                f"{_host(url)} cannot be reached through the proxy of this environment ({error})",
                f"unset https_proxy http_proxy all_proxy, or name an HTTP proxy there, then {again()}",
            ) from error
        except hub_errors as error:
            trouble = _explain_hub_error(error, repo, name, url)
            # without any answer a long wait only hides that the machine is offline
            if attempt >= (patience.attempts if trouble.wait is not None else min(2, patience.attempts)):
                raise LightningDiTError(f"{name}: {trouble}", no_network()) from error
            _wait(name, trouble, attempt, patience)
        except Exception as error:  # a server that lies makes the hub's client fail in arbitrary ways
            reason = f"{_host(url)} does not answer like a hub ({first_line(error)})"
            raise LightningDiTError(f"{name}: {reason}", no_network()) from error
    if data.commit_hash is None or data.size is None or data.etag is None or not 0 <= data.size <= LARGEST:
        raise LightningDiTError(
            f"{_host(url)} does not answer like a hub (no commit or size for {name}); "
            "a mirror or a login page of the network may stand between",
            f"unset HF_ENDPOINT or open a web page on this network once, then {again()}",
        )
    pinned = hf_hub_url(repo, name, revision=data.commit_hash, endpoint=endpoint)
    return RemoteFile(name, pinned, data.size, data.etag.lower(), data.commit_hash)


def _explain_hub_error(error: Exception, repo: str, name: str, url: str) -> _TryAgainError:
    """Return an error of huggingface_hub as a failure to retry, or raise LightningDiTError."""
    response = getattr(error, "response", None)
    if response is not None:
        return _explain_status(response.status_code, response.headers, repo, name, url)
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise LightningDiTError(f"{name}: HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE && {again()}")
    return _TryAgainError(f"{_host(url)} cannot be reached ({str(error) or type(error).__name__})")


def _explain_status(code: int, headers: Any, repo: str, name: str, url: str) -> _TryAgainError:
    """Return an HTTP status as a failure to retry (with a wait), or raise LightningDiTError."""
    host, login = _host(url), f"HF_TOKEN=your-token {again()}"
    if code in RETRY_STATUS:
        return _TryAgainError(f"{host} answered {code}", _retry_after(headers))
    reasons = {
        401: (f"{repo} is not open to this login, or does not exist there (401 from {host})", login),
        403: (
            f"this login may not read {repo} (403 from {host})",
            f"accept the conditions on the repository's page, then {login}",
        ),
        404: (f"{name} is not in {repo} (404 from {host})", f"check --endpoint or unset HF_ENDPOINT, then {again()}"),
    }
    raise LightningDiTError(*reasons.get(code, (f"{name}: {host} answered {code}", again())))


def _retry_after(headers: Any) -> float:
    """Return the seconds of a Retry-After header (a number or a date); 0 without one."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return min(float(value), 1e9)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return 0.0


def _wait(name: str, trouble: _TryAgainError, failures: int, patience: Patience) -> None:
    """Say why the next attempt comes later, and sleep until then."""
    asked = trouble.wait or 0.0
    if asked > patience.longest_wait:
        raise LightningDiTError(f"{name}: {trouble} and asks to wait {duration(asked)}", f"later: {again()}")
    seconds = max(asked, min(patience.backoff * 2 ** (failures - 1), patience.longest_wait))
    print(f"  {name}: {trouble}; next try in {duration(seconds)}")
    time.sleep(seconds)


def _host(url: str) -> str:
    """Return host and port, without a login that may stand before them; the beginning if there is no end of them."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2][:100]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https; send the token only while scheme, host and port stay the same.

    The standard handler copies every header to any host, and knows no 308 on Python 3.10.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request:
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise _TryAgainError(f"{_host(req.full_url)} leads to another kind of server ({newurl[:40]!r})")
        kept = dict(req.headers)
        if _origin(newurl) != _origin(req.full_url):
            kept = {key: value for key, value in kept.items() if key.lower() != "authorization"}
        return urllib.request.Request(newurl.replace(" ", "%20"), headers=kept, origin_req_host=req.origin_req_host)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class _Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Connections that a timer can end: the lines before a file can drip too, and no timeout of a byte notices."""

    def __init__(self) -> None:
        super().__init__()
        urllib.request.HTTPSHandler.__init__(self)
        self._made: list[http.client.HTTPConnection] = []

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._note, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(partial(self._note, http.client.HTTPSConnection), req, context=self._context)

    def _note(self, kind: Callable[..., http.client.HTTPConnection], *given: Any, **named: Any) -> Any:
        self._made.append(kind(*given, **named))
        return self._made[-1]

    def end(self) -> None:
        """Wake the thread that waits for an answer; it meets the end of the connection."""
        for connection in self._made:
            with contextlib.suppress(OSError, AttributeError):  # already closed
                connection.sock.shutdown(socket.SHUT_RDWR)


def _open(request: urllib.request.Request, patience: Patience) -> http.client.HTTPResponse:
    """Return an answer whose header came within the patience's window and timeout."""
    connections = _Connections()
    timer = threading.Timer(max(patience.window, patience.timeout), connections.end)
    timer.daemon = True
    timer.start()
    try:
        return urllib.request.build_opener(connections, _Redirects).open(request, timeout=patience.timeout)
    finally:
        timer.cancel()


def _within(seconds: float, call: Callable[[], Any]) -> Any:
    """Return what `call` returns or raise what it raises; OSError if that takes too long."""
    results: queue.Queue[tuple[Any, Exception | None]] = queue.Queue()

    def run() -> None:
        try:
            results.put((call(), None))
        except Exception as error:
            results.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer came in {duration(seconds)}") from None
    if error is not None:
        raise error
    return result


class PartFile:
    """NAME.part, its state file and the running hash of its content.

    The state says which file the part begins; a part of any other file is dropped. Writes are unbuffered, so that a
    killed process loses nothing that it had counted.

    Attributes:
        offset: bytes in the part.
        resumed_from: bytes of an earlier run among them.
        validator: the ETag of the host that served them.
        joined: the part holds bytes of more than one answer.
        changed: another ETag came with a later answer. From then on the hash alone decides: if a host's ETags differ
            from answer to answer, every answer would start again.
        ask_range: ask for the rest; otherwise, with a server that sends no rests, for the whole file, whose beginning
            is skipped.
    """

    def __init__(self, target: Path, remote: RemoteFile) -> None:
        self.target, self.remote = target, remote
        self.path = target.with_name(target.name + ".part")
        self.state_path = target.with_name(target.name + ".part.json")
        self.hash = BackgroundHash(remote)
        self.offset = self.resumed_from = 0
        self.validator: str | None = None
        self.joined = self.changed = False
        self.ask_range = True
        require_replaceable(target, aside=True)
        for path in (self.path, self.state_path):
            _forget_links(path)
        if kind_of(self.path) == "file" and self.path.stat().st_size and kind_of(self.state_path) is None:
            aside = set_aside(self.path, "old")  # the state is written before the first byte
            print(f"  {self.path.name}: is no beginning of a download; it is kept as {aside.name}")
        self._file: IO[bytes] = open_own(self.path)
        self._claim()

    def take_up(self) -> None:
        """Hash what an earlier run left, or drop it if it begins another file."""
        if self._fits():
            read_through(self.path, self.hash, f"reading {self.path.name} again")
        else:
            self._empty()
            self.state_path.unlink(missing_ok=True)
        self.offset = self.resumed_from = self.path.stat().st_size
        self.joined = self.offset > 0

    def _claim(self) -> None:
        """Raise LightningDiTError if another process writes this part, or has just renamed the finished one."""
        try:
            is_ours = try_lock(self._file) and os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            self._file.close()
            fix = f"wait for it or stop it, then {again()}"
            raise LightningDiTError(f"{self.path} is being written by another process", fix)

    def _fits(self) -> bool:
        """Return whether the part begins the file that the hub has now."""
        try:
            state = read_json(self.state_path)
            size = self.path.stat().st_size
        except (OSError, ValueError):
            return False
        if not isinstance(state, dict) or size > self.remote.size:
            return False
        wanted, validator = asdict(self.remote), state.pop("validator", None)
        self.validator = validator if state.get("url") == wanted["url"] else None
        # a hash names the content, whichever mirror or commit it comes from
        return state.get("etag") == wanted["etag"] if self.remote.hashed_by else state == wanted

    def note(self, validator: str | None) -> None:
        """Write the state file, with the ETag of the host that serves the bytes."""
        self.validator = validator
        write_text(self.state_path, json.dumps({**asdict(self.remote), "validator": validator}, indent=1))

    def write(self, chunk: bytes) -> None:
        """Append bytes and hash them; they count once they are in the file. A full disk is a LightningDiTError."""
        view = memoryview(chunk)
        with disk_errors(self.path):
            while view:
                view = view[self._file.write(view) :]
        self.hash.update(chunk)
        self.offset += len(chunk)

    def start_again(self) -> None:
        """Forget the bytes so far: they do not begin the file."""
        self.hash.close()
        self.hash = BackgroundHash(self.remote)
        self._empty()
        self.offset = self.resumed_from = 0
        self.joined = False

    def _empty(self) -> None:
        # only if needed: closing a file that was cut to nothing writes it out (ext4)
        if os.fstat(self._file.fileno()).st_size:
            self._file.truncate(0)

    def is_right(self) -> bool:
        """Return whether all bytes are there and hash to the hub's value."""
        named = self.remote.hashed_by
        return self.offset == self.remote.size and (named is None or self.hash.hexdigest() == self.remote.etag)

    def finish(self, aside: Path | None) -> None:
        """Give the part its final name, after renaming the file that has it to `aside`."""
        os.fsync(self._file.fileno())
        with self._let_go():
            if aside is not None:
                self.target.replace(aside)
            self.path.replace(self.target)
            self.state_path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the hashing thread and let go of the part; remove one without bytes."""
        self.hash.close()
        if not self._file.closed:
            empty = not os.fstat(self._file.fileno()).st_size
            with self._let_go():
                if empty:
                    self.path.unlink(missing_ok=True)
                    self.state_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _let_go(self) -> Iterator[None]:
        """Close the part after the block, which changes its name, so that no other process takes it meanwhile; or
        before the block on a system that cannot rename open files.
        """
        if not RENAMES_OPEN_FILES:
            self._file.close()
        try:
            yield
        finally:
            self._file.close()


def _forget_links(path: Path) -> None:
    """Remove a name that leads to a file of someone else: a link, or a second name of one file."""
    if path.is_symlink() or (kind_of(path) == "file" and path.stat().st_nlink > 1):
        print(f"  {path.name}: led to another file, which stays as it is; the download starts anew")
        path.unlink()


def require_disk(folder: Path, needed: int) -> None:
    """Raise LightningDiTError if the disk of `folder` lacks `needed` bytes and some spare."""
    fix = f"free space there, then {again()}; step 2 takes another folder by --models-dir"
    require_space(folder, needed + SPARE_BYTES, "the files", fix)


def download(
    remote: RemoteFile,
    target: Path,
    token: str | None = None,
    patience: Patience = PATIENCE,
    aside: Path | None = None,
) -> Fetched:
    """Fetch `remote` to `target`, going on from NAME.part.

    Either `target` is whole and its hash right, or it is as before; NAME.part keeps the bytes so far for the next run
    unless their hash is wrong.

    Args:
        aside: new name of a `target` that was there, once the new file is whole.

    Raises:
        LightningDiTError: refused, out of reach for too long, disk full, or wrong bytes twice.
    """
    began = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(PartFile(target, remote)) as part:
        part.take_up()
        if part.resumed_from:
            print(f"  {remote.name}: goes on after {format_bytes(part.offset)} of {format_bytes(remote.size)}")
        _receive_all(part, token, patience)
        if not part.is_right() and part.joined:
            print(f"  {remote.name}: the pieces do not make the hub's file; starting again")
            part.start_again()
            _receive_all(part, token, patience)
        if not part.is_right():
            found = part.hash.hexdigest()
            part.start_again()  # and `close` removes the empty part
            reason = "the file changed on the server" if part.changed else "wrong bytes came"
            raise LightningDiTError(
                f"{remote.name}: {reason} (hash {found[:16]}..., the hub says {remote.etag[:16]}...); nothing was kept",
                f"try again or another --endpoint: {again()}",
            )
        part.finish(aside)
    return Fetched(part.resumed_from, remote.size - part.resumed_from, time.monotonic() - began)


def _receive_all(part: PartFile, token: str | None, patience: Patience) -> None:
    """Repeat requests until the part is full; give up after too many without progress."""
    failures, remote = 0, part.remote
    with Progress(remote.size, "byte", label=remote.name, start=part.offset) as progress:
        while part.offset < remote.size:
            before = part.offset
            try:
                _receive(part, token, patience, progress)
            except _TryAgainError as trouble:
                progress.close()
                failures = 1 if part.offset - before >= ENOUGH else failures + 1
                if failures >= patience.attempts:
                    kept = f"{format_bytes(part.offset)} of {format_bytes(remote.size)} are kept"
                    raise LightningDiTError(f"{remote.name}: {trouble}; {kept}", no_network()) from trouble
                _wait(remote.name, trouble, failures, patience)


class _Floor:
    """The least speed of one answer: a byte a minute would keep a connection for ever."""

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._began, self._bytes = time.monotonic(), 0

    def count(self, amount: int) -> None:
        """Count bytes that came; raise _TryAgainError if too few came since the window began."""
        self._bytes += amount
        now, window = time.monotonic(), self.patience.window
        if now - self._began >= window:
            if self._bytes < self.patience.floor * window:
                raise _TryAgainError(f"only {format_bytes(self._bytes)} came in {duration(window)}")
            self._began, self._bytes = now, 0


def _receive(part: PartFile, token: str | None, patience: Patience, progress: Progress) -> None:
    """Make one request: from the part's end to the file's end, or until the connection fails."""
    remote = part.remote
    headers = {"User-Agent": "lightningdit-setup", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if part.offset and part.ask_range:
        headers["Range"] = f"bytes={part.offset}-"
        if part.validator and not part.changed:
            headers["If-Range"] = part.validator
    request = urllib.request.Request(remote.url, headers=headers)
    try:
        with _open(request, patience) as response:
            to_skip, floor = _accept(response, part), _Floor(patience)
            while part.offset < remote.size:
                chunk = response.read1(min(CHUNK, remote.size - part.offset + to_skip))
                if not chunk:
                    raise _TryAgainError(f"the connection ended after {format_bytes(part.offset)}")
                floor.count(len(chunk))
                fresh = chunk[to_skip:]
                to_skip -= len(chunk) - len(fresh)
                if fresh:
                    part.write(fresh)
                    progress.reach(part.offset)
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, part) from error
    except (OSError, http.client.HTTPException) as error:
        raise _explain_network(error, remote) from error
    except (ValueError, OverflowError) as error:  # addresses and numbers that are none
        raise _TryAgainError(f"the server's answer makes no sense ({first_line(error)})") from error


def _accept(response: http.client.HTTPResponse, part: PartFile) -> int:
    """Check that the answer is the wanted file, note its validator, and return how many of its first bytes the part
    holds already (a server that ignores ranges sends all of them again).
    """
    remote, headers = part.remote, response.headers
    if headers.get_content_type() == "text/html":
        raise LightningDiTError(
            f"{remote.name}: a web page came in place of the file from {_host(response.url)}",
            f"a login page of the network or a wrong --endpoint? put that right, then {again()}",
        )
    etag = headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else None
    resumed = response.status == 206
    total = headers.get("Content-Length") or ""
    if resumed:
        span = re.fullmatch(r"bytes (\d{1,19})-\d+/(\d+|\*)", headers.get("Content-Range", "").strip(), re.ASCII)
        if not span or int(span[1]) != (part.offset if part.ask_range else 0):
            part.ask_range = False  # some servers send the beginning whatever is asked for
            raise _TryAgainError("the server sent another range than the one asked for")
        resumed, total = part.ask_range, span[2]
    if re.fullmatch("[0-9]+", total) and total.lstrip("0") != str(remote.size or ""):
        raise _TryAgainError(f"the server offers {total[:20]} bytes, the hub says {remote.size}")
    # without an ETag nothing is known, and a hash decides at the end if there is one
    known = part.validator is not None and (validator is not None or not remote.hashed_by)
    if part.offset and not part.changed and known and validator != part.validator:
        part.changed = True
        part.start_again()
        if resumed:
            raise _TryAgainError("the file changed on the server; starting again")
    if part.offset == 0 or validator != part.validator:
        part.note(validator)
    part.joined = part.offset > 0
    return 0 if resumed else part.offset


def _refused(error: urllib.error.HTTPError, part: PartFile) -> _TryAgainError:
    """Return an HTTP error status as a failure to retry, or raise LightningDiTError."""
    if error.code == 416 and part.offset and part.ask_range:
        # by its size the part is good; the whole file shows whether it is, and the hash decides
        part.ask_range = False
        return _TryAgainError(f"no bytes behind {format_bytes(part.offset)} are served; asking for the whole file")
    repo = "/".join(urllib.parse.urlsplit(part.remote.url).path.split("/resolve/")[0].split("/")[-2:])
    url = error.url if _host(error.url) else part.remote.url  # of a redirect to no server
    return _explain_status(error.code, error.headers, repo, part.remote.name, url)


def _explain_network(error: Exception, remote: RemoteFile) -> _TryAgainError:
    """Return a network failure as one to retry; raise LightningDiTError for a certificate that is not trusted."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise LightningDiTError(
            f"{_host(remote.url)}: the certificate is not trusted ({reason.verify_message})",
            f"set SSL_CERT_FILE to your network's certificate bundle, then {again()}",
        )
    if isinstance(reason, TimeoutError):
        return _TryAgainError("no byte came for too long")
    return _TryAgainError(str(reason) or type(reason).__name__)
