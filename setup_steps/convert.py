"""A transformer's EMA weights alone, as safetensors in fp32, fp16 or bf16: step 2's --convert.

The published file holds the weights up to three times (`ema`, `model`, `opt`). The copy is half of it or less, holds
no pickle, and is mapped rather than read. One tensor at a time goes from the mapped source through the cast to the
disk, so that a small machine can do it too.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from LightningDiT.console import Progress, format_bytes
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import (
    atomic_path,
    bring_to_disk,
    fingerprint,
    open_regular,
    remove_leftovers,
    rename_command,
    set_aside,
    try_lock,
)
from setup_steps import checks
from setup_steps.downloads import CHUNK, again
from setup_steps.weights import WeightFile, converted_name

if TYPE_CHECKING:
    import torch

#: Precision -> bytes of a value, and its name in safetensors.
FORMATS = {"fp32": (4, "F32"), "bf16": (2, "BF16"), "fp16": (2, "F16")}
HEADER_ALIGNMENT = 8
ORIGIN = "source_fingerprint"  # in the copy's metadata


def bytes_needed(file: WeightFile, precision: str) -> int:
    """Return the bytes of the converted copy of a published transformer, without its header."""
    shapes = checks.published_table(str(file.table)).values()
    return sum(math.prod(shape) for shape in shapes) * FORMATS[precision][0]


@dataclass(frozen=True)
class Job:
    """One conversion: source, target, and the mapped tensors of the source."""

    source: Path
    target: Path
    precision: str
    weights: Mapping[str, torch.Tensor]

    @property
    def dtype(self) -> torch.dtype:
        from LightningDiT.device import PRECISIONS

        return PRECISIONS[self.precision]

    @property
    def size(self) -> int:
        """Bytes of all tensors of the copy."""
        return sum(tensor.numel() for tensor in self.weights.values()) * FORMATS[self.precision][0]

    def casts(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each tensor's name and the cast tensor, valid until the next one: all share one piece of memory."""
        import torch

        shared = torch.empty(max(tensor.numel() for tensor in self.weights.values()), dtype=self.dtype)
        for name, tensor in self.weights.items():
            cast = tensor if tensor.dtype == self.dtype else shared[: tensor.numel()].view(tensor.shape).copy_(tensor)
            yield name, cast.detach()


def convert(source: Path, file: WeightFile, precision: str, replace: bool) -> str:
    """Write the EMA weights of `source` beside it in `precision` and return the line that reports it.

    The copy takes its name only after every tensor was read back and found equal to the cast one of the source. An
    earlier copy of the same source is kept.

    Args:
        source: the downloaded checkpoint, or a converted copy of it that is at least as precise.
        precision: "fp32", "bf16" or "fp16".
        replace: remove `source` (or the link to it) once the copy is proved.

    Raises:
        LightningDiTError: torch is absent, the source belongs to another model, a value does not fit the precision, the
            disk is full, or the copy differs.
    """
    target = source.with_name(converted_name(file.name, precision))
    if target == source:
        return f"{target.name}: is what was asked for already"
    checks.open_check(file, source)
    from LightningDiT.checkpoint import load_weights

    before, origin = source.stat().st_size, fingerprint(source)
    job = Job(source, target, precision, load_weights(source))
    _refuse_lost_digits(job)
    line = f"{len(job.weights)} tensors, each read back and equal to the source's"
    with _alone_with(source):
        remove_leftovers(source.parent)
        if _is_copy(job, origin):
            line = f"was converted before, {line}"
        else:
            line += _set_foreign_aside(target)
            with atomic_path(target) as fresh:
                _write(job, fresh, {"format": "pt", "source": file.name, ORIGIN: origin})
                with ThreadPoolExecutor(max_workers=1) as beside:
                    on_disk = beside.submit(bring_to_disk, fresh)
                    _compare(job, fresh)
                    on_disk.result()
        sizes = f"{format_bytes(before)} -> {format_bytes(target.stat().st_size)}"
        if replace:
            source.unlink()
            line += f"; {source.name} is removed"
    return f"{target.name}: {sizes}, {line}"


@contextmanager
def _alone_with(source: Path) -> Iterator[None]:
    """Raise LightningDiTError if another process converts `source`: two would write one file."""
    with open_regular(source) as file:
        if not try_lock(file):
            fix = f"wait for it or stop it, then {again()}"
            raise LightningDiTError(f"{source} is being converted by another process", fix)
        yield


