"""How a run is made fast: the choice from facts, torch.compile as a switch, and the notes that code is there."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from LightningDiT import compiling
from LightningDiT.compiling import (
    BLOCK,
    CODE_FOLDER,
    KERNELS,
    PLAIN,
    WHOLE,
    Plan,
    Work,
    choose,
    code_folder,
    compile_forward,
    is_compiled,
    leave_stamp,
    stamp_of,
    uncompiled,
)
from LightningDiT.config import typed
from LightningDiT.device import Abilities
from LightningDiT.errors import LightningDiTError
from studies.compile_study import Row, pays_after, table
from tests.conftest import PROJECT

CPU = Abilities("CPU", None, (2, 14), "graphs need a GPU")
P100 = Abilities("P100", (6, 0), (2, 7), "", "Triton needs a GPU of capability 7.0")
T4 = Abilities("T4", (7, 5), (2, 4))
A100 = Abilities("A100", (8, 0), (2, 11))
H100 = Abilities("H100", (9, 0), (2, 11))
#: 25 evaluations of XL/1, all of them guided after the start of an interval.
XL = Work(images=8, batch=16, states=50, shapes=2, gflop=237.3, half=True)

# --- the choice


@pytest.mark.parametrize(
    ("machine", "images", "wish", "warm", "graphs", "compiled", "reason"),
    [
        (H100, 8, "auto", [], True, "", "8 images do not gain the 24 s of compiling"),
        (H100, 50_000, "auto", [], True, BLOCK, "50000 images gain more than the 24 s of compiling"),
        (T4, 50_000, "auto", [], True, WHOLE, "50000 images gain more than the 78 s of compiling"),
        (H100, 1, "auto", [WHOLE], True, WHOLE, "an earlier run left the compiled code"),
        (H100, 8, "auto", [BLOCK], True, BLOCK, "an earlier run left the compiled code"),
        (H100, 8, "on", [], True, BLOCK, "compile is on"),
        (H100, 50_000, "off", [WHOLE], True, "", "compile is off"),
        (T4, 8, "auto", [BLOCK], True, "", "8 images do not gain the 78 s of compiling"),  # code that it cannot run
        (T4, 8, "on", [], True, WHOLE, "compile is on"),  # the blocks of torch 2.4 cannot share their code
        (P100, 50_000, "auto", [], True, "", "nothing is compiled: Triton needs a GPU of capability 7.0"),
        (P100, 8, "on", [], True, "", "nothing is compiled: Triton needs a GPU of capability 7.0"),
        (CPU, 50_000, "auto", [WHOLE], False, "", "on a CPU compiling pays only for long runs of small models"),
        (CPU, 8, "on", [], False, BLOCK, "compile is on"),
    ],
)
def test_the_choice_follows_from_the_facts(
    machine: Abilities, images: int, wish: str, warm: list[str], graphs: bool, compiled: str, reason: str
) -> None:
    plan = choose(replace(XL, images=images), machine, wish, warm=warm)
    assert (plan.graphs, plan.compiled, plan.wish) == (graphs, compiled, wish)
    assert plan.reason.startswith(reason)
    assert plan.batch == (min(images, 16) if graphs or compiled else None)
    assert plan == choose(replace(XL, images=images), machine, wish, warm=warm)
    assert plan.describe().endswith(f"({plan.reason})")
    assert typed(Plan, asdict(plan), "manifest") == plan


def test_compiling_is_chosen_where_the_tables_times_cross() -> None:
    """XL/1, 50 states an image: 17.6 - 8.44 ms less a 16 states, against 24 s; or 17.6 - 8.45 ms, against 78 s."""
    first = (24 - 2) * 16 / 0.00916 / 50  # the graphs' own 2 s are in both
    whole = (78 - 2) * 16 / 0.00915 / 50
    for machine, crossing, compiled in ((H100, first, BLOCK), (T4, whole, WHOLE)):
        for images, chosen in ((crossing * 0.99, ""), (crossing * 1.01, compiled)):
            assert choose(replace(XL, images=round(images)), machine).compiled == chosen, images
    smaller = replace(XL, gflop=XL.gflop / 10)  # a tenth of the work gains a tenth
    assert choose(replace(smaller, images=round(first * 9)), H100).compiled == ""
    assert choose(replace(smaller, images=round(first * 11)), H100).compiled == BLOCK


@pytest.mark.parametrize(
    ("machine", "half", "kernel"),
    [
        (H100, True, "cudnn"),
        (H100, False, "efficient"),
        (replace(H100, torch=(2, 4)), True, "flash"),
        (A100, True, "flash"),
        (T4, True, "efficient"),
        (P100, True, "efficient"),
        (CPU, True, None),
    ],
)
def test_the_kernel_of_attention_comes_from_the_table(machine: Abilities, half: bool, kernel: str | None) -> None:
    for deterministic in (False, True):
        assert choose(replace(XL, half=half), machine, deterministic=deterministic).attention == kernel


def test_a_deterministic_run_has_one_shape_and_compiles_nothing() -> None:
    plan = choose(replace(XL, images=50_000), H100, deterministic=True, warm=[WHOLE])
    assert plan == Plan(True, "", 16, "cudnn", True, "auto", plan.reason)
    assert [plan.rows(images) for images in (1, 3, 16)] == [16, 16, 16]
    assert plan.of_batch(1, 16) == plan
    assert plan.plainly() == replace(plan, graphs=False, attention="efficient")  # float32 has no cudnn


def test_an_adaptive_solver_is_computed_plainly() -> None:
    plan = choose(replace(XL, images=50_000, adaptive=True), H100, "on")
    assert (plan.graphs, plan.compiled, plan.batch) == (False, "", None)
    assert choose(replace(XL, adaptive=True), H100, deterministic=True).batch is None


def test_a_batch_is_padded_and_a_single_picture_is_not() -> None:
    plan = choose(replace(XL, images=40), H100)
    assert [plan.rows(images) for images in (2, 16)] == [16, 16]
    assert plan.of_batch(8, 8).rows(8) == plan.of_batch(3, 8).rows(3) == 8  # memory holds 8 at once
    assert plan.of_batch(1, 16) == plan.plainly() == PLAIN
    one = choose(replace(XL, images=1), H100)
    assert one.graphs and one.of_batch(1, 16).rows(1) == 1
    assert PLAIN.rows(3) == 3 and PLAIN.of_batch(3, 2) == PLAIN
    exact = Plan(tf32=True, half_decoder=True)  # the numbers that it computes stay
    assert replace(exact, batch=4, graphs=True).plainly() == exact


@pytest.mark.parametrize(
    ("plan", "machine", "wish", "objection"),
    [
        (Plan(graphs=True), CPU, "auto", "computes by graphs, and here graphs need a GPU"),
        (Plan(graphs=True), P100, "off", ""),
        (Plan(compiled=WHOLE), P100, "auto", "computes by compiled code, and here Triton needs"),
        (Plan(compiled=BLOCK), T4, "auto", "computes by one compiled block, which needs torch 2.5"),
        (Plan(compiled=WHOLE), T4, "on", ""),
        (Plan(compiled=WHOLE), T4, "off", "computes by compiled code, and compile is off"),
        (PLAIN, CPU, "on", "computes without compiled code, and compile is on"),
        (Plan(wish="on"), CPU, "on", ""),  # the first call of the same command had no compiler either
        (Plan(attention="cudnn"), A100, "auto", "computes attention by cudnn, which A100 with this torch does not"),
        (Plan(attention="efficient"), P100, "auto", ""),
        (Plan(tf32=True), P100, "auto", "computes in TF32, which P100 does not have"),
        (Plan(tf32=True), CPU, "auto", "computes in TF32, which CPU does not have"),
        (Plan(tf32=True), A100, "auto", ""),
        (Plan(half_decoder=True), CPU, "auto", "decodes in fp16, which takes a GPU"),
        (Plan(half_decoder=True), P100, "auto", ""),
    ],
)
def test_a_machine_that_cannot_compute_so_says_why(plan: Plan, machine: Abilities, wish: str, objection: str) -> None:
    found = plan.objection(machine, wish)
    assert found.startswith(objection) and bool(found) == bool(objection)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"compiled": "all"}, "compiled is 'all'; block, whole or nothing"),
        ({"attention": "best"}, "attention is 'best'; cudnn, flash"),
        ({"batch": 0}, "batch is 0; 1 or more"),
        ({"batch": "16"}, "batch is '16'; int or nothing"),
        ({"speed": 9}, "unknown key 'speed'"),
    ],
)
def test_a_plan_that_none_wrote_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(LightningDiTError, match=message):
        typed(Plan, values, "manifest")


def test_every_kernel_of_the_table_is_one_of_torchs() -> None:
    assert {row.name for row in KERNELS} < set(compiling.ATTENTION_KERNELS)


# --- torch.compile


WITHOUT_COMPILER = """
import sys, warnings
import torch
from torch import nn
from LightningDiT.compiling import compile_forward, is_compiled
from LightningDiT.sampling import pipeline
assert "torch._dynamo" not in sys.modules  # nothing of it before the switch is on

