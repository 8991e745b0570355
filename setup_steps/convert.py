"""A transformer's EMA weights alone, as safetensors in fp32, fp16 or bf16: step 2's --convert.

The published file holds the weights up to three times (`ema`, `model`, `opt`). The copy is a half,
a quarter or less of it, holds no pickle, and is mapped rather than read. One tensor at a time goes
from the mapped source through the cast to the disk, so that a small machine can do it too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from setup_steps import checks
from setup_steps.console import Progress, StepError, format_bytes, rename_command
from setup_steps.downloads import CHUNK, again
from setup_steps.files import bring_to_disk, claim, free_name, fresh_name, replacing
from setup_steps.machine import require_torch
from setup_steps.weights import WeightFile, converted_name

if TYPE_CHECKING:
    import torch

BYTES_PER_VALUE = {"fp32": 4, "bf16": 2, "fp16": 2}
SAFETENSORS_NAMES = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
HEADER_ALIGNMENT = 8
ORIGIN = "source_fingerprint"  # in the copy's metadata


def bytes_needed(file: WeightFile, precision: str) -> int:
    """Size in bytes of the converted copy of a published transformer, without its header."""
    shapes = checks.published_table(str(file.table)).values()
    return sum(math.prod(shape) for shape in shapes) * BYTES_PER_VALUE[precision]


@dataclass(frozen=True)
class Job:
    """One conversion: where the mapped tensors come from and where they go."""

    source: Path
    target: Path
    precision: str
    weights: Mapping[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        from LightningDiT.device import PRECISIONS

        return PRECISIONS[self.precision]

    @property
    def values(self) -> int:
        """Number of values in all tensors."""
        return sum(tensor.numel() for tensor in self.weights.values())

    def casts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor's name and the tensor cast; good until the next one is asked for, since all of
        them share one piece of memory and the source's pages are given back.
        """
        import torch

        mapped = _MappedFile(self.source)
        shared = torch.empty(max(tensor.numel() for tensor in self.weights.values()), dtype=self.dtype)
        for name, tensor in self.weights.items():
            cast = tensor if tensor.dtype == self.dtype else shared[: tensor.numel()].view(tensor.shape).copy_(tensor)
            yield name, cast.detach()
            mapped.release(tensor)


def convert(source: Path, file: WeightFile, precision: str, replace: bool) -> str:
    """Write the EMA weights of `source` beside it in `precision` and return the line that reports it.

    The copy takes its name only after every tensor was read back and found equal to the source's,
    cast. A copy of the same source that is there already is kept.

    Args:
        source: the downloaded checkpoint, or a converted copy of it that is at least as precise.
        precision: "fp32", "bf16" or "fp16".
        replace: remove `source` (of a linked one: the link) once the copy is proved.

    Raises:
        StepError: a value does not fit the precision, the disk is full, or the copy differs.
    """
    require_torch("converting weights")
    from LightningDiT.checkpoint import load_weights
    from LightningDiT.files import fingerprint

    target = source.with_name(converted_name(file.name, precision))
    if target == source:
        return f"{target.name}: is what was asked for already"
    before, origin = source.stat().st_size, fingerprint(source)
    job = Job(source, target, precision, load_weights(source))
    _refuse_lost_digits(job)
    line = f"{len(job.weights)} tensors, each read back and equal to the source's"
    with _alone_with(source):
        _remove_leftovers(source, file)
        if _is_copy(job, origin):
            line = f"was converted before, {line}"
        else:
            line += _set_foreign_aside(target)
            _write_and_prove(job, file, {"format": "pt", "source": file.name, ORIGIN: origin})
        sizes = f"{format_bytes(before)} -> {format_bytes(target.stat().st_size)}"
        if replace:
            source.unlink()
            line += f"; {source.name} is removed"
    return f"{target.name}: {sizes}, {line}"


@contextmanager
def _alone_with(source: Path) -> Iterator[None]:
    """Raise StepError where another process converts `source`; two would write one file."""
    with source.open("rb") as file:
        if not claim(file):
            raise StepError(
                f"{source} is being converted by another process", f"wait for it or stop it, then {again()}"
            )
        yield


def _remove_leftovers(source: Path, file: WeightFile) -> None:
    """Remove what a killed conversion left, in whichever precision."""
    for precision in BYTES_PER_VALUE:
        fresh_name(source.with_name(converted_name(file.name, precision))).unlink(missing_ok=True)


def _write_and_prove(job: Job, file: WeightFile, metadata: dict[str, str]) -> None:
    """Write the copy under another name, prove it, and give it its own."""
    try:
        with replacing(job.target) as fresh:
            _write(job, fresh, metadata)
            with ThreadPoolExecutor(max_workers=1) as beside:
                on_disk = beside.submit(bring_to_disk, fresh)
                _compare(job, fresh)
                on_disk.result()
            checks.open_check(file, fresh)
    except OSError as error:
        raise StepError(
            f"{job.target} cannot be written ({error.strerror})", f"free space on that disk, then {again()}"
        ) from error


