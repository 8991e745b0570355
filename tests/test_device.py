"""Which precision a device gets; capabilities are NVIDIA's, by name of the card."""

from __future__ import annotations

import errno

import pytest
import torch
from safetensors import SafetensorError

from LightningDiT.device import HALF_PRECISIONS, resolve_precision
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