networks = [nn.Sequential(nn.Linear(3, 2), nn.GELU()).requires_grad_(False) for _ in range(2)]
given, names = torch.ones(4, 3), list(networks[0].state_dict())
expected = [network(given) for network in networks]
compile_forward(*networks)
assert list(networks[0].state_dict()) == names and is_compiled(*networks)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    made, line = [network(given) for network in networks], sys._getframe().f_lineno
said = [one for one in said if "torch.compile does not work here" in str(one.message)]
assert [(one.filename, one.lineno) for one in said] == [("<string>", line)], said
text = str(said[0].message)
assert "\\n" not in text and text.endswith("going on uncompiled"), text
assert all(map(torch.equal, made, expected))
assert not any(map(is_compiled, networks))
print("as before")
"""


def test_without_a_compiler_it_goes_on_with_one_warning(tmp_path: Path) -> None:
    environment = os.environ | {
        "CXX": str(tmp_path / "no-compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
    }
    command = [sys.executable, "-c", WITHOUT_COMPILER]
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("as before"), done.stderr


class Doubled(nn.Linear):
    """Twice its input, in place of a linear layer."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def fake_compile(monkeypatch: pytest.MonkeyPatch, folder: Path, error: BaseException | None = None) -> list[int]:
    """Let torch.compile give three times the input, or an error; return the lengths of the inputs, as they come."""
    seen: list[int] = []

    def compiled(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        if error is not None:
            raise error
        return 3 * x

    monkeypatch.setenv(compiling.CODE_FOLDER, str(folder))
    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: compiled)
    return seen


