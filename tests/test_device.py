"""Which precision a device gets; capabilities are NVIDIA's, by name of the card."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from LightningDiT.device import (
    ATTENTION_KERNELS,
    HALF_PRECISIONS,
    abilities,
    attention_by,
    attention_failure,
    numeric_switches,
    resolve_precision,
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
    assert resolve_precision("auto", torch.device("cuda")) == dtype
    assert dtype in HALF_PRECISIONS


def test_auto_is_float32_on_the_cpu() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32


def test_the_page_states_the_policy_of_the_code() -> None:
    rows = [line.strip() for line in (resolve_precision.__doc__ or "").splitlines() if line.strip().startswith("|")]
    assert len(rows) > 5
    assert "\n".join(rows) in (PROJECT / "docs" / "precision.md").read_text(encoding="utf-8")


def test_a_name_gives_its_precision_everywhere() -> None:
    named = [resolve_precision(name, torch.device("cpu")) for name in ("fp32", "bf16", "fp16")]
    assert named == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(LightningDiTError, match="precision 'fp8' is unknown; auto, fp32, bf16, fp16 are"):
        resolve_precision("fp8", torch.device("cpu"))


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
