"""Processes that read images: Pillow's decoders hold Python's lock, so that threads share the time of one core.

A process answers one request at a time, a line of JSON on its standard input: a file, the side of a square, and how the
image becomes one. It ends with that input, so it never outlives the program that started it, and a Ctrl-C of the
terminal does not reach it. It needs no torch, so it starts within a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
from pathlib import Path
from types import TracebackType

import numpy as np
from PIL import Image

from LightningDiT.data.image_files import read_image, shown
from LightningDiT.errors import LightningDiTError
from LightningDiT.images import square

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
SERVE = "import sys; sys.path[:] = sys.argv[1:]; from LightningDiT.data import reading; reading.serve()"
SECONDS = 5.0  # in which a process that has closed its pipe ends
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
NO_CONSOLE = {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0), "start_new_session": True}


def pixels_of(image: Image.Image, size: int | None, fit: str = "crop") -> tuple[np.ndarray, float]:
    """Return RGB pixels (H, W, 3) uint8, of a square if it has a size, and the share of the longer side cut.

    Args:
        fit: of `images.FITS`.
    """
    # colours after the crop: a large grey image takes a quarter of the memory
    pixels = np.asarray((square(image, size, fit) if size else image).convert("RGB"))
    return pixels, 1 - min(image.size) / max(image.size) if size and fit == "crop" else 0.0


class UnreadableError(Exception):
    """An image cannot be read; the text is that of Pillow's error in the process that tried."""


class ReadingProcesses:
    """At most `count` processes, each started when it is first needed; from several threads at once.

    Used as a context, at whose end they end.
    """

    def __init__(self, count: int) -> None:
        self.count, self._ended = count, False
        self._started: list[subprocess.Popen[bytes]] = []
        self._free: queue.LifoQueue[subprocess.Popen[bytes] | None] = queue.LifoQueue()
        for _ in range(count):
            self._free.put(None)

    def __enter__(self) -> ReadingProcesses:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended = True
        for process in self._started:
            process.kill()  # it holds nothing
            with contextlib.suppress(OSError), process:
                pass

    def read(self, file: str | Path, size: int | None, fit: str = "crop") -> tuple[np.ndarray, float]:
        """Return what `pixels_of` does of an image file.

        Raises:
            UnreadableError: the image cannot be read.
            LightningDiTError: the process has ended.
        """
        process = self._free.get()
        try:
            if process is None:
                process = self._start()
            return _asked(process, file, size, fit)
        except (OSError, ValueError) as error:  # a broken pipe, or half an answer
            raise LightningDiTError(
                f"the process that read {shown(file)} has ended{_how(process)}",
                "run the same command again, or take that image away",
            ) from error
        finally:
            self._free.put(process)

    def _start(self) -> subprocess.Popen[bytes]:
        command, pipe = [sys.executable, "-c", SERVE, str(ROOT), *sys.path], subprocess.PIPE
        try:
            if self._ended:  # a thread was ahead of the end
                raise OSError("the reading has ended")
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | ONE_THREAD, **NO_CONSOLE)
        except OSError as error:
            raise LightningDiTError(f"no process that reads images starts ({error})", "give --workers 0") from error
        self._started.append(process)
        return process


def _asked(process: subprocess.Popen[bytes], file: str | Path, size: int | None, fit: str) -> tuple[np.ndarray, float]:
    process.stdin.write(json.dumps([str(file), size, fit]).encode() + b"\n")
    process.stdin.flush()
    # a line of another kind is what this Python prints at its start
    answer = json.loads(next((line for line in process.stdout if line.startswith(b"{")), b""))
    if "no_memory" in answer:
        raise MemoryError(answer["no_memory"])
    if "unreadable" in answer:
        raise UnreadableError(answer["unreadable"])
    pixels = np.frombuffer(process.stdout.read(answer["bytes"]), np.uint8)
    return pixels.reshape(*answer["shape"]), answer["cut"]


def _how(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f" (exit code {process.wait(SECONDS)})"
    return ""


def serve() -> None:
    """Answer the requests on standard input until it ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    if sys.stderr:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not mix with the answers
    for line in sys.stdin.buffer:
        file, size, fit = json.loads(line)
        pixels = b""
        try:
            values, cut = pixels_of(read_image(file), size, fit)
            pixels = values.tobytes()
            answer = {"shape": values.shape, "bytes": len(pixels), "cut": cut}
        except MemoryError as error:
            answer = {"no_memory": str(error)}
        except Exception as error:  # arbitrary bytes make Pillow's readers fail in arbitrary ways
            answer = {"unreadable": str(error)}
        try:
            answers.write(json.dumps(answer).encode() + b"\n" + pixels)
            answers.flush()
        except OSError:  # nobody reads it any longer
            return
