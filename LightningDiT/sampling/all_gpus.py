"""One run on every GPU that works, without a launcher: the first process starts one process for each GPU and waits.

The processes share the run as those of torchrun do (LightningDiT/distributed.py). The first process makes no context on
a GPU. It holds the other end of their standard input: when it closes that end, or dies, each of them takes it as
Ctrl-C, finishes its batch and stops.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from LightningDiT.config import Config
from LightningDiT.console import FAILED, INTERRUPTED, OK, StopRequest
from LightningDiT.device import gpu_count, gpu_device, gpu_failure, gpu_name, resolve_precision
from LightningDiT.distributed import LIFELINE
from LightningDiT.errors import LightningDiTError, warn_user
from LightningDiT.sampling.options import images_at_once

ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package
TEST = "import sys; sys.path.insert(0, sys.argv[1]); from LightningDiT.sampling import all_gpus; all_gpus.report()"
TEST_SECONDS = 180.0  # of all GPUs; the first use of a slow disk's torch takes half a minute
LAST_SECONDS = 10.0  # in which the processes end by themselves after one of them died
KILLED = 9  # the signal, which Windows does not name
PAUSE = 0.05  # seconds between two looks at the processes
SPOKEN = (OK, FAILED, INTERRUPTED)  # exit codes after which the main process has said what there is to say


@dataclass(frozen=True)
class Gpu:
    """A GPU that this machine shows.

    Attributes:
        number: as this process counts them.
        name: None if the GPU does not tell it.
        precision: that `auto` chooses on it.
        failure: why it is left out; None for a GPU that works.
    """

    number: int
    name: str | None = None
    precision: str | None = None
    failure: str | None = None

    def __str__(self) -> str:
        reason = f" ({self.failure})" if self.failure else ""
        return f"{self.number} {self.name or 'unknown'}{reason}"


def run_on_all_gpus(
    command: Sequence[str], args: argparse.Namespace, plan: Callable[[], tuple[Config, int]]
) -> int | None:
    """Run this command again in a process for each GPU that works and return its exit code; None to go on alone.

    Args:
        command: the arguments of Python that make this command.
        args: `gpus` and `dry_run` of its command line.
        plan: returns the settings and the number of images; called only where there are several GPUs.

    Raises:
        LightningDiTError: a process of the run was killed; or see `plan`.
        KeyboardInterrupt: a second Ctrl-C ended the run at once.
    """
    seen = 1 if args.gpus == "1" or args.dry_run or "WORLD_SIZE" in os.environ else gpu_count()
    if seen < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the run itself reads the settings again
        config, images = plan()
    batches = math.ceil(images / images_at_once(images, config.sample.per_proc_batch_size, seen))
    if batches < 2:
        return None
    if importlib.util.find_spec("accelerate") is None:
        warn_user(f"accelerate is missing, so one of {seen} GPUs is used; python step1_install_environment.py adds it")
        return None
    gpus = choose(check_gpus(seen), config.sample.precision)
    used = [gpu for gpu in gpus if gpu.failure is None][:batches]
    print(f"GPUs           {describe(gpus, used, images)}", flush=True)
    return share_run(command, [gpu.number for gpu in used]) if len(used) > 1 else None


def check_gpus(count: int) -> list[Gpu]:
    """Return `count` GPUs after one kernel on each of them, in a process of its own that leaves no context."""
    command = [sys.executable, "-c", TEST, str(ROOT)]
    try:
        tested = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=TEST_SECONDS, check=False
        )
        output, why = tested.stdout, f"its test ended with exit code {tested.returncode}"
    except subprocess.TimeoutExpired as error:
        output, why = error.stdout or b"", f"its test took more than {TEST_SECONDS:.0f} s"
    found = {number: Gpu(number, failure=why) for number in range(count)}
    for line in output.decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):  # of other lines that libraries print
            number, name, precision, failure = json.loads(line)
            found[number] = Gpu(number, name, precision, failure)
    return [found[number] for number in range(count)]


def report() -> None:
    """Print a line of JSON for each GPU: the fields of `Gpu`."""
    for number in range(gpu_count()):
        device, name, precision = gpu_device(number), None, None
        failure = gpu_failure(device)
        if failure is None:
            name, precision = gpu_name(device), resolve_precision("auto", device).name
        print(json.dumps([number, name, precision, failure]), flush=True)


def choose(gpus: Sequence[Gpu], precision: str) -> list[Gpu]:
    """Return the GPUs with a reason for each that is left out: a run has one precision."""
    working = next((gpu for gpu in gpus if gpu.failure is None), None)
    if working is None or precision not in ("auto", "tf32"):
        return list(gpus)
    other = f"computes in {{}}, GPU {working.number} in {working.precision}; --precision fp16 uses both"
    if precision == "tf32":  # which GPUs with native bf16 have
        other = f"differs from GPU {working.number} in having TF32; --precision fp32 uses both"
    return [
        gpu
        if gpu.failure or gpu.precision == working.precision
        else Gpu(gpu.number, gpu.name, gpu.precision, other.format(gpu.precision))
        for gpu in gpus
    ]


def describe(gpus: Sequence[Gpu], used: Sequence[Gpu], images: int) -> str:
    """Return in one line which GPUs are used and which are not, and why."""
    failed = [gpu for gpu in gpus if gpu.failure]
    idle = len(gpus) - len(failed) - len(used)
    words = f"{len(used)} of {len(gpus)}: {', '.join(map(str, used)) or 'none works, so the CPU is used'}"
    if idle:
        words += f"; {idle} idle, since {images} images are {len(used)} batches"
    return f"{words}; left out: {', '.join(map(str, failed))}" if failed else words


def share_run(command: Sequence[str], gpus: Sequence[int]) -> int:
    """Run `python command` in one process for each number of a GPU and return the exit code of the run.

    The main process, rank 0, speaks for all. Ctrl-C is passed on once, so that each process finishes its batch. When a
    process dies the others get a few seconds to end.

    Raises:
        LightningDiTError: a process died without a word of the main one; its own words are on stderr.
        KeyboardInterrupt: a second Ctrl-C came, or the first before the main process could say that it stops.
    """
    running: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as stack:
        words = [stack.enter_context(tempfile.TemporaryFile()) for _ in gpus]  # of the errors of all but the main one
        stop = stack.enter_context(StopRequest(quiet=True))
        stack.callback(_end, running)
        environments = _environments(gpus)
        for environment, said in zip(environments, words, strict=True):
            running.append(_start(command, environment, None if not running else said))
        try:
            codes = _wait(running, stop)
        except KeyboardInterrupt:
            if running[0].poll() != INTERRUPTED:  # else the main process has said so
                raise
            return INTERRUPTED
        if codes[0] in SPOKEN:
            return codes[0]
        if stop.asked:
            raise KeyboardInterrupt
        raise _death(codes, gpus, words)


def _environments(gpus: Sequence[int]) -> list[dict[str, str]]:
    """Return the environment of each process: torchrun's variables, with the number of its GPU as local rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    count = len(gpus)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {
        # one machine: no name of a host is looked up, and Windows' torch lacks libuv
        **({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}),
        **({"USE_LIBUV": "0"} if os.name == "nt" else {}),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
        **os.environ,
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)},
        **{"LOCAL_WORLD_SIZE": str(count), "PYTHONPATH": os.pathsep.join(paths), LIFELINE: "stdin"},
    }
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(gpu)} for rank, gpu in enumerate(gpus)]


