"""A downloader over HTTP ranges that goes on where an earlier run stopped.

`huggingface_hub` gives the metadata (size, commit, hash); the bytes come by the standard library,
because the hub's own client starts an interrupted file again from nothing (version 1.18 and later).
The bytes go to NAME.part beside NAME.part.json and take the final name only when their hash is
right.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import http.client
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from setup_steps import console
from setup_steps.console import Progress, StepError, fix_packages, format_bytes, format_seconds
from setup_steps.files import claim, replacing

CHUNK = 1 << 20
HASH_BEHIND = 4  # chunks that wait for the hash at most
RENAMES_OPEN_FILES = os.name != "nt"
SPARE_BYTES = 64_000_000  # disk left free beside the downloads
RETRY_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
STEP = "step2_download_models.py"


def again(*added: str, without: Sequence[str] = ()) -> str:
    """The command that is running, step 2 unless it is the repair, with other options."""
    return console.again(STEP, *added, without=without)


def no_network() -> str:
    """What to do where the hub does not answer."""
    bundled = console.step_command("step3_setup_configs.py", "--model", "bundled")
    return (
        "check the internet connection (Kaggle: Settings, Internet, On) and --endpoint or HF_ENDPOINT, "
        f"then {again()}; without internet: {bundled}"
    )


@dataclass(frozen=True)
class Patience:
    """How long a download waits and how often it tries again.

    Args:
        timeout: seconds without a byte after which a connection is given up.
        attempts: failures in a row, without a new byte between them, that end the download.
        backoff: seconds before the second attempt; doubles with each failure in a row.
        longest_wait: bound of one wait, and of a Retry-After that is still waited for.
    """

    timeout: float = 30.0
    attempts: int = 6
    backoff: float = 1.0
    longest_wait: float = 120.0


PATIENCE = Patience()


@dataclass(frozen=True)
class RemoteFile:
    """What the hub says of one file: `url` is pinned to a commit; `etag` is the sha256 of a large
    file (64 hex digits) or the git blob hash of a small one (40).
    """

    name: str
    url: str
    size: int
    etag: str
    revision: str

    @property
    def hashed_by(self) -> str | None:
        """ "sha256", "git" or None where the hub gives no hash that can be checked."""
        if not re.fullmatch(r"[0-9a-f]+", self.etag):
            return None
        return {64: "sha256", 40: "git"}.get(len(self.etag))


@dataclass(frozen=True)
class Fetched:
    """A finished download: bytes that were there before, bytes that came now, seconds it took."""

    path: Path
    resumed_from: int
    fetched: int
    seconds: float


class _TryAgainError(Exception):
    """A failure that may pass by itself, with the seconds that the server asked to wait."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


def new_hash(remote: RemoteFile) -> Any:
    """A running hash of the kind that `remote.etag` is; sha256 where that is not known."""
    if remote.hashed_by == "git":
        return hashlib.sha1(b"blob %d\0" % remote.size, usedforsecurity=False)
    return hashlib.sha256()


class BackgroundHash:
    """A hash that a second thread computes, in the order of the calls, while the next bytes are on
    their way: hashlib holds no interpreter lock meanwhile.
    """

    def __init__(self, remote: RemoteFile) -> None:
        self._digest = new_hash(remote)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting: deque[Future[None]] = deque()

    def update(self, data: bytes) -> None:
        """Hand over bytes; waits where HASH_BEHIND others are not hashed yet."""
        self._waiting.append(self._thread.submit(self._digest.update, data))
        if len(self._waiting) > HASH_BEHIND:
            self._waiting.popleft().result()

    def hexdigest(self) -> str:
        """The hash of all bytes handed over."""
        while self._waiting:
            self._waiting.popleft().result()
        return self._digest.hexdigest()

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def read_through(path: Path, digest: Any, label: str) -> None:
    """Feed a file on the disk to a hash (of hashlib, or a BackgroundHash), with progress."""
    progress = Progress(label, path.stat().st_size)
    with path.open("rb") as file, contextlib.closing(progress):
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            progress.update(file.tell())


def hash_file(path: Path, remote: RemoteFile) -> str:
    """Hash a file on the disk the way the hub hashed it, with progress."""
    digest = new_hash(remote)
    read_through(path, digest, f"hashing {path.name}")
    return digest.hexdigest()


