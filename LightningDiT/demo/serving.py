"""The page's server: bound to this machine unless asked, its answers and files bounded."""

from __future__ import annotations

import ipaddress
import os
import re
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import unquote

from LightningDiT.demo.page import QUEUE, Page, accepted, build, gradio, look
from LightningDiT.errors import LightningDiTError, first_line

HOST = "127.0.0.1"
PORTS = range(7860, 7960)  # of which gradio takes the first free one
#: Parts of gradio that the page does not use: files of visitors, other servers' answers, code of components.
CLOSED = re.compile(r"/(upload|upload_progress|proxy=|stream|component_server|monitoring|process_recording)")
#: What a browser may load: this server's own files and what the page itself holds.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:;"
    " frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
#: What gradio's own page fetches from, or opens to, servers of others.
FOREIGN = re.compile(rb"""<script[^>]*\ssrc=["']https?://[^>]*></script>|<link[^>]*\shref=["']https?://[^>]*>""")
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Gate:
    """What each request passes: closed addresses and foreign names of this machine are refused, and each answer says
    what a browser may load.

    Args:
        app: an ASGI application.
        names: hosts that requests may name; empty: any. A page of another site that has its name point here would
            otherwise read this one (DNS rebinding).
    """

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], names: frozenset[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        guarded = _Answer(send)
        if CLOSED.search(unquote(scope["path"])) or not self._is_named(scope):
            await guarded({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await guarded({"type": "http.response.body", "body": b"closed\n"})
            return
        await self.app(scope, receive, guarded)

    def _is_named(self, scope: Scope) -> bool:
        host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
        return not self.names or re.sub(r":\d+$", "", host) in self.names


class _Answer:
    """Sends an answer on with the policy; from pages, which come in one piece, it takes what leads to others."""

    def __init__(self, send: Send) -> None:
        self.send, self.start, self.page = send, dict[str, Any](), b""

    async def __call__(self, message: Any) -> None:
        """Take a message of the application."""
        if message["type"] == "http.response.start":
            kept = [pair for pair in message["headers"] if pair[0].lower() != b"content-security-policy"]
            more = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
            message = {**message, "headers": [*kept, *more, (b"x-content-type-options", b"nosniff")]}
            found = dict(kept)
            if found.get(b"content-type", b"").startswith(b"text/html") and b"content-encoding" not in found:
                self.start = message
                return
        elif self.start and message["type"] == "http.response.body":
            self.page += message.get("body", b"")
            if message.get("more_body"):
                return
            body = FOREIGN.sub(b"", self.page)
            headers = [pair for pair in self.start["headers"] if pair[0].lower() != b"content-length"]
            await self.send({**self.start, "headers": [*headers, (b"content-length", str(len(body)).encode())]})
            message = {"type": "http.response.body", "body": body}
        await self.send(message)


def names_of(host: str) -> frozenset[str]:
    """Return the hosts that a request to a server bound to `host` may name; none: any, since it is open to others."""
    try:
        is_own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = host == "localhost"
    return frozenset({host, f"[{host}]", HOST, "localhost", "[::1]"}) if is_own else frozenset()


@contextmanager
def served(page: Page, host: str = HOST, port: int | None = None) -> Iterator[str]:
    """Serve a page within the block and yield its address.

    Files below the studio's folder are served, and no others.

    Args:
        port: None: the first free one of `PORTS`.

    Raises:
        LightningDiTError: gradio is not installed, the port is taken or not ours, or the page cannot be reached.
    """
    gr, output = gradio(), page.studio.output.absolute()
    from starlette.middleware import Middleware

    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache
        _without_proxy()
        blocks = build(page)
        blocks.queue(max_size=QUEUE, default_concurrency_limit=None)
        options = {
            **{"share": False, "ssr_mode": False, "enable_monitoring": False, "max_file_size": 1},
            **{"show_api": False, "footer_links": [], "pwa": False, "mcp_server": False, "run_history": False},
            **look(),
        }
        try:
            _, address, _ = blocks.launch(
                server_name=host,
                server_port=port,
                prevent_thread_lock=True,
                quiet=True,
                allowed_paths=[str(output)],
                app_kwargs={"middleware": [Middleware(Gate, names=names_of(host))]},
                **accepted(gr.Blocks.launch, **options),
            )
        except (OSError, ValueError) as error:
            raise LightningDiTError(
                f"the page cannot be served at {host}:{port or f'{PORTS[0]}-{PORTS[-1]}'} ({first_line(error)})",
                "choose another --port, or choose another --host",
            ) from error
        try:
            yield address
        finally:
            page.people.stop_all()
            blocks.close(verbose=False)


def _without_proxy() -> None:
    """Let gradio, which asks its own server whether it answers, ask it and no proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        known = [part for part in os.environ.get(name, "").split(",") if part]
        os.environ[name] = ",".join(dict.fromkeys([*known, HOST, "localhost"]))


def wait() -> None:
    """Wait for Ctrl-C."""
    threading.Event().wait()
