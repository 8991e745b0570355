"""The only module that knows kinds of devices: choice, precision, memory, and what makes them fast."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch

from LightningDiT.errors import LightningDiTError, first_line
from LightningDiT.files import read_text

#: Precisions by their names in settings and on command lines.
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TF32 = "tf32"  # a precision of sampling: float32 weights, products of inputs with 10 bits of mantissa
HALF_PRECISIONS = (torch.bfloat16, torch.float16)
NATIVE_BF16 = (8, 0)  # compute capability from which bfloat16 is native and not emulated
HAS_TF32 = (8, 0)
TRITON_NEEDS = (7, 0)  # compute capability
#: torch's kernels of `scaled_dot_product_attention` by our names.
ATTENTION_KERNELS = {
    "cudnn": "CUDNN_ATTENTION",
    "flash": "FLASH_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
    "math": "MATH",
}
WARM_UPS = 3  # calls before a recording, in which libraries choose their kernels and allocate what they keep
_RECORDING = threading.Lock()
_SWITCHES = threading.RLock()  # held while torch's switches, which the whole process shares, are not the user's


def require_numpy() -> None:
    """Raise LightningDiTError if this torch cannot use the numpy here: torch 2.2 was built for numpy 1, and its
    requirements do not say so to pip.
    """
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        numpy = metadata.version("numpy")
        message = f"torch {torch.__version__} cannot use numpy {numpy} ({first_line(error)}), numpy 1 was expected"
        raise LightningDiTError(message, "python -m pip install 'numpy>=1.26.4,<2'") from error


def best_device() -> torch.device:
    """Return the first GPU that runs this torch's kernels, else the CPU.

    With several processes of a launcher it is the GPU of the local rank; processes share GPUs if there are too few.

    Raises:
        LightningDiTError: see `require_numpy`.
    """
    require_numpy()
    count, local_rank = gpu_count(), os.environ.get("LOCAL_RANK")
    numbers = [int(local_rank) % count] if local_rank and count else range(count)
    working = (gpu for gpu in map(gpu_device, numbers) if gpu_failure(gpu) is None)
    return next(working, torch.device("cpu"))


def gpu_count() -> int:
    """Return the number of GPUs that this process sees, without a context on any of them."""
    return torch.cuda.device_count()


def gpu_device(number: int) -> torch.device:
    """Return the GPU of a number from 0."""
    return torch.device("cuda", number)


def usable_device(name: torch.device | str) -> torch.device:
    """Return the device of this name.

    Raises:
        LightningDiTError: there is no such device, or this torch cannot use it; see also `require_numpy`.
    """
    require_numpy()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        raise LightningDiTError(f"device {str(name)!r} cannot be used ({reason})", "give 'cpu', or none") from error
    return device


def release_memory() -> None:
    """Return the memory that torch keeps for later tensors to the device, after a recording of another thread."""
    if torch.cuda.is_initialized():
        with _RECORDING, contextlib.suppress(RuntimeError):  # before 2.8, torch refuses after a recording that failed
            torch.cuda.empty_cache()


def ready_for(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor of the CPU in memory from which `device` copies it while the CPU goes on (`non_blocking`)."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def sent_to_cpu(values: torch.Tensor) -> Callable[[], list[float]]:
    """Start to copy values (N,) to the CPU, and return the function that waits for them, and for nothing later."""
    if values.device.type != "cuda":
        return values.tolist
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    there.copy_(values, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(values.device))  # which need not be the current device

    def wait() -> list[float]:
        arrived.synchronize()
        return there.tolist()

    return wait


def synchronise(device: torch.device) -> None:
    """Wait until `device` has finished; call it before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gpu_name(device: torch.device) -> str | None:
    """Return the name of a GPU; None for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def processor_name() -> str:
    """Return the processor's name as the system states it."""
    names: list[str] = []
    with contextlib.suppress(OSError, UnicodeError):
        lines = read_text("/proc/cpuinfo").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def gpu_peak_bytes(device: torch.device, restart: bool = False) -> int | None:
    """Return the peak bytes of this process's tensors on a GPU; None for the CPU. `restart` counts anew from here."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device)
    if restart:
        torch.cuda.reset_peak_memory_stats(device)
    return peak


def gpu_random_states() -> list[torch.Tensor]:
    """Return the random state of every GPU; an empty list if this process uses none."""
    return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def set_gpu_random_states(states: list[torch.Tensor]) -> None:
    """Restore what `gpu_random_states` returned; ignored on a machine with another number of GPUs."""
    if len(states) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(states)


def gpu_free_bytes(device: torch.device) -> int | None:
    """Return the bytes of a GPU's memory that are free, or that torch keeps for later tensors; None for the CPU."""
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


