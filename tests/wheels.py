"""Tiny wheels, made on the spot: a package of one module, a torch that claims a GPU, and an index that has them."""

from __future__ import annotations

import contextlib
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAKE_TORCH = '''
"""What the probe asks of torch, on a machine with one P100."""
from types import SimpleNamespace

ARCHS = {archs!r}
__version__ = {version!r}
version = SimpleNamespace(cuda={cuda!r}, hip=None)


class Filled:
    """A square matrix of one value."""

    def __init__(self, value, size, device):
        self.value, self.size, self.device = value, size, device

    def __matmul__(self, other):
        if self.device != "cpu" and "sm_60" not in ARCHS:
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device\\nmore of it")
        return Filled(self.value * other.value * self.size, self.size, self.device)

    def __eq__(self, number):
        return Filled(self.value == number, self.size, self.device)

    def all(self):
        return self

    def item(self):
        return self.value


def ones(rows, columns, device):
    assert rows == columns
    return Filled(1, rows, device)


P100 = SimpleNamespace(name="Tesla P100-PCIE-16GB", major=6, minor=0, total_memory=17_059_545_088)
cuda = SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: 1,
    get_device_properties=lambda index: P100,
    get_arch_list=lambda: list(ARCHS),
)
'''


def make_wheel(folder: Path, name: str, version: str, body: str, *requires: str, tag: str = "py3-none-any") -> None:
    """A wheel of one module, as pip installs it."""
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", body)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(
            f"{info}/WHEEL",
            f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,{len(body.encode())}\n")


def make_torch(folder: Path, version: str, torchvision: str, cuda: str, *archs: str) -> None:
    """Wheels of a torch that claims a P100 and computes on it if it has kernels, and of its torchvision."""
    make_wheel(folder, "torch", version, FAKE_TORCH.format(version=version, cuda=cuda, archs=archs))
    make_wheel(folder, "torchvision", torchvision, "import torch\n", f"torch=={version}")


def make_nvidia_smi(folder: Path, *lines: str, knows_capability: bool = True) -> None:
    """An `nvidia-smi` that answers the one query with these lines, or refuses one for compute_cap."""
    folder.mkdir(parents=True, exist_ok=True)
    refusal = "" if knows_capability else 'case "$1" in *compute_cap*) echo "Field is not valid"; exit 2;; esac\n'
    answer = "\n".join(lines)
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\n{refusal}cat <<'LINES'\n{answer}\nLINES\n")
    script.chmod(0o755)


class Files(SimpleHTTPRequestHandler):
    """The files of a folder, or a refusal of every one."""

    def __init__(self, *position: object, refusal: int, **named: object) -> None:
        self.refusal = refusal
        super().__init__(*position, **named)

    def do_GET(self) -> None:
        if self.refusal:
            self.send_error(self.refusal)
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextlib.contextmanager
def running_files(folder: Path, refusal: int = 0) -> Iterator[str]:
    """A server of a folder on 127.0.0.1; give its HOST:PORT.

    Args:
        refusal: the HTTP status with which it refuses every file; 0 to send them.
    """
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder), refusal=refusal)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def make_index(folder: Path, wheels: Path, host: str) -> None:
    """The pages of an index of `wheels`, whose files are on another host."""
    for wheel in wheels.glob("*.whl"):
        page = folder / "simple" / wheel.name.partition("-")[0] / "index.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        with page.open("a") as lines:
            lines.write(f'<a href="http://{host}/{wheel.name}">{wheel.name}</a>\n')
