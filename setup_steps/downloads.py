"""A downloader over HTTP ranges that goes on where an earlier run stopped.

The standard library asks the hub for size, commit and hash (one HEAD request) and for the bytes. The clients of
`huggingface_hub` differ in both: up to 1.18 they follow no redirect of a mirror to another hub, others repeat a request
for a minute in silence, and from 1.18 on they start an interrupted file again from nothing. The bytes go to NAME.part
beside NAME.part.json, which takes the final name when its hash is right.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
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


def another_endpoint() -> str:
    """Return what to do about a mirror that works only in part."""
    other = again("--endpoint", "https://HOST", without=["--endpoint"])
    by_hand = step_command(STEP2, *project.given("--model", "--models-dir"), "--folder", "FOLDER")
    return f"take another mirror: {other}; or fetch the files elsewhere: {by_hand}"


def no_web_page() -> str:
    """Return what to do about a web page in place of an answer."""
    at_mirror = "HF_ENDPOINT" in os.environ
    return another_endpoint() if at_mirror else f"open a web page on this network once, then {again()}"


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
    """A failure that may pass by itself, with the seconds that the server asked to wait (None: it did not answer) and
    what to do if it does not pass.
    """

    def __init__(self, reason: str, wait: float | None = None, fix: str = "") -> None:
        super().__init__(reason)
        self.wait, self.fix = wait, fix


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


def _is_address(endpoint: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(endpoint.rstrip("/"))
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        fits = fits and not parts.path.startswith("//")  # of https://https://HOST
    except ValueError:  # a port that is no number, brackets that are not closed
        return False
    return fits and re.fullmatch(r"[!-~]+", endpoint) is not None and not re.search(r"[\"'<>?#]", endpoint)


def use_endpoint(endpoint: str | None) -> None:
    """Select a mirror: the given address, which a path may follow, else that in HF_ENDPOINT.

    Raises:
        LightningDiTError: the address is not http(s)://host, or holds a login.
    """
    endpoint = endpoint or os.environ.get("HF_ENDPOINT") or None
    if endpoint is None:
        return
    without_login, address = re.sub(r"^(\w+:/*)?[^/]*@", "", endpoint), "https://HOST"
    if without_login != endpoint:
        fix = f"put a token into HF_TOKEN, then {again('--endpoint', address, without=['--endpoint'])}"
        raise LightningDiTError(f"the endpoint {without_login!r} comes with a login, which is not sent", fix)
    if not _is_address(endpoint):
        bare = endpoint.strip(" \t\r\n\"'“”‘’<>")
        for meant in (bare, f"https://{bare}"):
            address = meant if _is_address(meant) and "." in meant and address == "https://HOST" else address
        raise LightningDiTError(
            f"endpoint {endpoint!r} is no address, http://HOST or https://HOST was expected",
            f"{again('--endpoint', address, without=['--endpoint'])}, or unset HF_ENDPOINT",
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
    use_endpoint(None)
    try:
        from huggingface_hub import constants, hf_hub_url
    except ImportError as error:
        raise LightningDiTError(f"huggingface_hub does not import ({error})", fix_packages()) from error
    if constants.HF_HUB_OFFLINE:
        raise LightningDiTError(f"{name}: HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE && {again()}")
    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(repo, name, endpoint=endpoint)
    request = urllib.request.Request(url, headers=_headers(hub_token()), method="HEAD")
    for attempt in range(1, patience.attempts + 1):
        try:
            commit, size, etag = _ask(request, repo, name, patience)
            break
        except _TryAgainError as trouble:
            # without any answer a long wait only hides that the machine is offline
            if attempt >= (patience.attempts if trouble.wait is not None else min(2, patience.attempts)):
                raise LightningDiTError(f"{name}: {trouble}", trouble.fix or no_network()) from trouble
            _wait(name, trouble, attempt, patience)
    return RemoteFile(name, hf_hub_url(repo, name, revision=commit, endpoint=endpoint), size, etag, commit)


def _headers(token: str | None) -> dict[str, str]:
    headers = {"User-Agent": "lightningdit-setup", "Accept-Encoding": "identity"}
    return {**headers, "Authorization": f"Bearer {token}"} if token else headers


def _ask(request: urllib.request.Request, repo: str, name: str, patience: Patience) -> tuple[str, int, str]:
    """Return commit, size and hash of a file from the first answer that has them; raise _TryAgainError or
    LightningDiTError.
    """
    try:
        with _open(request, patience) as answer:
            headers, url, moved = answer.headers, answer.url, False
    except urllib.error.HTTPError as error:
        with error:
            headers, url, moved = error.headers, error.url, True
            if _metadata(headers, moved) is None or error.code >= 400:
                raise _explain_status(error, repo, name, request.full_url) from error
    found = _metadata(headers, moved)
    if found is None:
        what = "a web page came" if headers.get_content_type() == "text/html" else "no commit, size or hash came"
        raise LightningDiTError(
            f"{_place(url, request.full_url)} does not answer like a hub ({what} for {name}); "
            "a mirror or a login page of the network may stand between",
            no_web_page(),
        )
    return found


def _metadata(headers: Any, moved: bool) -> tuple[str, int, str] | None:
    """Return commit, size and hash in an answer's header, by the hub's protocol: those of a file on another host are in
    the X-Linked headers of the redirect to it. None if one is absent or makes no sense.
    """
    commit = headers.get("X-Repo-Commit")
    size = headers.get("X-Linked-Size") or (None if moved else headers.get("Content-Length"))
    etag = (headers.get("X-Linked-Etag") or headers.get("ETag") or "").removeprefix("W/").strip('"').lower()
    if not (commit and etag and re.fullmatch(r"[0-9]{1,16}", size or "") and int(size) <= LARGEST):
        return None
    return commit, int(size), etag


def _place(url: str, asked: str) -> str:
    """Return the host of an address, and that of the address that was asked for if it led there."""
    led = _origin(url) != _origin(asked)
    return f"{_host(url)} (to which {_host(asked)} leads)" if led else _host(url)


def _explain_status(error: urllib.error.HTTPError, repo: str, name: str, asked: str) -> _TryAgainError:
    """Return an HTTP error status as a failure to retry (with a wait), or raise LightningDiTError.

    Args:
        asked: the first address, from which redirects may have led to that of the error.
    """
    code, url = error.code, error.url if _host(error.url) else asked  # of a redirect to no server
    place, led = _place(url, asked), _origin(url) != _origin(asked)
    if code in RETRY_STATUS:
        return _TryAgainError(
            f"{place} answered {code}", _retry_after(error.headers), another_endpoint() if led else ""
        )
    if led:
        raise LightningDiTError(f"{name}: {place} answered {code}", another_endpoint())
    login = f"HF_TOKEN=your-token {again()}"
    at_mirror = "HF_ENDPOINT" in os.environ
    mirror = f"a mirror may lag behind the hub: {another_endpoint()}" if at_mirror else again()
    rows = {
        "BadToken": (f"{place} does not know the token of this login ({code})", f"unset HF_TOKEN, then {again()}"),
        "RepoNotFound": (f"{repo} is not open to this login, or does not exist there ({code} from {place})", login),
        "GatedRepo": (
            f"this login may not read {repo} ({code} from {place})",
            f"accept the conditions on the repository's page, then {login}",
        ),
        "EntryNotFound": (f"{name} is not in {repo} ({code} from {place})", mirror),
    }
    kind = error.headers.get("X-Error-Code")
    if "Invalid credentials" in error.headers.get("X-Error-Message", ""):
        kind = "BadToken"
    if kind not in rows:
        kind = {401: "RepoNotFound", 403: "GatedRepo", 404: "EntryNotFound"}.get(code)
    other = f"{name}: {place} answered {code}", another_endpoint() if at_mirror else again()
    raise LightningDiTError(*rows.get(str(kind), other))


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
    """Follow redirects to http and https; send the token only while scheme, host and port stay the same. A HEAD request
    ends at the first answer with the metadata.

    The standard handler copies every header to any host, and knows no 308 on Python 3.10.
    """

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.get_method() == "HEAD" and _metadata(headers, moved=True):
            return None
        if urllib.parse.urlsplit(newurl).scheme not in ("http", "https"):
            raise _TryAgainError(f"{_host(req.full_url)} leads to another kind of server ({newurl[:40]!r})")
        kept = dict(req.headers)
        if _origin(newurl) != _origin(req.full_url):
            kept = {key: value for key, value in kept.items() if key.lower() != "authorization"}
        address = newurl.replace(" ", "%20")
        return urllib.request.Request(
            address, headers=kept, origin_req_host=req.origin_req_host, method=req.get_method()
        )

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class _Connections(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Connections that a timer can end: the lines before a file can drip too, and no timeout of a byte notices.

    Attributes:
        asked: the address of the latest request.
        ended: the timer ended them.
    """

    def __init__(self, asked: str) -> None:
        super().__init__()
        urllib.request.HTTPSHandler.__init__(self)
        self._made: list[http.client.HTTPConnection] = []
        self.asked, self.ended = asked, False

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        self.asked = req.full_url
        return self.do_open(partial(self._note, http.client.HTTPConnection), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        self.asked = req.full_url
        return self.do_open(partial(self._note, http.client.HTTPSConnection), req, context=self._context)

    def _note(self, kind: Callable[..., http.client.HTTPConnection], *given: Any, **named: Any) -> Any:
        self._made.append(kind(*given, **named))
        return self._made[-1]

    def end(self) -> None:
        """Wake the thread that waits for an answer; it meets the end of the connection."""
        self.ended = True
        for connection in self._made:
            with contextlib.suppress(OSError, AttributeError):  # already closed
                connection.sock.shutdown(socket.SHUT_RDWR)


def _open(request: urllib.request.Request, patience: Patience) -> http.client.HTTPResponse:
    """Return an answer whose header came within the patience's window and timeout; raise HTTPError for a status of an
    error, _TryAgainError without an answer, or LightningDiTError for a certificate that is not trusted.
    """
    connections, limit = _Connections(request.full_url), max(patience.window, patience.timeout)
    timer = threading.Timer(limit, connections.end)
    timer.daemon = True
    timer.start()
    try:
        return urllib.request.build_opener(connections, _Redirects).open(request, timeout=patience.timeout)
    except urllib.error.HTTPError:
        raise
    except (OSError, http.client.HTTPException) as error:
        slow = f"no whole answer came in {duration(limit)}" if connections.ended else ""
        raise _explain_network(error, connections.asked, request.full_url, slow) from error
    except (ValueError, OverflowError) as error:  # addresses and numbers that are none
        place = _place(connections.asked, request.full_url)
        raise _TryAgainError(f"the answer of {place} makes no sense ({first_line(error)})") from error
    finally:
        timer.cancel()


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
                    raise LightningDiTError(
                        f"{remote.name}: {trouble}; {kept}", trouble.fix or no_network()
                    ) from trouble
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
    remote, headers = part.remote, _headers(token)
    if part.offset and part.ask_range:
        headers["Range"] = f"bytes={part.offset}-"
        if part.validator and not part.changed:
            headers["If-Range"] = part.validator
    try:
        with _open(urllib.request.Request(remote.url, headers=headers), patience) as response:
            to_skip = _accept(response, part)
            try:
                _read(response, to_skip, part, _Floor(patience), progress)
            except (OSError, http.client.HTTPException) as error:
                raise _explain_network(error, response.url, remote.url) from error
    except urllib.error.HTTPError as error:
        with error:
            raise _refused(error, part) from error


def _read(response: http.client.HTTPResponse, to_skip: int, part: PartFile, floor: _Floor, progress: Progress) -> None:
    """Write an answer's bytes behind its first `to_skip` to the part until the file is whole."""
    size = part.remote.size
    while part.offset < size:
        chunk = response.read1(min(CHUNK, size - part.offset + to_skip))
        if not chunk:
            raise _TryAgainError(f"the connection ended after {format_bytes(part.offset)}")
        floor.count(len(chunk))
        fresh = chunk[to_skip:]
        to_skip -= len(chunk) - len(fresh)
        if fresh:
            part.write(fresh)
            progress.reach(part.offset)


def _accept(response: http.client.HTTPResponse, part: PartFile) -> int:
    """Check that the answer is the wanted file, note its validator, and return how many of its first bytes the part
    holds already (a server that ignores ranges sends all of them again).
    """
    remote, headers = part.remote, response.headers
    if headers.get_content_type() == "text/html":
        raise LightningDiTError(
            f"{remote.name}: a web page came in place of the file from {_place(response.url, remote.url)}",
            no_web_page(),
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
        place = _place(response.url, remote.url)
        raise _TryAgainError(f"{place} offers {total[:20]} bytes, the hub says {remote.size}", fix=another_endpoint())
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
    return _explain_status(error, repo, part.remote.name, part.remote.url)


def _explain_network(error: Exception, url: str, asked: str, slow: str = "") -> _TryAgainError:
    """Return a network failure as one to retry; raise LightningDiTError for a certificate that is not trusted.

    Args:
        url: the address that was tried, to which redirects from `asked` may have led.
        slow: why the connection was ended, if it was ended here.
    """
    reason = getattr(error, "reason", None) or error
    place, fix = _place(url, asked), another_endpoint() if _origin(url) != _origin(asked) else ""
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise LightningDiTError(
            f"{place}: the certificate is not trusted ({reason.verify_message})",
            f"set SSL_CERT_FILE to your network's certificate bundle, then {again()}",
        )
    said = "no byte came for too long" if isinstance(reason, TimeoutError) else str(reason) or type(reason).__name__
    proxies = {} if urllib.request.proxy_bypass(_host(url)) else urllib.request.getproxies()
    if proxy := proxies.get(urllib.parse.urlsplit(url).scheme):
        place += f" through the proxy {_host(proxy) or proxy.rpartition('@')[2]}"
    if any(address.startswith("socks") for address in proxies.values()):
        fix = f"name an HTTP proxy in https_proxy (a SOCKS proxy is not used), then {again()}"
    return _TryAgainError(f"{place} cannot be reached ({slow or said})", fix=fix)