def test_compiled_code_is_left_out_within_a_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_compile(monkeypatch, tmp_path)
    network, one = nn.Sequential(Doubled(1, 1), Doubled(1, 1)), torch.ones(1)
    compile_forward(*network)
    assert float(network(one)) == 9
    with uncompiled(network):
        assert float(network(one)) == 4
    assert float(network(one)) == 9
    with pytest.raises(ZeroDivisionError), uncompiled(network):
        _ = 1 / 0
    assert is_compiled(*network)


@pytest.mark.parametrize("error", [RuntimeError("ptxas is gone"), OSError("no such program"), AssertionError()])
def test_whatever_fails_in_compiled_code_is_computed_plainly(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = fake_compile(monkeypatch, tmp_path, error)
    network = nn.Sequential(Doubled(1, 1), Doubled(1, 1))
    compile_forward(*network)
    with pytest.warns(UserWarning, match="torch.compile does not work here .*; going on uncompiled") as said:
        assert [float(network(torch.ones(1))) for _ in range(2)] == [4, 4]
    assert (len(said), len(seen)) == (1, 1)


def test_a_lack_of_memory_in_compiled_code_passes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_compile(monkeypatch, tmp_path, torch.cuda.OutOfMemoryError("CUDA out of memory"))
    network = Doubled(1, 1)
    compile_forward(network)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        network(torch.ones(1))
    assert is_compiled(network)


def test_each_shape_has_its_own_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """More shapes than torch compiles by default."""
    pytest.importorskip("torch._dynamo")
    sizes: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        sizes.append(max(len(one) for one in inputs if isinstance(one, torch.Tensor) and one.ndim == 2))
        return graph.forward

    monkeypatch.setenv(CODE_FOLDER, str(tmp_path))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    network = Doubled(3, 3).requires_grad_(False)
    compile_forward(network)
    for size in range(4, 16):
        assert torch.equal(network(torch.ones(size, 3)), torch.full((size, 3), 2.0))
    assert sizes == list(range(4, 16))


# --- code that earlier runs left


def test_a_stamp_belongs_to_its_facts_and_lies_beside_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"torch": "2.11", "card": "H100", "batch": 16}
    monkeypatch.setenv(compiling.CODE_FOLDER, str(tmp_path / "code"))
    stamp = stamp_of(facts)
    assert stamp is not None and stamp.parent == tmp_path / "code" and not stamp.exists()
    leave_stamp(stamp, facts)
    leave_stamp(stamp, facts)
    assert stamp_of(dict(reversed(facts.items()))) == stamp and stamp.exists()
    for change in ({"torch": "2.12"}, {"card": "L4"}, {"batch": 8}):
        other = stamp_of({**facts, **change})
        assert other is not None and not other.exists()
    monkeypatch.setenv(compiling.CODE_FOLDER, str(stamp / "below a file"))
    leave_stamp(stamp_of(facts), facts)  # cannot be written, which harms nobody


def test_code_lies_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiling.CODE_FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert code_folder() == tmp_path / "LightningDiT" / "compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert code_folder() is None and stamp_of({}) is None
    leave_stamp(None, {})


# --- the study


def test_the_table_says_when_compiling_pays() -> None:
    """2 seconds become 1.5, so 60 seconds of compiling come back after 120 forwards."""
    row = Row("a network", 2, 2.0, 1.5, 60.0, 3e-6)
    assert pays_after(row) == "120 forwards"
    assert table([row])[-1] == "| a network | 2 | 2.0000 s | 1.5000 s | 1.33 | 60 s | 120 forwards | 3e-06 std |"
    assert pays_after(Row("a network", 2, 1.0, 1.5, 60.0, 0.0)) == "never"


def test_exact_float32_is_no_reason_for_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU torch warns, while it compiles, of TF32 that is not allowed."""
    monkeypatch.setenv(CODE_FOLDER, str(tmp_path))
    monkeypatch.setattr(torch, "compile", lambda plain, dynamic: plain)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        compile_forward(torch.nn.Identity())
        for text in ("TensorFloat32 tensor cores for float32 are available but not enabled", "another"):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert [str(one.message) for one in seen] == ["another"]