@dataclass(frozen=True)
class Abilities:
    """What a device, and the torch on this machine, can do.

    Attributes:
        name: of the GPU, or `CPU`.
        capability: compute capability of a GPU; None for the CPU.
        torch: version of torch.
        no_graphs, no_compiler: why computations cannot be recorded, or compiled; empty if they can.
    """

    name: str
    capability: tuple[int, int] | None
    torch: tuple[int, int]
    no_graphs: str = ""
    no_compiler: str = ""


def abilities(device: torch.device) -> Abilities:
    """Return what `device` can do."""
    major, minor = torch.__version__.split(".")[:2]
    version = (int(major), int(minor))
    if device.type != "cuda":
        usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        compiler = os.environ.get("CXX", usual)
        lacking = "" if shutil.which(compiler) else f"there is no C++ compiler {compiler}"
        return Abilities("CPU", None, version, "graphs need a GPU", lacking)
    capability = torch.cuda.get_device_capability(device)
    lacking = "" if importlib.util.find_spec("triton") else "Triton is not installed"
    if capability < TRITON_NEEDS:
        lacking = "Triton needs a GPU of capability 7.0"
    return Abilities(torch.cuda.get_device_name(device), capability, version, "", lacking)


class Recording:
    """A computation on tensors of fixed shapes, recorded as a CUDA graph in a memory pool of its own.

    A call copies its arguments to where the recorded kernels read, and runs these. The result lies in the same memory
    after every call, so the caller copies what it keeps. The kernels read weights from where they lay during the
    recording. One thread at a time may call, on any stream: the later call waits for the earlier one on the GPU.

    Args:
        function: computes without asking for a value of the device.
        inputs: tensors of the shapes of all later calls, on one device.

    Raises:
        RuntimeError: the computation cannot be recorded, or memory runs out.
    """

    def __init__(self, function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        self._inputs = [value.clone() for value in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with _RECORDING, torch.cuda.device(self._inputs[0].device):
            self._last, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(self._last)
            try:
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):
                        function(*self._inputs)
                # other threads may allocate meanwhile
                with _own_work_space(), torch.cuda.graph(self._graph, stream=side, capture_error_mode="thread_local"):
                    self._output = function(*self._inputs)
            finally:
                torch.cuda.set_stream(self._last)  # torch stays on the side stream if the recording cannot be ended
            self._last.wait_stream(side)

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        with torch.cuda.device(self._inputs[0].device):
            stream = torch.cuda.current_stream()
            if stream != self._last:  # the last result may still be copied there
                stream.wait_stream(self._last)
                self._last = stream
            for own, given in zip(self._inputs, inputs, strict=True):
                own.copy_(given, non_blocking=True)
            self._graph.replay()
        return self._output


@contextlib.contextmanager
def _own_work_space() -> Iterator[None]:
    """Let the products of a recording take their work space (32 MB on an H100) from the recording's own memory.

    That of the stream would outlive the recording, and from torch 2.14 on be freed with any other recording of the
    stream, while this one still writes there.
    """
    torch._C._cuda_clearCublasWorkspaces()
    try:
        yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


@contextlib.contextmanager
def attention_by(kernel: str | None) -> Iterator[None]:
    """Let attention compute by a kernel of `ATTENTION_KERNELS` alone within the block; None: torch chooses.

    One thread at a time is in such a block, as with `float32_products`: the choice is the whole process's.
    """
    if kernel is None:
        yield
        return
    with _SWITCHES, _attention_switched(kernel):
        yield


def _attention_switched(kernel: str) -> contextlib.AbstractContextManager[object]:
    try:
        from torch.nn.attention import SDPBackend, sdpa_kernel
    except ImportError:  # torch before 2.3
        names = {"flash": "enable_flash", "math": "enable_math", "efficient": "enable_mem_efficient"}
        return torch.backends.cuda.sdp_kernel(**{option: name == kernel for name, option in names.items()})
    return sdpa_kernel(getattr(SDPBackend, ATTENTION_KERNELS[kernel]))


@functools.cache
def attention_failure(
    kernel: str, heads: int, tokens: int, width: int, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why a kernel does not compute attention of these shapes, None if it does; it is asked once."""
    joint, value = (torch.zeros(2, tokens, parts, heads, width, dtype=dtype, device=device) for parts in (2, 3))
    q, k = joint.permute(2, 0, 3, 1, 4).unbind(0)  # (2, heads, tokens, width) each, as the blocks make them
    v = value[:, :, 2].transpose(1, 2)  # (2, heads, tokens, width)
    try:
        with warnings.catch_warnings(), attention_by(kernel):
            warnings.simplefilter("ignore")  # torch warns of each kernel that does not
            torch.nn.functional.scaled_dot_product_attention(q, k, v)
            synchronise(device)
    except (RuntimeError, AttributeError) as error:  # an older torch has no such name
        return first_line(error)
    return None


def numeric_switches() -> tuple[object, ...]:
    """Return the state of torch's switches that give the same computation other kernels."""
    matmul = torch.backends.cuda.matmul
    tf32 = getattr(matmul, "fp32_precision", None) or matmul.allow_tf32
    return tf32, torch.are_deterministic_algorithms_enabled()


@contextlib.contextmanager
def float32_products(device: torch.device, tf32: bool) -> Iterator[None]:
    """Let a GPU compute products and convolutions of float32 from TF32 inputs within the block, or exactly.

    torch's own choice is TF32 for convolutions alone. One thread at a time is in such a block, so keep it as short as
    the calls that start the computation.
    """
    if device.type != "cuda":
        yield
        return
    with _SWITCHES:
        _use_up_warning()
        before = _Float32Switches.read()
        try:
            finer = (TF32 if tf32 else "ieee",) * len(before.finer)  # the CPU's too: torch wants the two alike
            _Float32Switches("high" if tf32 else "highest", tf32, finer).set()
            yield
        finally:
            before.set()


@dataclass(frozen=True)
class _Float32Switches:
    """torch's switches for float32.

    Attributes:
        products: torch's name of a precision; setting it sets finer switches of products, those of the CPU too.
        convolutions: whether cuDNN takes TF32 inputs.
        finer: from torch 2.9 on, the switches of `_holders`.
    """

    products: str
    convolutions: bool
    finer: tuple[str, ...]

    @classmethod
    def read(cls) -> _Float32Switches:
        """Return the switches as they are."""
        finer = tuple(holder.fp32_precision for holder in cls._holders())
        try:
            products = torch.get_float32_matmul_precision()
        except RuntimeError:  # the finer switch was set alone, and contradicts this one
            products = "highest" if finer[0] == TF32 else "high"
        try:
            convolutions = torch.backends.cudnn.allow_tf32
        except RuntimeError:  # the finer ones contradict it
            convolutions = True  # torch's own choice
        return cls(products, convolutions, finer)

    def set(self) -> None:
        """Set all switches, the finer ones last."""
        torch.set_float32_matmul_precision(self.products)
        torch.backends.cudnn.allow_tf32 = self.convolutions
        for holder, value in zip(self._holders(), self.finer, strict=True):
            holder.fp32_precision = value

    @staticmethod
    def _holders() -> tuple[Any, ...]:
        """Return the holders of finer switches: three of the GPU, one of the CPU; none before torch 2.9."""
        backends = torch.backends
        if not hasattr(backends, "fp32_precision"):
            return ()
        return backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul


@functools.cache
def _use_up_warning() -> None:
    """Read the switches and set them as they are: some releases of torch warn once of the old ones."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _Float32Switches.read().set()


@dataclass(frozen=True)
class Precision:
    """What sampling computes in.

    Attributes:
        dtype: of the weights of transformer and guide.
        tf32: whether products of float32 take TF32 inputs.
        half_decoder: whether the decoder computes in fp16.
        note: why it is another one than asked for, or empty.
    """

    dtype: torch.dtype
    tf32: bool = False
    half_decoder: bool = False
    note: str = ""

    def for_weights(self, dtype: torch.dtype) -> Precision:
        """Return this precision, or that of weights which have been given another dtype."""
        if dtype == self.dtype:
            return self
        return Precision(dtype, half_decoder=self.half_decoder and dtype in HALF_PRECISIONS)

    @property
    def name(self) -> str:
        """The name in manifests and reports: of the dtype, or `tf32` where that makes a difference."""
        return TF32 if self.tf32 else str(self.dtype).removeprefix("torch.")


def resolve_precision(name: str, device: torch.device) -> Precision:
    """Return what sampling computes in for the name of a precision.

    `auto` is fp32 on the CPU, bf16 on GPUs with native support (capability 8.0 and newer: A100, L4, H100) and fp16 on
    older ones (T4, V100, P100). TF32 exists on GPUs of capability 8.0 and newer; elsewhere `tf32` computes as `fp32`.

    | precision | weights of the transformer | products of float32 on a GPU | decoder on a GPU | decoder on the CPU |
    |---|---|---|---|---|
    | `fp32` | float32 | exact | float32, exact | float32 |
    | `tf32` | float32 | inputs in TF32 | float32, inputs of convolutions in TF32 | float32 |
    | `bf16` | bfloat16 | exact | fp16 | float32 |
    | `fp16` | float16 | exact | fp16 | float32 |

    With half-precision weights

    | part | computes in |
    |---|---|
    | linear layers, convolutions, q k^T and attention times v | inputs in half, sums in float32 |
    | activations between two linear layers, rotation of q and k | half |
    | norms, softmax, sinusoids of the time, sum and SiLU of the condition | float32 |
    | modulation and gates, and the tokens between the blocks that they act on | float32 |
    | state of the ODE or SDE, guidance | float32 |
    | decoder on a GPU: convolutions, attention, sums of residual blocks | fp16, sums of products in float32 |
    | decoder on a GPU: norms and SiLU | float32 |

    Tokens grow from block to block and pass 65504, the largest number of fp16. A value that passes it inside a block
    makes the state infinite or NaN, and the pipeline then repeats the batch in float32. So it does with each image
    that is not finite behind the decoder.

    Raises:
        LightningDiTError: an unknown name.
    """
    on_gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if on_gpu else (0, 0)
    if name == "auto":
        name = ("bf16" if capability >= NATIVE_BF16 else "fp16") if on_gpu else "fp32"
    if name == TF32:
        lacks = capability < HAS_TF32
        note = "precision tf32 computes as fp32 here: TF32 needs a GPU of capability 8.0 or newer" if lacks else ""
        return Precision(torch.float32, tf32=not lacks, note=note)
    if name not in PRECISIONS:
        raise LightningDiTError(
            f"precision {name!r} is unknown; auto, {TF32}, {', '.join(PRECISIONS)} are", "choose one"
        )
    dtype = PRECISIONS[name]
    return Precision(dtype, half_decoder=on_gpu and dtype in HALF_PRECISIONS, note=emulation_note(dtype, device))


def emulation_note(dtype: torch.dtype, device: torch.device) -> str:
    """Return a line if a GPU has no kernels of its own for bfloat16; else nothing."""
    if dtype != torch.bfloat16 or device.type != "cuda" or torch.cuda.get_device_capability(device) >= NATIVE_BF16:
        return ""
    return "bf16 is slow on this GPU, which emulates it (GPUs of capability 8.0 or newer do not); fp16 is faster"


def training_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products in training: bf16 on a device with native support, else float32."""
    if device.type == "cpu":
        # oneDNN is faster in bf16 only on CPUs with the instructions (Zen 4, Sapphire Rapids)
        native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()
    else:
        native = torch.cuda.get_device_capability(device) >= NATIVE_BF16
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Return the context in which matrix products and convolutions run in `dtype`.

    Raises:
        LightningDiTError: this torch does not compute in it on the device.
    """
    if dtype == torch.float32:
        return contextlib.nullcontext()
    try:
        return torch.autocast(device.type, dtype=dtype)
    except RuntimeError as error:  # bfloat16 on older GPUs with older releases of torch
        name = str(dtype).removeprefix("torch.")
        message = f"{name} cannot be computed on {device.type} ({first_line(error)})"
        raise LightningDiTError(message, "choose another precision") from error


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return the context in which the caller's autocast changes no dtype."""
    try:
        return torch.autocast(device.type, enabled=False)
    except RuntimeError:  # there is none for this kind of device
        return contextlib.nullcontext()


def gpu_failure(gpu: torch.device) -> str | None:
    """Return why `gpu` does not run a real kernel, None if it does: `is_available` is true without kernels too."""
    try:
        return None if float(torch.ones(2, device=gpu).sum()) == 2.0 else "it adds 1 and 1 wrongly"
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
