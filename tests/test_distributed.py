"""Processes that share a run: what one says all know, and the error of one is the end of all."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from LightningDiT.distributed import ALONE, LOST, launched_processes
from LightningDiT.errors import LightningDiTError
from tests.conftest import BUNDLED, PROJECT

#: Forks two processes a case, since starting Python takes longer than what is tested; their output goes to files.
NURSERY = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from LightningDiT import inference
from LightningDiT.console import run_main
from LightningDiT.errors import LightningDiTError
from LightningDiT.distributed import LIFELINE, launched_processes
assert inference.main(["--config", sys.argv[3], "--demo", "--dry-run"]) == 0
import LightningDiT.sampling.resumable_run
print("accelerate" in sys.modules)
import accelerate, torch

def fail():
    raise LightningDiTError("the disk is full", "free space")

def play(case):
    with launched_processes() as processes:
        rank = processes.rank
        assert processes.share(lambda: 10 * rank) == [0, 10]
        assert processes.from_main(lambda: f"from {rank}") == "from 0"
        assert processes.agree(lambda: rank) == rank
        assert processes.mean(torch.tensor([rank, 4.0])).tolist() == [0.5, 4.0]
        assert (processes.any(rank == 1), processes.any(False)) == (True, False)
        processes.say("said once")
        if case == "error":
            processes.agree(fail if rank == 1 else lambda: None)
        if case in ("death", "lost") and rank == 1:
            os._exit(9)
        if case == "interrupt":
            processes.end_by_interrupt()
        processes.agree(lambda: None)
    return 0

for case in sys.argv[4:]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE="2")
    if case == "lost":
        held = os.pipe()
        os.dup2(held[0], 0)
        os.environ[LIFELINE] = "stdin"
    children = []
    for rank in "01":
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{sys.argv[2]}/{case}{rank}.{name}", os.O_CREAT | os.O_WRONLY), number)
            try:
                code = run_main(lambda: play(case))
            except SystemExit as end:
                code = end.code
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    print(case, *[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


@dataclass(frozen=True)
class End:
    """How a process ended: exit code, output and errors."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[End]]:
    """The ends of the two processes of every case, and under "alone" what is said about one process."""
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-c", NURSERY, str(PROJECT), str(folder), str(BUNDLED / "config.yaml")]
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    done = subprocess.run(
        [*command, "error", "death", "interrupt", "nothing", "lost"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    ends: dict[str, list[End]] = {"alone": [End(0, done.stdout, done.stderr)]}
    for line in done.stdout.splitlines()[-5:]:
        case, *codes = line.split()
        texts = [[(folder / f"{case}{rank}.{name}").read_text() for name in ("out", "err")] for rank in (0, 1)]
        ends[case] = [End(int(code), *text) for code, text in zip(codes, texts, strict=True)]
    return ends


def test_one_process_needs_no_accelerate(played: dict[str, list[End]]) -> None:
    assert played["alone"][0].out.splitlines()[-6] == "False"


def test_two_processes_that_finish(played: dict[str, list[End]]) -> None:
    assert played["nothing"] == [End(0, "said once\n", ""), End(0, "", "")]


def test_a_failing_process_ends_all_with_one_line(played: dict[str, list[End]]) -> None:
    error = "error: process 1 of 2: the disk is full; fix: free space\n"
    assert played["error"] == [End(1, "said once\n", error), End(1, "", "")]


def test_a_process_that_dies_is_noticed(played: dict[str, list[End]]) -> None:
    main, other = played["death"]
    assert (main.code, main.out, other.code) == (1, "said once\n", 9)
    assert main.err.splitlines()[-1].startswith("error: another process of this run has ended")


def test_a_process_of_all_gpus_leaves_it_to_the_first_to_say_which_one_died(played: dict[str, list[End]]) -> None:
    main, other = played["lost"]
    assert (main.code, main.out, main.err, other.code) == (LOST, "said once\n", "", 9)


def test_the_end_by_ctrl_c_is_said_once(played: dict[str, list[End]]) -> None:
    main, other = played["interrupt"]
    assert main.code == other.code == 130
    assert "the same command goes on from there" in main.err
    assert other.err == ""


def test_alone_nothing_is_exchanged(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with launched_processes() as processes:
        assert processes is ALONE
    assert ALONE.share(lambda: 3) == [3]
    assert ALONE.mean(torch.tensor([2.0])).tolist() == [2.0]
    assert (ALONE.any(True), ALONE.any(False)) == (True, False)
    assert ALONE.from_main(lambda: 4) == ALONE.agree(lambda: 4) == 4
    ALONE.say("said")
    assert capsys.readouterr().out == "said\n"
    with pytest.raises(KeyboardInterrupt):
        ALONE.end_by_interrupt()


def test_without_accelerate_several_processes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)  # Python's own mark of a module that cannot be imported
    with pytest.raises(LightningDiTError, match=r"a package that is missing .*step1"), launched_processes():
        pass