def use_endpoint(endpoint: str | None) -> None:
    """Select a mirror. To be called before anything imports huggingface_hub, which reads
    HF_ENDPOINT once.

    Raises:
        StepError: the address is not http(s)://host.
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
        raise StepError(
            f"endpoint {endpoint!r} is no address, http://HOST or https://HOST was expected",
            f"{again('--endpoint', 'https://HOST', without=['--endpoint'])}, or unset HF_ENDPOINT",
        )
    os.environ["HF_ENDPOINT"] = endpoint.rstrip("/")


def hub_token() -> str | None:
    """The person's token: HF_TOKEN or the one that a hub login stored.

    Raises:
        StepError: it holds characters that no token has.
    """
    from huggingface_hub import get_token

    token = get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise StepError("HF_TOKEN holds characters that no token of the hub has", f"unset HF_TOKEN, then {again()}")
    return token


def describe(repo: str, name: str, patience: Patience = PATIENCE) -> RemoteFile:
    """Ask the hub for a file's size, commit and hash.

    Raises:
        StepError: huggingface_hub is absent, the hub is out of reach or refuses.
    """
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import HfHubHTTPError
    except ImportError as error:
        raise StepError(f"huggingface_hub does not import ({error})", fix_packages()) from error
    # The HTTP library beneath huggingface_hub has changed twice (requests, httpx, httpx2); its
    # error for "no answer" is a base of the hub's own error, or an OSError.
    hub_errors = (OSError, *HfHubHTTPError.__bases__)
    hub_token()
    endpoint = os.environ.get("HF_ENDPOINT")
    url = hf_hub_url(repo, name, endpoint=endpoint)
    for attempt in range(1, patience.attempts + 1):
        try:
            data = get_hf_file_metadata(url, timeout=patience.timeout)
            break
        except ImportError as error:  # a kind of proxy that the HTTP library has no package for
            raise StepError(
                f"{_host(url)} cannot be reached through the proxy of this environment ({error})",
                f"unset https_proxy http_proxy all_proxy, or name an HTTP proxy there, then {again()}",
            ) from error
        except hub_errors as error:
            trouble = _explain_hub_error(error, repo, name, url)
            # Without any answer a long wait only hides that the machine is offline.
            if attempt >= (patience.attempts if trouble.wait is not None else min(2, patience.attempts)):
                _give_up(f"{name}: {trouble}", no_network(), error)
            _wait(name, trouble, attempt, patience)
    if data.commit_hash is None or data.size is None or data.etag is None:
        raise StepError(
            f"{_host(url)} does not answer like a hub (no commit or size for {name}); "
            "a mirror or a login page of the network may stand between",
            "unset HF_ENDPOINT or open a web page on this network once, then " + again(),
        )
    pinned = hf_hub_url(repo, name, revision=data.commit_hash, endpoint=endpoint)
    return RemoteFile(name, pinned, data.size, data.etag.lower(), data.commit_hash)


def _explain_hub_error(error: Exception, repo: str, name: str, url: str) -> _TryAgainError:
    """Turn what huggingface_hub raised into a failure to retry, or raise StepError."""
    response = getattr(error, "response", None)
    if response is not None:
        return _explain_status(response.status_code, response.headers, repo, name, url)
    if type(error).__name__ == "OfflineModeIsEnabled":
        raise StepError(f"{name}: HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE && {again()}")
    return _TryAgainError(f"{_host(url)} cannot be reached ({str(error) or type(error).__name__})")


def _explain_status(code: int, headers: Any, repo: str, name: str, url: str) -> _TryAgainError:
    """Turn an HTTP status into a failure to retry (with a wait), or raise StepError."""
    if code in RETRY_STATUS:
        return _TryAgainError(f"{_host(url)} answered {code}", _retry_after(headers))
    reasons = {
        401: (
            f"{repo} is not open to this login, or does not exist there (401 from {_host(url)})",
            f"HF_TOKEN=your-token {again()}",
        ),
        403: (
            f"this login may not read {repo} (403 from {_host(url)})",
            f"accept the conditions on the repository's page, then HF_TOKEN=your-token {again()}",
        ),
        404: (
            f"{name} is not in {repo} (404 from {_host(url)})",
            f"check --endpoint or unset HF_ENDPOINT, then {again()}",
        ),
    }
    message, fix = reasons.get(code, (f"{name}: {_host(url)} answered {code}", again()))
    raise StepError(message, fix)


def _retry_after(headers: Any) -> float:
    """Seconds asked for by a Retry-After header (a number or a date); 0 where there is none."""
    value = (headers.get("Retry-After") or "").strip()
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _wait(name: str, trouble: _TryAgainError, failures: int, patience: Patience) -> None:
    """Sleep before the next attempt and say why."""
    asked = trouble.wait or 0.0
    if asked > patience.longest_wait:
        raise StepError(f"{name}: {trouble} and asks to wait {format_seconds(asked)}", f"later: {again()}")
    seconds = max(asked, min(patience.backoff * 2 ** (failures - 1), patience.longest_wait))
    print(f"  {name}: {trouble}; next try in {format_seconds(seconds)}")
    time.sleep(seconds)


def _give_up(message: str, fix: str, cause: Exception) -> NoReturn:
    raise StepError(message, fix) from cause


def _host(url: str) -> str:
    """Host and port, without a login that may stand before them."""
    return urllib.parse.urlsplit(url).netloc.rpartition("@")[2]


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects, with the token only where scheme, host and port stay the same.

    The standard handler copies every header to wherever it is sent, and knows no 308 on
    Python 3.10.
    """

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: Any,
        newurl: str,
    ) -> urllib.request.Request:
        kept = dict(req.headers)
        if _origin(newurl) != _origin(req.full_url):
            kept = {key: value for key, value in kept.items() if key.lower() != "authorization"}
        return urllib.request.Request(newurl.replace(" ", "%20"), headers=kept, origin_req_host=req.origin_req_host)

    http_error_308 = urllib.request.HTTPRedirectHandler.http_error_302


