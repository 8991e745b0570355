"""Which precision a device gets; capabilities are NVIDIA's, by name of the card."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from LightningDiT import device
from LightningDiT.device import (
    ATTENTION_KERNELS,
    HALF_PRECISIONS,
    WARM_UPS,
    Precision,
    Recording,
    abilities,
    attention_by,
    attention_failure,
    autocast,
    best_device,
    float32_products,
    gpu_free_bytes,
    numeric_switches,
    require_numpy,
    resolve_precision,
    sent_to_cpu,
    set_gpu_random_states,
    training_dtype,
    without_autocast,
)
from LightningDiT.errors import LightningDiTError, is_out_of_memory
from tests.conftest import PROJECT

CARDS = {
    "P100": ((6, 0), torch.float16),
    "V100": ((7, 0), torch.float16),
    "T4": ((7, 5), torch.float16),
    "A100": ((8, 0), torch.bfloat16),
    "L4": ((8, 9), torch.bfloat16),
    "H100": ((9, 0), torch.bfloat16),
}


@pytest.mark.parametrize("card", CARDS)
def test_auto_is_the_half_precision_that_a_card_computes_natively(card: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, dtype = CARDS[card]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert resolve_precision("auto", gpu) == Precision(dtype, half_decoder=True)
    assert dtype in HALF_PRECISIONS
    assert resolve_precision("fp32", gpu) == Precision(torch.float32)
    tf32 = resolve_precision("tf32", gpu)  # the tensor cores of Ampere and later GPUs have it
    assert (tf32.dtype, tf32.half_decoder) == (torch.float32, False)
    assert (tf32.tf32, tf32.name) == ((True, "tf32") if card in ("A100", "L4", "H100") else (False, "float32"))
    assert bool(tf32.note) != tf32.tf32
    emulated = "bf16 is slow on this GPU, which emulates it (GPUs of capability 8.0 or newer do not); fp16 is faster"
    note = emulated if dtype == torch.float16 else ""
    assert resolve_precision("bf16", gpu) == Precision(torch.bfloat16, half_decoder=True, note=note)
    assert resolve_precision("fp16", gpu).note == ""
    assert training_dtype(gpu) == (torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def test_a_cpu_computes_in_float32_and_says_what_it_does_not_have() -> None:
    found = [resolve_precision(name, torch.device("cpu")) for name in ("auto", "fp32", "tf32", "bf16", "fp16")]
    half = [Precision(torch.bfloat16), Precision(torch.float16)]
    note = "precision tf32 computes as fp32 here: TF32 needs a GPU of capability 8.0 or newer"
    assert found == [Precision(torch.float32), Precision(torch.float32), Precision(torch.float32, note=note), *half]
    assert [precision.name for precision in found] == ["float32"] * 3 + ["bfloat16", "float16"]
    with pytest.raises(LightningDiTError, match="precision 'fp8' is unknown; auto, tf32, fp32, bf16, fp16 are"):
        resolve_precision("fp8", torch.device("cpu"))


def test_a_dtype_that_this_torch_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.2 raises this on a T4."""

    def refuse(kind: str, **options: object) -> None:
        raise RuntimeError("Current CUDA Device does not support bfloat16. Please switch dtype to float16.")

    monkeypatch.setattr(torch, "autocast", refuse)
    with pytest.raises(LightningDiTError, match="bfloat16 cannot be computed on cuda [(]Current CUDA Device does not"):
        autocast(torch.device("cuda"), torch.bfloat16)
    with autocast(torch.device("cuda"), torch.float32), without_autocast(torch.device("cuda")):
        pass


def test_weights_of_another_dtype_have_its_precision() -> None:
    half = Precision(torch.bfloat16, half_decoder=True)
    assert half.for_weights(torch.bfloat16) == half
    assert half.for_weights(torch.float16) == Precision(torch.float16, half_decoder=True)
    assert half.for_weights(torch.float32) == Precision(torch.float32)
    assert Precision(torch.float32, tf32=True).for_weights(torch.float16) == Precision(torch.float16)