def _start(command: Sequence[str], environment: dict[str, str], errors: IO[bytes] | None) -> subprocess.Popen[bytes]:
    """Start one process, out of reach of the terminal's Ctrl-C; `errors` takes what a process that is not main says."""
    return subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=None if errors is None else subprocess.DEVNULL,
        stderr=errors,
        start_new_session=True,
        creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
    )


def _wait(running: Sequence[subprocess.Popen[bytes]], stop: StopRequest) -> list[int | None]:
    """Return the exit codes, None for a process that still ran some seconds after another died."""
    until = math.inf
    while None in (codes := [process.poll() for process in running]) and time.monotonic() < until:
        if stop.asked:
            _let_go(running)
        if any(code not in (None, OK, INTERRUPTED) for code in codes):
            until = min(until, time.monotonic() + LAST_SECONDS)
        time.sleep(PAUSE)
    return codes


def _let_go(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.close()


def _end(running: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in running:
        process.kill()
    for process in running:
        process.wait()
    _let_go(running)


def _death(codes: Sequence[int | None], gpus: Sequence[int], words: Sequence[IO[bytes]]) -> LightningDiTError:
    """Return the error of the process that died first, as far as the exit codes tell, after its own words."""
    ended = [rank for rank, code in enumerate(codes) if code not in (None, OK, INTERRUPTED)]
    # one that was killed, then one with an error of its own; the rest only lost their partner
    rank = min(ended, key=lambda rank: ((codes[rank] or 0) > 0, codes[rank] != FAILED), default=0)
    code = codes[rank]
    words[rank].seek(0)
    if said := words[rank].read().decode(errors="replace").strip():
        print(said, file=sys.stderr, flush=True)
    how = f"exit code {code}"
    if code is not None and code < 0:
        how = f"signal {-code}" + (", as the system does when memory runs out" if code == -KILLED else "")
    return LightningDiTError(
        f"process {rank} of {len(gpus)}, on GPU {gpus[rank]}, was ended by {how}",
        "run the same command again, or add --gpus 1",
    )