class PartFile:
    """NAME.part, its state file and the running hash of what it holds.

    The state says of which file the part is the beginning; a part of any other file is dropped.
    Writes are unbuffered, so that a killed process loses nothing that it had counted.

    Attributes:
        offset: bytes that the part holds.
        resumed_from: bytes of an earlier run among them.
        validator: the ETag of the host that served them.
        joined: the part holds bytes of more than one answer.
        changed: another ETag came with a later answer. From then on the hash alone decides, since a
            host whose ETags differ from answer to answer would have every answer start again.
        ask_range: the rest can be asked for; otherwise the whole file is, and its beginning skipped.
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
        self._file: IO[bytes] = self.path.open("ab", buffering=0)
        self._claim()

    def take_up(self) -> None:
        """Hash what an earlier run left, or drop it where it begins another file."""
        if self._fits():
            read_through(self.path, self.hash, f"reading {self.path.name} again")
        else:
            self._empty()
            self.state_path.unlink(missing_ok=True)
        self.offset = self.resumed_from = self.path.stat().st_size
        self.joined = self.offset > 0

    def _claim(self) -> None:
        """Raise StepError where another process is writing this part, or has just finished it."""
        if not (claim(self._file) and self._has_its_name()):
            self._file.close()
            raise StepError(
                f"{self.path} is being written by another process", f"wait for it or stop it, then {again()}"
            )

    def _has_its_name(self) -> bool:
        """False where another process renamed the part since it was opened here."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self.path.stat())
        except FileNotFoundError:
            return False

    def _fits(self) -> bool:
        """True where the part begins the file that the hub has now."""
        try:
            state = json.loads(self.state_path.read_text(encoding="utf-8"))
            size = self.path.stat().st_size
        except (OSError, ValueError):
            return False
        if not isinstance(state, dict) or size > self.remote.size:
            return False
        wanted = asdict(self.remote)
        validator = state.pop("validator", None)
        self.validator = validator if state.get("url") == wanted["url"] else None
        if self.remote.hashed_by:
            # The hash names the content, whichever mirror or commit it comes from.
            return state.get("etag") == wanted["etag"]
        return state == wanted

    def note(self, validator: str | None) -> None:
        """Write the state file, with the ETag of the host that serves the bytes."""
        self.validator = validator
        state = {**asdict(self.remote), "validator": validator}
        try:
            with replacing(self.state_path) as fresh:
                fresh.write_text(json.dumps(state, indent=1), encoding="utf-8")
        except OSError as error:
            raise self._disk_error(error) from error

    def write(self, chunk: bytes) -> None:
        """Append bytes and hash them. They are counted when they are in the file.

        Raises:
            StepError: the disk takes no more.
        """
        view = memoryview(chunk)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise self._disk_error(error) from error
        self.hash.update(chunk)
        self.offset += len(chunk)

    def _disk_error(self, error: OSError) -> StepError:
        return StepError(
            f"{self.path} cannot be written ({error.strerror})",
            f"free space there, then {again()}; step 2 takes another folder by --models-dir",
        )

    def start_again(self) -> None:
        """Forget the bytes so far: they are not the beginning of the file."""
        self.hash.close()
        self.hash = BackgroundHash(self.remote)
        self._empty()
        self.offset = self.resumed_from = 0
        self.joined = False

    def _empty(self) -> None:
        # A file that was cut to nothing is written out when it is closed (ext4), so not without need.
        if os.fstat(self._file.fileno()).st_size:
            self._file.truncate(0)

    def is_right(self) -> bool:
        """True where the bytes are all there and hash to what the hub says."""
        named = self.remote.hashed_by
        return self.offset == self.remote.size and (named is None or self.hash.hexdigest() == self.remote.etag)

    def finish(self, aside: Path | None) -> None:
        """Give the part its final name, after the file that has it was renamed to `aside`."""
        os.fsync(self._file.fileno())
        with self._let_go():
            if aside is not None:
                self.target.replace(aside)
            self.path.replace(self.target)
            self.state_path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the hashing thread and let go of the part; one without bytes is removed."""
        self.hash.close()
        if not self._file.closed:
            empty = not os.fstat(self._file.fileno()).st_size
            with self._let_go():
                if empty:
                    self.path.unlink(missing_ok=True)
                    self.state_path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _let_go(self) -> Iterator[None]:
        """Close the part around what is done to its name: after it, so that no other process takes the
        part meanwhile, or before it where the system renames and removes no open file.
        """
        if not RENAMES_OPEN_FILES:
            self._file.close()
        try:
            yield
        finally:
            self._file.close()


def require_disk(folder: Path, needed: int) -> None:
    """Raise StepError where the disk of `folder` holds less than `needed` bytes and some spare."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed + SPARE_BYTES > free:
        raise StepError(
            f"{format_bytes(needed + SPARE_BYTES)} are needed on the disk of {folder}, {format_bytes(free)} are free",
            f"free space there, then {again()}; step 2 takes another folder by --models-dir",
        )


