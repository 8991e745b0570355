"""How fast the set-up moves bytes, as ratios in one run: the downloader beside curl, a download that goes on, and the
conversion of a checkpoint beside a copy of it.

`python -m studies.setup_benchmark` needs curl and about 9 GB of disk in --folder. The server on 127.0.0.1 is a separate
process that sends by the kernel, so that the measurement does not include it.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path
from typing import Any

from LightningDiT.console import OK, format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import bring_to_disk
from setup_steps import checks, convert, downloads, project, weights
from setup_steps.project import PROJECT

BLOCK = 1 << 24
REQUEST_LINE = "asked from byte "


class _Sender(BaseHTTPRequestHandler):
    """Sends one file from the requested byte on; prints the first byte of each request."""

    file: Path

    def do_GET(self) -> None:
        size = self.file.stat().st_size
        start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1])
        print(f"{REQUEST_LINE}{start}", flush=True)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(size - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.end_headers()
        self.wfile.flush()
        with self.file.open("rb") as file:
            while sent := os.sendfile(self.connection.fileno(), file.fileno(), start, BLOCK):
                start += sent

    def log_message(self, *_: Any) -> None:
        """Print nothing else."""


def serve(file: Path) -> None:
    """Serve `file` until killed; print the port first."""
    server = HTTPServer(("127.0.0.1", 0), type("Sender", (_Sender,), {"file": file}))
    print(server.server_address[1], flush=True)
    server.serve_forever()


@contextmanager
def serving(file: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Give the address of `file` on a server process that ends with the block."""
    command = [sys.executable, "-m", "studies.setup_benchmark", "--serve", str(file)]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}/{file.name}", server
        finally:
            server.terminate()


def make_file(path: Path, size: int) -> str:
    """Write `size` random bytes and return their sha256."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        while file.tell() < size:
            block = os.urandom(min(BLOCK, size - file.tell()))
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def seconds_of(call: Callable[[], object]) -> float:
    """Return the wall-clock seconds of one call, whose output is discarded."""
    began = time.perf_counter()
    with redirect_stdout(StringIO()):
        call()
    return time.perf_counter() - began


def paired(calls: dict[str, Callable[[], object]], rounds: int, clean: Callable[[], object]) -> dict[str, list[float]]:
    """Return the seconds of each call in every round; the calls alternate within a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            clean()
            times[name].append(seconds_of(call))
    return times


def report(times: dict[str, list[float]], size: int, base: str) -> None:
    """Print each call's median rate and the median of its ratios to `base` within a round."""
    for name, values in times.items():
        ratio = statistics.median(mine / own for mine, own in zip(times[base], values, strict=True))
        rate = format_bytes(size / statistics.median(values))
        print(f"  {name:34} {statistics.median(values):6.2f} s  {rate}/s  {ratio:.2f} of {base}'s rate")


def measure_download(folder: Path, size: int, rounds: int) -> None:
    """Measure the downloader, with hashing, beside curl from the same server to the same disk."""
    source, target = folder / "source.bin", folder / "target.bin"
    digest = make_file(source, size)
    print(f"Download of {format_bytes(size)} from 127.0.0.1")
    with serving(source) as (url, server):
        remote = downloads.RemoteFile(target.name, url, size, digest, "main")

        def curl() -> None:
            subprocess.run(["curl", "-s", "-o", str(target), url], check=True)

        calls: dict[str, Callable[[], object]] = {
            "curl": curl,
            "curl, then fsync": lambda: (curl(), bring_to_disk(target)),
            "step 2, hashed, with fsync": lambda: downloads.download(remote, target),
        }
        report(paired(calls, rounds, lambda: target.unlink(missing_ok=True)), size, "curl")
        measure_resumption(source, target, remote, server)


def measure_resumption(source: Path, target: Path, remote: downloads.RemoteFile, server: subprocess.Popen[str]) -> None:
    """Measure a half-finished download: what it reads again and what it requests."""
    target.unlink(missing_ok=True)
    part, half = downloads.PartFile(target, remote), remote.size // 2
    part.note(None)
    with source.open("rb") as file:
        while part.offset < half:
            part.write(file.read(min(BLOCK, half - part.offset)))
    part.close()
    before = bytes_read()
    seconds = seconds_of(lambda: downloads.download(remote, target))
    read = bytes_read() - before
    server.terminate()
    asked = [line for line in server.communicate()[0].splitlines() if line.startswith(REQUEST_LINE)]
    print(f"  goes on after {format_bytes(half)}: {seconds:.2f} s, the server was {asked[-1]} of {remote.size};")
    print(f"  {format_bytes(read)} were read from the disk, {read / half:.2f} times the part")


def bytes_read() -> int:
    """Return the bytes that this process has read from files so far (Linux; sockets do not count)."""
    rows = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(row.split(": ") for row in rows)["rchar"])


def make_checkpoint(path: Path, file: weights.WeightFile) -> int:
    """Write seeded EMA weights with the published names and shapes; return the file's size."""
    import torch

    generator = torch.Generator().manual_seed(0)
    shapes = checks.published_table(str(file.table))
    torch.save({"ema": {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}}, path)
    return path.stat().st_size


def measure_conversion(folder: Path, rounds: int) -> None:
    """Measure the conversion with its comparison beside a copy, both brought to the disk."""
    file = weights.DIT["800ep"]
    source, copy = folder / file.name, folder / "copy.pt"
    size = make_checkpoint(source, file)
    print(f"Conversion of {format_bytes(size)}")

    def copy_to_disk() -> None:
        shutil.copyfile(source, copy)
        bring_to_disk(copy)

    def clean() -> None:
        copy.unlink(missing_ok=True)
        for name in weights.usable_names(file):
            if name != source.name:
                (folder / name).unlink(missing_ok=True)

    calls: dict[str, Callable[[], object]] = {"copy": copy_to_disk}
    for precision in weights.PRECISIONS:
        calls[f"--convert {precision}"] = lambda precision=precision: convert.convert(source, file, precision, False)
    report(paired(calls, rounds, clean), size, "copy")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m studies.setup_benchmark", description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="a disk with 9 GB free")
    parser.add_argument("--size", type=int, default=1 << 30, metavar="BYTES", help="of the download; default: 1 GiB")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    parser.add_argument("--only", choices=["download", "conversion"])
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rounds < 1 or options.size < 2:
        parser.error("--rounds takes a number from 1, --size one from 2")
    if not options.folder.is_dir():
        parser.error(f"--folder {options.folder} is no folder")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    if options.serve:
        serve(options.serve)
    if not Path("/proc/self/io").exists():
        raise LightningDiTError("/proc, which counts the bytes read, is not here", "run it on Linux")
    if options.only != "conversion" and not shutil.which("curl"):
        raise LightningDiTError("curl is not on this machine", "install curl, or add --only conversion")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if options.only != "conversion":
            measure_download(Path(folder), options.size, options.rounds)
        if options.only != "download":
            measure_conversion(Path(folder), options.rounds)
    return OK


if __name__ == "__main__":
    project.run(main)
