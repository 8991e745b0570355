"""One run on all GPUs: which ones are used, what is said, and the ends of the processes; with processes on the CPU."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from LightningDiT import inference
from LightningDiT.config import Config, SampleConfig
from LightningDiT.console import run_main
from LightningDiT.device import Precision
from LightningDiT.files import LOCK
from LightningDiT.sampling import all_gpus
from LightningDiT.sampling.all_gpus import Gpu, check_gpus, choose, describe, report, run_on_all_gpus, share_run
from LightningDiT.sampling.options import images_at_once
from tests.test_conditions import write_model

T4 = [Gpu(number, "Tesla T4", "float16") for number in range(4)]
BROKEN = Gpu(1, None, None, "no kernel image is available")
L4 = Gpu(2, "NVIDIA L4", "bfloat16")


def command(folder: Path, output: str, *more: str) -> list[str]:
    return ["--config", str(folder / "config.yaml"), "--output", str(folder / output), *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run but its lock and the record of its times."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in (LOCK, "made.json")}


def shared(*arguments: str) -> int:
    """Run inference in two processes, as on two GPUs."""
    return run_main(lambda: share_run(["-m", "LightningDiT.inference", *arguments], [0, 1]))


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """A machine with a broken GPU among four; the numbers of the GPUs of each run that is started."""
    started: list[list[int]] = []
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(all_gpus, "gpu_count", lambda: 4)
    monkeypatch.setattr(all_gpus, "check_gpus", lambda count: [T4[0], BROKEN, *T4[2:count]])
    monkeypatch.setattr(all_gpus, "share_run", lambda command, gpus: started.append(gpus) or 7)
    return started


def run(images: int = 100, gpus: str = "all", dry_run: bool = False, precision: str = "auto") -> int | None:
    sample = SampleConfig(per_proc_batch_size=4, precision=precision)
    return run_on_all_gpus(
        ["x"], argparse.Namespace(gpus=gpus, dry_run=dry_run), lambda: (Config(sample=sample), images)
    )


def test_the_gpus_that_work_share_a_run(several: list[list[int]], capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 7
    assert run(images=2) == 7
    assert several == [[0, 2, 3], [0, 2]]
    names = "0 Tesla T4, 2 Tesla T4"
    left_out = "left out: 1 unknown (no kernel image is available)"
    assert capsys.readouterr().out.splitlines() == [
        f"GPUs           3 of 4: {names}, 3 Tesla T4; {left_out}",
        f"GPUs           2 of 4: {names}; 1 idle, since 2 images are 2 batches; {left_out}",
    ]


def test_one_process_does_what_cannot_be_shared(
    several: list[list[int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [run(gpus="1"), run(dry_run=True), run(images=1)] == [None] * 3
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        assert run() is None
    with monkeypatch.context() as patch:
        patch.setattr(all_gpus, "gpu_count", lambda: 1)
        assert run_on_all_gpus(["x"], argparse.Namespace(gpus="all", dry_run=False), lambda: 1 / 0) is None
    assert capsys.readouterr().out == ""
    with monkeypatch.context() as patch:
        patch.setattr(all_gpus.importlib.util, "find_spec", lambda name: None)
        with pytest.warns(UserWarning, match="accelerate is missing, so one of 4 GPUs is used; python step1_"):
            assert run() is None
    monkeypatch.setattr(all_gpus, "check_gpus", lambda count: [BROKEN])
    assert run() is None
    assert capsys.readouterr().out == (
        "GPUs           0 of 1: none works, so the CPU is used; left out: 1 unknown (no kernel image is available)\n"
    )
    assert several == []


def test_a_run_has_one_precision() -> None:
    """`auto` is fp16 on a T4 and bf16 on an L4."""
    mixed = choose([BROKEN, T4[0], L4], "auto")
    assert [gpu.failure is None for gpu in mixed] == [False, True, False]
    assert describe(mixed, [T4[0]], 9).endswith(
        "2 NVIDIA L4 (computes in bfloat16, GPU 0 in float16; --precision fp16 uses both)"
    )
    assert choose([T4[0], L4], "fp16") == [T4[0], L4]
    unlike = choose([T4[0], L4], "tf32")
    assert str(unlike[1]) == "2 NVIDIA L4 (differs from GPU 0 in having TF32; --precision fp32 uses both)"


def test_a_run_is_cut_into_two_batches_and_one_for_each_gpu() -> None:
    assert [images_at_once(images, 8) for images in (1, 2, 3, 8, 15, 16, 100)] == [1, 1, 2, 4, 8, 8, 8]
    assert [images_at_once(300, at_most, 4) for at_most in (256, 8, None)] == [75, 8, 75]


def test_the_test_of_the_gpus_reports_what_each_of_them_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(all_gpus, "gpu_count", lambda: 2)
    monkeypatch.setattr(all_gpus, "gpu_failure", lambda gpu: BROKEN.failure if gpu.index else None)
    monkeypatch.setattr(all_gpus, "gpu_name", lambda gpu: "Tesla T4")
    monkeypatch.setattr(all_gpus, "resolve_precision", lambda name, gpu: Precision(torch.float16))
    report()
    lines = capsys.readouterr().out
    said = f"import sys; print('[9]'); print('a library speaks'); print({lines!r}, end='', flush=True); "
    monkeypatch.setattr(all_gpus, "TEST", said + "sys.exit(5)")
    assert check_gpus(3) == [T4[0], BROKEN, Gpu(2, failure="its test ended with exit code 5")]
    monkeypatch.setattr(all_gpus, "TEST", said + "import time; time.sleep(60)")
    monkeypatch.setattr(all_gpus, "TEST_SECONDS", 1.0)
    assert check_gpus(3) == [T4[0], BROKEN, Gpu(2, failure="its test took more than 1 s")]


ENDS = {
    # what ranks 0 and 1 do: exit code, what the person reads
    "both end": ("pass", "pass", 0, ""),
    "the main one speaks": ("say('error: full'); sys.exit(1)", "say('mine'); sys.exit(1)", 1, "error: full\n"),
    "a crash": (
        "sys.exit(3)",
        "say('Traceback'); sys.exit(1)",
        1,
        "Traceback\nerror: process 1 of 2, on GPU 5, was ended by exit code 1; fix: run the same command again, or",
    ),
    "a kill": (
        "time.sleep(60)",
        "os.kill(os.getpid(), 9)",
        1,
        "error: process 1 of 2, on GPU 5, was ended by signal 9",
    ),
    "a kill of the main one": ("os.kill(os.getpid(), 9)", "sys.exit(3)", 1, "error: process 0 of 2, on GPU 2, was end"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_a_run_is_said_once(
    case: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    first, second, code, words = ENDS[case]
    script = (
        "import os, sys, time\ndef say(text): print(text, file=sys.stderr, flush=True)\n"
        "print(os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], flush=True)\n"
        f"if os.environ['RANK'] == '0': {first}\nelse: {second}"
    )
    monkeypatch.setattr(all_gpus, "LAST_SECONDS", 0.5)
    assert run_main(lambda: share_run(["-c", script], [2, 5])) == code
    said = capfd.readouterr()
    assert said.out == "2 2\n"
    assert said.err.startswith(words)
    assert len(said.err.splitlines()) == len(words.splitlines())


@pytest.mark.usefixtures("one_thread")
def test_a_grid_of_two_processes_is_that_of_one(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a model with conditions, which take turns."""
    write_model(tiny_folder)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--demo", "--count", "5", "--conditions", "Bag", "none"]
    assert inference.main(command(tiny_folder, "one", *options)) == 0
    assert shared(*command(tiny_folder, "two", *options)) == 0
    assert capfd.readouterr().out.count("5 of 5 images, 5 made now") == 2
    one, two = (tiny_folder / name / "demo_samples.png" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert contents(next(one.parent.glob("run-*"))) == contents(next(two.parent.glob("run-*")))


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.usefixtures("one_thread")
def test_ctrl_c_ends_two_processes_after_their_batches(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And one process goes on with what they left, to the bytes of one that did it all."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = ["--num-samples", "10", "--steps", "16", "--batch-size", "1"]
    assert inference.main(command(tiny_folder, "whole", *options)) == 0

    def interrupt() -> None:
        until = time.monotonic() + 300  # a loaded machine starts processes slowly
        while not list((tiny_folder / "out").glob("0*.png")) and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    assert shared(*command(tiny_folder, "out", *options)) == 130
    said = capfd.readouterr()
    assert said.err.count("stopping after the current batch") == said.err.count("stopped; finished work is kept") == 1
    done = len(list((tiny_folder / "out").glob("0*.png")))
    assert 0 < done < 10
    assert f"{done} of 10 images in {tiny_folder / 'out'}, {done} of them made now" in said.out
    assert inference.main(command(tiny_folder, "out", *options)) == 0
    assert contents(tiny_folder / "out") == contents(tiny_folder / "whole")
