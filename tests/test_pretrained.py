"""Files in torch.hub's cache: found, downloaded, or named with their path and the command."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from LightningDiT.errors import LightningDiTError
from LightningDiT.tokenizer.pretrained import cached_download

CONTENT = b"weights"
NAME = f"net-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "hub" / "checkpoints"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A server on this machine of the file, and of another one under a name with the same hash."""
    (tmp_path / NAME).write_bytes(CONTENT)
    (tmp_path / f"other-{NAME}").write_bytes(b"others")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as opened:
        threading.Thread(target=opened.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{opened.server_port}"
        opened.shutdown()


def test_a_file_is_downloaded_once(server: str, cache: Path, tmp_path: Path) -> None:
    assert cached_download(f"{server}/{NAME}", "a network", "") == cache / NAME
    assert (cache / NAME).read_bytes() == CONTENT
    (tmp_path / NAME).unlink()
    assert cached_download(f"{server}/{NAME}", "a network", "") == cache / NAME


def test_a_file_of_another_hash_is_not_kept(server: str, cache: Path) -> None:
    with pytest.raises(LightningDiTError, match="a network: .* cannot be downloaded .*invalid hash value"):
        cached_download(f"{server}/other-{NAME}", "a network", "give it")
    assert not list(cache.iterdir())


def test_without_a_network_path_and_command_are_named(cache: Path) -> None:
    url = f"http://127.0.0.1:9/{NAME}"  # nothing listens there
    with pytest.raises(LightningDiTError) as caught:
        cached_download(url, "a network", "give --weights FILE")
    assert f"a network: {cache / NAME} does not exist and cannot be downloaded" in str(caught.value)
    assert str(caught.value).endswith(f"curl -L -o {NAME} {url} on a machine with a network, then give --weights FILE")