def _is_copy(job: Job, origin: str) -> bool:
    """Return whether the target was made from the file with this fingerprint and still holds the source's values."""
    if _origin_of(job.target) != origin:
        return False
    try:
        _compare(job, job.target)
    except LightningDiTError as error:
        print(f"  {error.message}; it is made anew")
        return False
    return True


def _origin_of(path: Path) -> str | None:
    """Return the fingerprint of the file that a copy was made from; None for any other file."""
    from LightningDiT.checkpoint import inspect

    try:
        return inspect(path).metadata.get(ORIGIN)
    except LightningDiTError:
        return None


def _set_foreign_aside(target: Path) -> str:
    """Rename a file that has the copy's name and is none, and say so."""
    if not os.path.lexists(target) or _origin_of(target):
        return ""
    return f"; the file that had this name is kept as {set_aside(target, 'other').name}"


def _refuse_lost_digits(job: Job) -> None:
    """Raise LightningDiTError if the source has fewer digits than the copy would pretend to, or other values than
    floating point.
    """
    import torch

    for name, tensor in job.weights.items():
        if not tensor.is_floating_point():
            message = f"{job.source}: tensor {name} is {tensor.dtype}, floating point was expected"
            raise LightningDiTError(message, again())
        if torch.finfo(tensor.dtype).eps > torch.finfo(job.dtype).eps:
            raise LightningDiTError(
                f"{job.source} holds {tensor.dtype} values, which have fewer digits than {job.precision}",
                f"fetch the original: {rename_command(job.source, '.other')} && {again()}",
            )


def _write(job: Job, path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file, one tensor in memory at a time."""
    import torch

    header = _header(job, metadata)
    with path.open("wb") as file, Progress(job.size, "byte", label=f"writing {job.target.name}") as progress:
        _reserve(file.fileno(), len(header) + job.size)
        file.write(header)
        for name, cast in job.casts():
            _require_in_range(job, name)
            values = memoryview(cast.contiguous().view(-1).view(torch.uint8).numpy())
            for start in range(0, len(values), CHUNK):  # at once, 30 MB take three times as long
                progress.update(file.write(values[start : start + CHUNK]))


def _reserve(file: int, size: int) -> None:
    """Reserve the disk space at once, if the system and the disk can: a full disk is found before the work, and writing
    is faster.
    """
    try:
        os.posix_fallocate(file, 0, size)
    except AttributeError:
        return
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _header(job: Job, metadata: dict[str, str]) -> bytes:
    """Return the safetensors header: its length as a little-endian 64-bit number, then JSON (format:
    https://github.com/huggingface/safetensors#format).
    """
    rows: dict[str, object] = {"__metadata__": metadata}
    value_bytes, kind = FORMATS[job.precision]
    end = 0
    for name, tensor in job.weights.items():
        start, end = end, end + tensor.numel() * value_bytes
        rows[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(rows, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _require_in_range(job: Job, name: str) -> None:
    """Raise LightningDiTError for NaN, infinity, and values that the precision turns into infinity."""
    import torch

    least, most = (float(value) for value in torch.aminmax(job.weights[name]))
    largest, limit = max(-least, most), torch.finfo(job.dtype).max
    if not (math.isfinite(least) and math.isfinite(most)):
        message = f"{job.source}: tensor {name} holds NaN or infinite values"
        raise LightningDiTError(message, f"fetch it again: {again()}")
    if largest > limit:
        raise LightningDiTError(
            f"{job.source}: tensor {name} reaches {largest:g}, {job.precision} ends at {limit:g}",
            "take --convert bf16 or --convert fp32",
        )


def _compare(job: Job, path: Path) -> None:
    """Read the copy back; raise LightningDiTError if a tensor differs from the source's."""
    import torch
    from safetensors import safe_open

    with (
        safe_open(path, framework="pt") as copy,
        Progress(job.size, "byte", label=f"comparing {job.target.name}") as progress,
    ):
        for name, cast in job.casts():
            if not torch.equal(copy.get_tensor(name), cast):
                raise LightningDiTError(f"{job.target}: tensor {name} is not that of {job.source}", again())
            progress.update(cast.nbytes)