def _is_copy(job: Job, origin: str) -> bool:
    """True where the target is a copy, made earlier from the file with this fingerprint, that still
    holds the source's values.
    """
    if _origin_of(job.target) != origin:
        return False
    try:
        _compare(job, job.target)
    except StepError as error:
        print(f"  {error.message}; it is made anew")
        return False
    return True


def _origin_of(path: Path) -> str | None:
    """The fingerprint of the file that a copy was made from; None for any other file."""
    from LightningDiT.checkpoint import inspect
    from LightningDiT.errors import LightningDiTError

    if not path.is_file():
        return None
    try:
        return inspect(path).metadata.get(ORIGIN)
    except LightningDiTError:
        return None


def _set_foreign_aside(target: Path) -> str:
    """Rename a file that has the copy's name and is none, and return what to say of it."""
    if not os.path.lexists(target) or _origin_of(target):
        return ""
    aside = free_name(target, "other")
    target.replace(aside)
    return f"; the file that had this name is kept as {aside.name}"


def _refuse_lost_digits(job: Job) -> None:
    """Raise StepError where the source holds fewer digits than the copy would pretend to, or values
    that are not floating point.
    """
    import torch

    for name, tensor in job.weights.items():
        if not tensor.is_floating_point():
            raise StepError(f"{job.source}: tensor {name} is {tensor.dtype}, floating point was expected", again())
        if torch.finfo(tensor.dtype).eps > torch.finfo(job.dtype).eps:
            raise StepError(
                f"{job.source} holds {tensor.dtype} values, which have fewer digits than {job.precision}",
                f"fetch the original: {rename_command(job.source, '.other')} && {again()}",
            )


def _write(job: Job, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    import torch

    written = 0
    progress = Progress(f"writing {job.target.name}", job.values * BYTES_PER_VALUE[job.precision])
    with path.open("wb") as file, closing(progress):
        header = _header(job, metadata)
        _reserve(file.fileno(), len(header) + job.values * BYTES_PER_VALUE[job.precision])
        file.write(header)
        for name, cast in job.casts():
            _require_in_range(job, name)
            values = memoryview(cast.contiguous().view(-1).view(torch.uint8).numpy())
            for start in range(0, len(values), CHUNK):  # at once, 30 MB take three times as long
                written += file.write(values[start : start + CHUNK])
            progress.update(written)


def _reserve(file: int, size: int) -> None:
    """Ask for the room at once: a full disk is found before the work, and writing is faster. Some
    systems and disks know nothing of it.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _header(job: Job, metadata: dict[str, str]) -> bytes:
    """The safetensors header: its length as a little-endian 64-bit number, then JSON (format:
    https://github.com/huggingface/safetensors#format).
    """
    rows: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, tensor in job.weights.items():
        start, end = end, end + tensor.numel() * BYTES_PER_VALUE[job.precision]
        rows[name] = {
            "dtype": SAFETENSORS_NAMES[job.precision],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(rows, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _require_in_range(job: Job, name: str) -> None:
    """Raise StepError for NaN, infinity, and values that the precision turns into infinity."""
    import torch

    least, most = (float(value) for value in torch.aminmax(job.weights[name]))
    largest = torch.finfo(job.dtype).max
    if not (math.isfinite(least) and math.isfinite(most)):
        raise StepError(f"{job.source}: tensor {name} holds NaN or infinite values", f"fetch it again: {again()}")
    if max(-least, most) > largest:
        raise StepError(
            f"{job.source}: tensor {name} reaches {max(-least, most):g}, {job.precision} ends at {largest:g}",
            "take --convert bf16 or --convert fp32",
        )


def _compare(job: Job, path: Path) -> None:
    """Read the copy back and compare it with the source, tensor by tensor.

    Raises:
        StepError: a tensor differs.
    """
    import torch
    from safetensors import safe_open

    done = 0
    progress = Progress(f"comparing {job.target.name}", job.values, say=lambda count: f"{count / 1e6:.0f} M values")
    with safe_open(path, framework="pt") as copy, closing(progress):
        mapped = _MappedFile(path)
        for name, cast in job.casts():
            written = copy.get_tensor(name)
            if not torch.equal(written, cast):
                raise StepError(f"{job.target}: tensor {name} is not that of {job.source}", again())
            mapped.release(written)
            done += cast.numel()
            progress.update(done)


class _MappedFile:
    """The places in memory where a file is mapped, so that its pages can be given back after use:
    they stay resident otherwise until the system needs room.

    Only what /proc says is this file is ever given back (the pages of other memory would be lost);
    where there is no /proc nothing is.
    """

    def __init__(self, path: Path) -> None:
        self.ranges: list[tuple[int, int]] = []
        try:
            lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        except OSError:
            return
        for line in lines:
            place, *_, name = line.split(maxsplit=5)
            if name == str(path.resolve()):
                first, end = (int(number, 16) for number in place.split("-"))
                self.ranges.append((first, end))

    def release(self, tensor: torch.Tensor) -> None:
        """Give the whole pages of `tensor` back to the system."""
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > first and any(start <= first and end <= stop for start, stop in self.ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), mmap.MADV_DONTNEED)