def bytes_to_fetch(remote: RemoteFile, target: Path) -> int:
    """Bytes that a download of `remote` will still add to the disk."""
    part = target.with_name(target.name + ".part")
    return max(0, remote.size - (part.stat().st_size if part.is_file() else 0))


def download(
    remote: RemoteFile,
    target: Path,
    token: str | None = None,
    patience: Patience = PATIENCE,
    aside: Path | None = None,
) -> Fetched:
    """Fetch `remote` to `target`, going on from what NAME.part holds.

    Either `target` is whole and its hash right, or it is as it was before; what came so far stays
    in NAME.part for the next run unless its hash proved wrong. A `target` that was there is
    renamed to `aside` (where that is given) when the new file is whole.

    Raises:
        StepError: refused, out of reach for too long, disk full, or wrong bytes twice.
    """
    began = time.monotonic()
    target.parent.mkdir(parents=True, exist_ok=True)
    part = PartFile(target, remote)
    with contextlib.closing(part):
        part.take_up()
        if part.resumed_from:
            done = f"{format_bytes(part.offset)} of {format_bytes(remote.size)}"
            print(f"  {remote.name}: goes on after {done}")
        _receive_all(part, token, patience)
        if not part.is_right() and part.joined:
            print(f"  {remote.name}: the pieces do not make the hub's file; starting again")
            part.start_again()
            _receive_all(part, token, patience)
        if not part.is_right():
            found = part.hash.hexdigest()
            part.start_again()  # and an empty part is removed
            reason = "the file changed on the server" if part.changed else "wrong bytes came"
            raise StepError(
                f"{remote.name}: {reason} (hash {found[:16]}..., the hub says {remote.etag[:16]}...); nothing was kept",
                f"try again or another --endpoint: {again()}",
            )
        fetched = remote.size - part.resumed_from
        part.finish(aside)
    return Fetched(target, part.resumed_from, fetched, time.monotonic() - began)


def _receive_all(part: PartFile, token: str | None, patience: Patience) -> None:
    """Repeat requests until the part is full; give up after too many without a new byte."""
    failures = 0
    with contextlib.closing(Progress(part.remote.name, part.remote.size, part.offset)) as progress:
        while part.offset < part.remote.size:
            before = part.offset
            try:
                _receive(part, token, patience.timeout, progress)
            except _TryAgainError as trouble:
                progress.close()
                failures = 1 if part.offset > before else failures + 1
                if failures >= patience.attempts:
                    kept = f"{format_bytes(part.offset)} of {format_bytes(part.remote.size)} are kept"
                    _give_up(f"{part.remote.name}: {trouble}; {kept}", no_network(), trouble)
                _wait(part.remote.name, trouble, failures, patience)


