"""The page as it is served: what its server answers, and the page in Debian's chromium."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from LightningDiT.demo.choices import find_models
from LightningDiT.demo.page import Page
from LightningDiT.demo.serving import FOREIGN, names_of, served
from LightningDiT.demo.session import Studio
from LightningDiT.errors import LightningDiTError

pytest.importorskip("gradio", reason="the page needs gradio: pip install gradio")

SECRET = b"a secret of another folder"


@pytest.fixture(scope="module")
def reached() -> list[Any]:
    """Addresses that this process connected to."""
    return []


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "secret.txt").write_bytes(SECRET)
    (folder / "output-secret").mkdir()
    (folder / "output-secret" / "secret.txt").write_bytes(SECRET)
    return folder / "output"


@pytest.fixture(scope="module")
def address(tiny_source: Path, output: Path, reached: list[Any]) -> Iterator[str]:
    patch = pytest.MonkeyPatch()
    connect = socket.socket.connect

    def note(self: socket.socket, place: Any) -> None:
        reached.append(place)
        connect(self, place)

    patch.setattr(socket.socket, "connect", note)
    models, _ = find_models([], [tiny_source / "config.yaml"])
    with served(Page(Studio(models, output))) as found:
        yield found
    patch.undo()


def ask(address: str, path: str, method: str = "GET", host: str | None = None, body: bytes = b"") -> tuple[int, bytes]:
    """Return status and content of an answer to a path as it is, which no client has made tidy."""
    at = urlsplit(address)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or at.netloc)
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_it_answers_this_machine_alone(address: str) -> None:
    port = urlsplit(address).port
    assert ask(address, "/")[0] == 200
    with pytest.raises(OSError, match="refused"), socket.create_connection(("127.0.0.2", port or 0), 5):
        pass
    assert names_of("0.0.0.0") == names_of("192.168.1.7") == frozenset()
    assert "localhost" in names_of("127.0.0.1") & names_of("::1") & names_of("localhost")


def test_it_serves_its_images_and_nothing_beside_them(address: str, output: Path) -> None:
    (output / "run").mkdir(exist_ok=True)
    (output / "run" / "000000.png").write_bytes(b"an image")
    own = quote(str(output / "run" / "000000.png"))
    assert ask(address, f"/gradio_api/file={own}") == (200, b"an image")
    secret, root = str(output.parent / "secret.txt"), str(output)
    up = "../secret.txt"
    paths = [secret, f"{root}/{up}", f"{root}/run/../{up}", f"{root}-secret/secret.txt", f"{root}//..//secret.txt", up]
    paths += [
        "/etc/passwd",
        f"{root}/../../../../../../../../etc/passwd",
        f"file://{secret}",
        f"{root}/%2e%2e/secret.txt",
    ]
    for path in paths:
        for spelt in (path, quote(path), quote(quote(path)), path.replace("..", "%2e%2e"), path.replace("/", "%2F")):
            for prefix in ("/gradio_api/file=", "/file=", "/static/", "/"):
                status, content = ask(address, prefix + spelt.replace(" ", "%20"))
                assert SECRET not in content, prefix + spelt
                assert b"root:" not in content, (status, prefix + spelt)


def test_other_names_of_this_machine_and_what_the_page_does_not_use_are_closed(address: str) -> None:
    assert ask(address, "/", host="evil.example")[0] == 403
    assert ask(address, "/", host="localhost:80")[0] == 200
    for path in ("/gradio_api/upload", "/upload", "/gradio_api/%75pload", "/gradio_api/proxy=http://127.0.0.1/"):
        assert ask(address, path, "POST" if "pload" in path else "GET") == (403, b"closed\n"), path


def test_the_page_names_no_other_server_that_a_browser_would_ask(address: str) -> None:
    _, page = ask(address, "/")
    assert not re.findall(rb"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", page)
    old = b"""<link\n rel="preconnect" href="https://fonts.googleapis.com" /><script
 src="https://cdnjs.cloudflare.com/x.js" async></script><script src="/own.js"></script><link href="./a.css">"""
    assert FOREIGN.sub(b"", old) == b'<script src="/own.js"></script><link href="./a.css">'


def test_the_server_itself_reaches_no_other_one(address: str, reached: list[Any]) -> None:
    places = [place[0] for place in reached if isinstance(place, tuple)]
    assert "127.0.0.1" in places  # gradio asks whether it answers
    assert {place for place in places if place not in ("127.0.0.1", "localhost", "127.0.0.2", "::1")} == set()


def test_a_port_that_is_taken_is_one_line(address: str, tiny_source: Path, tmp_path: Path) -> None:
    models, _ = find_models([], [tiny_source / "config.yaml"])
    port = urlsplit(address).port
    with (
        pytest.raises(LightningDiTError, match=f"cannot be served at 127.0.0.1:{port} .*; fix: choose another --port"),
        served(Page(Studio(models, tmp_path)), port=port),
    ):
        pass


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = pytest.importorskip("playwright.sync_api", reason="a browser needs a driver: pip install playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium is installed: apt install chromium")
    with driver.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Visitor:
    """A person at the page, with what the page asked for and complained about."""

    def __init__(self, browser: Any, address: str) -> None:
        self.asked, self.said = list[str](), list[str]()
        self.context = browser.new_context(viewport={"width": 1100, "height": 900})
        self.page = self.context.new_page()
        self.page.set_default_timeout(40_000)
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(address)
        self.page.get_by_role("button", name="Sample").wait_for()

    def press(self, name: str) -> None:
        self.page.get_by_role("button", name=name, exact=True).click()

    def fill(self, label: str, value: str) -> None:
        self.page.get_by_label(label).first.fill(value)
        self.page.get_by_label(label).first.press("Tab")

    def waits_for(self, text: str) -> str:
        self.page.get_by_text(text).first.wait_for()
        return self.page.locator(".ldit-words").inner_text()

    @property
    def captions(self) -> list[str]:
        return self.page.locator(".ldit-page figcaption").all_inner_texts()

    @property
    def command(self) -> str:
        return self.page.locator("#command textarea").input_value()


@pytest.fixture(scope="module")
def visitor(browser: Any, address: str) -> Iterator[Visitor]:
    person = Visitor(browser, address)
    yield person
    person.context.close()


def test_the_page_loads_and_samples(visitor: Visitor, address: str) -> None:
    visitor.fill("Seed", "7")
    visitor.press("Sample")
    assert visitor.waits_for("evaluations each").startswith("3 images in ")
    assert visitor.captions == ["cat", "dog", "sea lion"]
    assert "--seed 7 --guidance-scale 2 --solver euler" in visitor.command
    link = visitor.page.locator(".ldit-page a").first.get_attribute("href")
    assert ask(address, f"/{link}")[1].startswith(b"\x89PNG")
    visitor.page.get_by_text("中文").click()
    visitor.page.get_by_role("button", name="采样").wait_for()
    visitor.page.get_by_text("English").click()
    visitor.page.get_by_role("button", name="Sample").wait_for()
    assert visitor.said == []
    assert {urlsplit(url).netloc for url in visitor.asked if url.startswith("http")} == {urlsplit(address).netloc}


def test_a_bad_value_is_a_message_on_the_page(visitor: Visitor) -> None:
    visitor.fill("Seed", "-3")
    visitor.press("Sample")
    words = visitor.waits_for("Not possible")
    assert "seed is -3; a whole number from 0" in words.replace("-3.0", "-3")
    assert visitor.page.get_by_text("Traceback").count() == 0
    assert visitor.page.get_by_role("alert").count() == 1
    visitor.fill("Seed", "1")


def test_two_visitors_at_once_see_their_own_images(visitor: Visitor, browser: Any, address: str) -> None:
    other = Visitor(browser, address)
    other.fill("Seed", "2")
    other.fill("Images of each", "2")
    visitor.press("Sample")
    other.press("Sample")
    assert visitor.waits_for("evaluations each").startswith("3 images")
    assert other.waits_for("evaluations each").startswith("6 images")
    assert (len(visitor.captions), len(other.captions)) == (3, 6)
    assert ("--seed 1 " in visitor.command, "--seed 2 " in other.command) == (True, True)
    other.context.close()


def test_stop_on_the_page_stops(visitor: Visitor) -> None:
    visitor.fill("Steps", "1000")
    visitor.press("Sample")
    visitor.waits_for("images finished; step")
    visitor.press("Stop")
    assert "Stopped; 0 of 3 images are finished" in visitor.waits_for("Stopped;")