def test_the_page_states_the_policy_of_the_code() -> None:
    rows = [line.strip() for line in (resolve_precision.__doc__ or "").splitlines() if line.strip().startswith("|")]
    assert len(rows) > 10
    page = (PROJECT / "docs" / "precision.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in page] == []


def float32_switches() -> dict[str, object]:
    """torch's switches for products of float32 on a GPU, old and new ones, as they can be read."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    found = {"matmul": matmul.allow_tf32, "cudnn": cudnn.allow_tf32, "name": torch.get_float32_matmul_precision()}
    if hasattr(torch.backends, "fp32_precision"):  # from torch 2.9 on
        found |= {"new": (matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)}
        found |= {"cpu": torch.backends.mkldnn.matmul.fp32_precision}
    return found


@pytest.fixture
def own_products() -> Iterator[None]:
    """Whatever a test chooses, the switches of products are as before afterwards."""
    backends, name = torch.backends, torch.get_float32_matmul_precision()
    holders = [backends.cuda.matmul, backends.mkldnn.matmul] if hasattr(backends, "fp32_precision") else []
    finer = [holder.fp32_precision for holder in holders]
    yield
    torch.set_float32_matmul_precision(name)
    for holder, value in zip(holders, finer, strict=True):
        holder.fp32_precision = value


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("chosen", ["highest", "high", "medium"])
@pytest.mark.usefixtures("own_products")
def test_products_are_exact_or_of_tf32_within_a_block(chosen: str, tf32: bool, fails: bool) -> None:
    """Every switch, of products and of convolutions, says the same, whatever torch or the user had chosen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of some releases, once
        torch.set_float32_matmul_precision(chosen)
        gpu, before = torch.device("cuda"), float32_switches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            with float32_products(gpu, tf32):
                within = float32_switches()
                with float32_products(gpu, not tf32):
                    assert float32_switches()["cudnn"] is not tf32
                assert float32_switches() == within
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            assert fails
    assert (within["matmul"], within["cudnn"]) == (tf32, tf32)
    assert within["name"] == ("high" if tf32 else "highest")
    assert set(within.get("new", ())) <= {"tf32" if tf32 else "ieee"}
    assert float32_switches() == before
    with float32_products(torch.device("cpu"), tf32):
        assert float32_switches() == before


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch has these switches from 2.9 on")
def test_switches_that_the_old_ones_do_not_know_are_kept() -> None:
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    try:
        matmul.fp32_precision, conv.fp32_precision = "tf32", "ieee"
        with pytest.raises(RuntimeError):
            float32_switches()
        with float32_products(torch.device("cuda"), False):
            assert float32_switches()["new"] == ("ieee",) * 3
        assert (matmul.fp32_precision, conv.fp32_precision) == ("tf32", "ieee")
    finally:
        matmul.fp32_precision, conv.fp32_precision = before
    assert float32_switches()["new"][:2] == before


def test_threads_do_not_take_one_anothers_switches() -> None:
    gpu, wrong, before = torch.device("cuda"), [], float32_switches()

    def use(tf32: bool) -> None:
        for _ in range(200):
            with float32_products(gpu, tf32):
                time.sleep(0)  # lets the others run
                if torch.backends.cudnn.allow_tf32 is not tf32:
                    wrong.append(tf32)

    threads = [threading.Thread(target=use, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and float32_switches() == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not create a memory object"),
        RuntimeError("unable to mmap 96 bytes from file <w.pt>: Cannot allocate memory (12)"),
        RuntimeError("std::bad_alloc"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        SafetensorError("Error while deserializing: Cannot allocate memory (os error 12)"),
    ],
)
def test_every_lack_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("could not create a primitive descriptor for a matmul primitive"),
        RuntimeError("shape '[2]' is invalid for input of size 3"),
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("a text about not enough memory"),
        LightningDiTError("the batch is out of memory"),
    ],
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_what_this_machine_can_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = abilities(torch.device("cpu"))
    assert (found.name, found.capability, found.no_graphs) == ("CPU", None, "graphs need a GPU")
    assert torch.__version__.startswith(f"{found.torch[0]}.{found.torch[1]}.")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert abilities(torch.device("cpu")).no_compiler == f"there is no C++ compiler {tmp_path / 'g++'}"
    (tmp_path / "g++").touch(mode=0o700)
    assert abilities(torch.device("cpu")).no_compiler == ""


@pytest.mark.parametrize(
    ("card", "triton", "lacking"),
    [
        ("H100", True, ""),
        ("T4", False, "Triton is not installed"),
        ("P100", True, "Triton needs a GPU of capability 7"),
    ],
)
def test_what_a_card_can_do(card: str, triton: bool, lacking: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: CARDS[card][0])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: (name == "triton" and triton) or None)
    found = abilities(torch.device("cuda"))
    assert (found.name, found.capability, found.no_graphs) == (card, CARDS[card][0], "")
    assert found.no_compiler.startswith(lacking) and bool(found.no_compiler) == bool(lacking)