def _receive(part: PartFile, token: str | None, timeout: float, progress: Progress) -> None:
    """One request: from the part's end to the file's end, or until the connection fails."""
    remote = part.remote
    headers = {"User-Agent": "lightningdit-setup", "Accept-Encoding": "identity"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    if part.offset and part.ask_range:
        headers["Range"] = f"bytes={part.offset}-"
        if part.validator and not part.changed:
            headers["If-Range"] = part.validator
    request = urllib.request.Request(remote.url, headers=headers)
    opener = urllib.request.build_opener(_Redirects)
    try:
        with opener.open(request, timeout=timeout) as response:
            to_skip = _accept(response, part)
            while part.offset < remote.size:
                chunk = response.read1(min(CHUNK, remote.size - part.offset + to_skip))
                if not chunk:
                    raise _TryAgainError(f"the connection ended after {format_bytes(part.offset)}")
                fresh = chunk[to_skip:]
                to_skip -= len(chunk) - len(fresh)
                if fresh:
                    part.write(fresh)
                    progress.update(part.offset)
    except urllib.error.HTTPError as error:
        with error:
            _refused(error, part)
    except (OSError, http.client.HTTPException) as error:
        raise _explain_network(error, remote) from error


def _accept(response: http.client.HTTPResponse, part: PartFile) -> int:
    """Check that the answer is the file wanted, note its validator, and return how many of its
    first bytes the part holds already (a server that ignores ranges sends all of them again).
    """
    remote = part.remote
    kind = response.headers.get_content_type()
    if kind == "text/html":
        raise StepError(
            f"{remote.name}: a web page came in place of the file from {_host(response.url)}",
            "a login page of the network or a wrong --endpoint? put that right, then " + again(),
        )
    etag = response.headers.get("ETag")
    validator = etag if etag and not etag.startswith("W/") else None
    resumed = response.status == 206
    if resumed:
        place = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
        if not place or int(place[1]) != part.offset:
            raise _TryAgainError("the server sent another range than the one asked for")
        total = None if place[2] == "*" else int(place[2])
    else:
        length = response.headers.get("Content-Length")
        total = int(length) if length and length.isdigit() else None
    if total not in (None, remote.size):
        raise _TryAgainError(f"the server offers {total} bytes, the hub says {remote.size}")
    if part.offset and not part.changed and _is_another(validator, part):
        part.changed = True
        part.start_again()
        if resumed:
            raise _TryAgainError("the file changed on the server; starting again")
    if part.offset == 0 or validator != part.validator:
        part.note(validator)
    part.joined = part.offset > 0
    return 0 if resumed else part.offset


def _is_another(validator: str | None, part: PartFile) -> bool:
    """True where the ETag of an answer says that its file is not the one that the part begins.

    Without an ETag nothing is known, and the hash at the end decides where there is one.
    """
    if part.validator is None or (validator is None and part.remote.hashed_by):
        return False
    return validator != part.validator


def _refused(error: urllib.error.HTTPError, part: PartFile) -> NoReturn:
    """Turn an HTTP error status into a retry or an end."""
    if error.code == 416 and part.offset and part.ask_range:
        # By its size the part is good; the whole file shows whether it is, and the hash decides.
        part.ask_range = False
        raise _TryAgainError(f"no bytes behind {format_bytes(part.offset)} are served; asking for the whole file")
    repo = "/".join(urllib.parse.urlsplit(part.remote.url).path.split("/resolve/")[0].split("/")[-2:])
    raise _explain_status(error.code, error.headers, repo, part.remote.name, error.url)


def _explain_network(error: Exception, remote: RemoteFile) -> _TryAgainError:
    """Name a network failure; a certificate that is not trusted does not pass by itself."""
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, ssl.SSLCertVerificationError):
        raise StepError(
            f"{_host(remote.url)}: the certificate is not trusted ({reason.verify_message})",
            "set SSL_CERT_FILE to your network's certificate bundle, then " + again(),
        )
    if isinstance(reason, TimeoutError):
        return _TryAgainError("no byte came for too long")
    return _TryAgainError(str(reason) or type(reason).__name__)
