"""The only module that knows kinds of devices: which one, in which precision, with how much memory."""

from __future__ import annotations

import contextlib

import torch

from LightningDiT.errors import LightningDiTError

#: Names of precisions in settings and on command lines.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NATIVE_BF16 = (8, 0)  # compute capability from which bfloat16 is computed and not emulated


def best_device() -> torch.device:
    """Return the first GPU that has kernels in this torch, else the CPU."""
    return torch.device("cuda") if _gpu_works() else torch.device("cpu")


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype for a precision name; `auto` is fp32 on the CPU, else bf16 where native, else fp16.

    Raises:
        LightningDiTError: an unknown name.
    """
    if name == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= NATIVE_BF16 else torch.float16
    if name not in PRECISIONS:
        raise LightningDiTError(f"precision {name!r} is unknown; auto, {', '.join(PRECISIONS)} are", "choose one")
    return PRECISIONS[name]


def training_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype for matrix products in training: bf16 where the device computes it natively."""
    if device.type == "cpu":
        # oneDNN is faster in bf16 only where the processor has the instructions (Zen 4, Sapphire Rapids)
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
        return torch.bfloat16 if native else torch.float32
    native = torch.cuda.get_device_capability(device) >= NATIVE_BF16
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Return the context in which matrix products and convolutions run in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _gpu_works() -> bool:
    """Whether a GPU is there and runs one real kernel: `is_available` is true for kernels that are missing."""
    if not torch.cuda.is_available():
        return False
    try:
        return float(torch.ones(2, device="cuda").sum()) == 2.0
    except RuntimeError:
        return False