def test_attention_has_one_kernel_within_a_block() -> None:
    """As torch's own switches say; the products are the same up to rounding."""
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    before = switches()
    for kernel in {*ATTENTION_KERNELS} - {"cudnn"}:  # which torch has from 2.5 on
        with attention_by(kernel):
            assert switches() == {name: name == kernel for name in before}
    with attention_by("math"):
        torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, v), wanted)
    with attention_by(None):
        assert switches() == before
    assert switches() == before


def switches() -> dict[str, bool]:
    backends = torch.backends.cuda
    return {
        "flash": backends.flash_sdp_enabled(),
        "efficient": backends.mem_efficient_sdp_enabled(),
        "math": backends.math_sdp_enabled(),
    }


def test_a_kernel_that_does_not_compute_a_shape_says_why() -> None:
    """torch's CPU has the plain kernel, and none of cuDNN."""
    shape = (2, 4, 8, torch.float32, torch.device("cpu"))
    assert attention_failure("math", *shape) is None
    assert attention_failure("cudnn", *shape)


def test_a_switch_that_changes_kernels_is_seen() -> None:
    before = numeric_switches()
    torch.use_deterministic_algorithms(True)
    try:
        assert numeric_switches() != before
    finally:
        torch.use_deterministic_algorithms(False)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = not allowed
    try:
        assert numeric_switches() != before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def test_a_torch_that_cannot_use_this_numpy_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.2 beside numpy 2 raises this at each conversion."""
    require_numpy()

    def refuse(tensor: torch.Tensor) -> None:
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch.Tensor, "numpy", refuse)
    with pytest.raises(LightningDiTError) as refused:
        best_device()
    said = f"torch {torch.__version__} cannot use numpy {np.__version__} (Numpy is not available), numpy 1 was expected"
    assert (refused.value.message, refused.value.fix) == (said, "python -m pip install 'numpy>=1.26.4,<2'")


def test_one_thread_at_a_time_chooses_the_kernel_of_attention() -> None:
    """torch's choice is the whole process's: blocks that overlap would leave it as none of them found it."""
    before = switches()
    inside, leave, seen = threading.Event(), threading.Event(), list[str]()

    def first() -> None:
        with attention_by("math"):
            inside.set()
            leave.wait(10)
            seen.append("first")

    def second() -> None:
        inside.wait(10)
        with attention_by("flash"):
            seen.append("second")

    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    for thread in threads:
        thread.start()
    threads[1].join(0.3)
    assert seen == []
    leave.set()
    for thread in threads:
        thread.join()
    assert seen == ["first", "second"]
    assert switches() == before


def test_numbers_of_the_cpu_are_there_at_once() -> None:
    assert sent_to_cpu(torch.tensor([0.5, -2.0]))() == [0.5, -2.0]


def test_a_process_of_several_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fourth process of a machine with two GPUs shares the second one."""
    monkeypatch.setattr(device, "gpu_count", lambda: 2)
    monkeypatch.setattr(device, "gpu_failure", lambda gpu: None)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert best_device() == torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert best_device() == torch.device("cuda", 0)


