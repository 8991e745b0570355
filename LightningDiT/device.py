"""The only module that knows kinds of devices: choice, precision, memory."""

from __future__ import annotations

import contextlib
import os

import torch

from LightningDiT.errors import LightningDiTError, first_line

#: Precisions by their names in settings and on command lines.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HALF_PRECISIONS = (torch.bfloat16, torch.float16)
NATIVE_BF16 = (8, 0)  # compute capability from which bfloat16 is native and not emulated


def best_device() -> torch.device:
    """Return the GPU of this process if this torch has kernels for it, else the CPU.

    It is the first GPU, or with several processes of a launcher that of the local rank; processes share GPUs if there
    are too few.
    """
    local_rank = os.environ.get("LOCAL_RANK")
    gpu = torch.device("cuda")
    if local_rank and torch.cuda.device_count():
        gpu = torch.device("cuda", int(local_rank) % torch.cuda.device_count())
    return gpu if _gpu_works(gpu) else torch.device("cpu")


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device of this name.

    Raises:
        LightningDiTError: there is no such device, or this torch cannot use it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise LightningDiTError(f"device {str(name)!r} cannot be used ({reason})", "give 'cpu', or none") from error
    return device


def release_memory() -> None:
    """Return the memory that torch keeps for later tensors to the device."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait until `device` has finished; call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def gpu_peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes of this process's tensors on a GPU; None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def gpu_random_states() -> list[torch.Tensor]:
    """Return the random state of every GPU; an empty list if this process uses none."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_gpu_random_states(states: list[torch.Tensor]) -> None:
    """Restore what `gpu_random_states` returned; ignored on a machine with another number of GPUs."""
    if len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)


def gpu_free_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a GPU's memory; None for the CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of the transformer's weights for the name of a precision; the tokenizer stays float32.

    `auto` is float32 on the CPU, bf16 on GPUs with native support (capability 8.0 and newer: A100, L4, H100) and fp16
    on older ones (T4, V100, P100). With half-precision weights

    | part | computes in |
    |---|---|
    | linear layers, convolutions, q k^T and attention times v | inputs in half, sums in float32 |
    | activations between two linear layers, rotation of q and k | half |
    | norms, softmax, sinusoids of the time, sum and SiLU of the condition | float32 |
    | modulation and gates, and the tokens between the blocks that they act on | float32 |
    | state of the ODE or SDE, guidance, decoder | float32 |

    Tokens grow from block to block and pass 65504, the largest number of fp16. A value that passes it inside a block
    makes the state infinite or NaN, and the pipeline then repeats the batch in float32.

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
    """Return the dtype of matrix products in training: bf16 on a device with native support, else float32."""
    if device.type == "cpu":
        # oneDNN is faster in bf16 only on CPUs with the instructions (Zen 4, Sapphire Rapids)
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    else:
        native = torch.cuda.get_device_capability(device) >= NATIVE_BF16
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Return the context in which matrix products and convolutions run in `dtype`."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def _gpu_works(gpu: torch.device) -> bool:
    """Return whether `gpu` runs one real kernel: `is_available` is true even if its kernels are missing."""
    if not torch.cuda.is_available():
        return False
    try:
        return float(torch.ones(2, device=gpu).sum()) == 2.0
    except RuntimeError:
        return False