def test_memory_that_torch_keeps_for_later_tensors_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("memory_reserved", 70), ("memory_allocated", 30), ("mem_get_info", (100, 1000))):
        monkeypatch.setattr(torch.cuda, name, lambda gpu, value=value: value)
    assert gpu_free_bytes(torch.device("cuda")) == 100 + 70 - 30
    assert gpu_free_bytes(torch.device("cpu")) is None


@pytest.mark.parametrize("gpus", [1, 2])
def test_random_states_go_to_as_many_gpus_as_they_are_of(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    restored, states = [], [torch.zeros(1), torch.ones(1)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", restored.append)
    set_gpu_random_states(states)
    assert restored == ([states] if gpus == 2 else [])


class Stream:
    """Stands for a CUDA stream, and notes what it waits for."""

    current: Stream

    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: Stream) -> None:
        Graph.events.append((self, other))


class Graph:
    """Stands for a CUDA graph whose replay computes nothing, and for the block that records it."""

    events: list[object]
    fails: bool

    def replay(self) -> None:
        self.events.append(("replayed on", Stream.current))

    @classmethod
    @contextlib.contextmanager
    def recorded(cls, graph: Graph, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        before, Stream.current = Stream.current, stream
        cls.events.append("begin")
        yield
        cls.events.append("end")
        if cls.fails:
            raise RuntimeError("invalid capture")  # as torch does, which then stays on the stream
        Stream.current = before


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    Graph.events, Graph.fails, Stream.current = [], False, Stream()
    nothing = {name: lambda *arguments: contextlib.nullcontext() for name in ("device", "stream")}
    stands = {"Stream": Stream, "CUDAGraph": Graph, "graph": Graph.recorded, **nothing}
    stands["current_stream"] = lambda device=None: Stream.current
    stands["set_stream"] = lambda stream: setattr(Stream, "current", stream)
    for name, stand in stands.items():
        monkeypatch.setattr(torch.cuda, name, stand)
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: Graph.events.append("work space is freed"), raising=False)
    return Graph


def test_a_recording_has_its_own_work_space_and_waits_on_another_stream(graphs: type[Graph]) -> None:
    calls, given, main = list[int](), torch.zeros(2), Stream.current
    recording = Recording(lambda x: calls.append(1) or x + 1, [given])
    assert len(calls) == WARM_UPS + 1
    (side, waited), *recorded, returned = graphs.events
    assert (waited, returned) == (main, (main, side))
    assert recorded == ["work space is freed", "begin", "end", "work space is freed"]

    def events(stream: Stream) -> list[object]:
        graphs.events.clear()
        Stream.current = stream
        assert torch.equal(recording(torch.ones(2)), given + 1)  # what was computed while it was recorded
        return graphs.events

    other = Stream()
    assert events(main) == [("replayed on", main)]
    assert events(other) == [(other, main), ("replayed on", other)]
    assert events(other) == [("replayed on", other)]
    assert events(main) == [(main, other), ("replayed on", main)]


def test_a_recording_that_cannot_be_ended_leaves_the_stream_as_it_was(graphs: type[Graph]) -> None:
    graphs.fails, main = True, Stream.current
    with pytest.raises(RuntimeError, match="invalid capture"):
        Recording(lambda x: x + 1, [torch.zeros(2)])
    assert Stream.current is main
    assert graphs.events[1:] == ["work space is freed", "begin", "end", "work space is freed"]


def test_memory_is_released_after_the_recording_of_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a torch that refuses, because a recording failed before, is no error."""
    held = list[bool]()

    def empty_cache() -> None:
        held.append(not device._RECORDING.acquire(blocking=False))
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    device.release_memory()
    assert held == [True]
