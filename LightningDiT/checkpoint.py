"""Weights as data: safe loading, inspection, a strict match with a module, and atomic saving."""

from __future__ import annotations

import contextlib
import errno
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from LightningDiT.errors import OS_FIXES, LightningDiTError, first_line
from LightningDiT.files import atomic_path

#: Entries in which training scripts keep weights, the best first.
WEIGHT_KEYS = ("ema", "model", "state_dict")
#: Prefixes of every name by wrappers (data parallel, torch.compile).
WRAPPER_PREFIXES = ("module.", "_orig_mod.")
LISTED_NAMES = 5
PORTION_BYTES = 64 * 2**20  # of a file, converted through one mapping
BUNDLED_FOLDER = "fashion-mnist"  # the model in git


@dataclass(frozen=True)
class CheckpointInfo:
    """The content of a weights file, known without reading the weights themselves.

    Attributes:
        path: the file.
        weights_key: the entry that holds the weights (`ema`, ...), or "" for a bare dictionary.
        shapes: tensor name -> shape, wrapper prefixes removed.
        extras: the file's other entries.
        metadata: the text metadata of a safetensors file.
    """

    path: Path
    weights_key: str
    shapes: dict[str, tuple[int, ...]]
    extras: tuple[str, ...]
    metadata: dict[str, str]

    @property
    def parameters(self) -> int:
        """Number of values in all tensors."""
        return sum(int(torch.Size(shape).numel()) for shape in self.shapes.values())


class _WithoutCompiler(TorchFunctionMode):
    """Avoids the operations for which torch's meta device imports its compiler, which takes 150 MB and 1 second."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        given = dict(options or {})
        if function in (nn.init.normal_, Tensor.normal_):  # there are no values to draw
            return given["tensor"] if "tensor" in given else arguments[0]
        if function is torch.arange:
            given["device"] = "cpu"  # also the tables of positions, which are small
        return function(*arguments, **given)


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Make modules with names and shapes but no values: they are on the meta device until a file is loaded.

    Values that a module computes from `torch.arange`, such as tables of positions, are on the CPU.
    """
    with torch.device("meta"), _WithoutCompiler():
        yield


def inspect(path: str | Path) -> CheckpointInfo:
    """Return the content of the weights file at `path`, after the safety checks of `load_weights`."""
    return _open(path)[0]


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a `.safetensors` or `torch.save` file, mapped rather than read.

    Of a dictionary with `ema`, `model` or `state_dict` these are the tensors of the first entry that it has. Prefixes
    of wrappers are removed.

    Raises:
        LightningDiTError: the file is missing, a folder, empty, cut short, no weights file, or holds more than tensors
            and plain values.
    """
    return _open(path)[1]


def load_file(
    module: nn.Module,
    path: str | Path,
    dtype: torch.dtype | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    ignored: tuple[str, ...] = (),
) -> list[str]:
    """Load the tensors of `module` (which may be on the meta device) from the weights file at `path`.

    Tensors are converted in portions, each read through a mapping of its own: memory holds at most the converted
    weights and one portion of the file (`PORTION_BYTES`, or the largest tensor), whatever else the file holds.
    Tensors that need no conversion stay mapped. A file in torch's format before 1.6 cannot be mapped and is read whole.

    Args:
        dtype: of floating-point tensors; by default the file's.
        memory_format: of four-dimensional tensors.
        ignored: prefixes of other names that the file may hold.

    Returns:
        The names in the file that the module does not have, all of them below `ignored`.

    Raises:
        LightningDiTError: as `load_weights` and `load_into`, or a value is too large for `dtype`.
    """
    weights = load_weights(path)
    check_shapes(module, {name: tuple(tensor.shape) for name, tensor in weights.items()}, path, ignored)
    wanted = module.state_dict().keys()
    others = [name for name in weights if name not in wanted]
    weights = {name: weights[name] for name in weights if name in wanted}
    load_into(module, _changed(weights, Path(path), dtype, memory_format), path)
    return others


def load_into(
    module: nn.Module, weights: Mapping[str, Tensor], path: str | Path, ignored: tuple[str, ...] = ()
) -> list[str]:
    """Assign the tensors of `weights` to `module` (which may be on the meta device), without a copy.

    Args:
        path: their file, for messages.
        ignored: prefixes of other names that the file may hold.

    Returns:
        The names in the file that the module does not have, all of them below `ignored`.

    Raises:
        LightningDiTError: tensors are missing, have another shape, are unknown, or are not finite.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_shapes(module, shapes, path, ignored)
    wanted = module.state_dict().keys()
    for name in wanted:
        tensor = weights[name]
        if not _is_finite(tensor):
            raise LightningDiTError(
                f"{path}: tensor {name} holds NaN or infinite values; the file is damaged",
                _fix_of(Path(path)),
            )
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict({name: weights[name] for name in wanted}, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])  # torch 2.2 switches gradients on with assign
    return [name for name in weights if name not in wanted]


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _changed(
    weights: dict[str, Tensor], file: Path, dtype: torch.dtype | None, memory_format: torch.memory_format
) -> dict[str, Tensor]:
    """Return the weights of `file` converted as `load_file` says; empties `weights`."""

    def type_of(tensor: Tensor) -> torch.dtype:
        return dtype if dtype and tensor.is_floating_point() else tensor.dtype

    def layout_of(tensor: Tensor) -> torch.memory_format:
        return memory_format if tensor.dim() == 4 else torch.preserve_format

    def is_wanted(tensor: Tensor) -> bool:
        laid_out = layout_of(tensor) is torch.preserve_format or tensor.is_contiguous(memory_format=memory_format)
        return laid_out and tensor.dtype == type_of(tensor)

    result = {name: tensor for name, tensor in weights.items() if is_wanted(tensor)}
    portions = _portions({name: tensor.nbytes for name, tensor in weights.items() if name not in result})
    for portion in portions:
        opened = load_weights(file) if _can_be_mapped(file) else weights
        for name in portion:
            tensor = opened.pop(name)
            result[name] = tensor.to(type_of(tensor), memory_format=layout_of(tensor))
            _refuse_overflow(name, tensor, result[name], file)
    return result


def _portions(sizes: Mapping[str, int]) -> list[list[str]]:
    """Return the names in order, in groups of one or of at most `PORTION_BYTES`."""
    portions: list[list[str]] = []
    filled = PORTION_BYTES
    for name, size in sizes.items():
        if filled + size > PORTION_BYTES:
            portions.append([])
            filled = 0
        portions[-1].append(name)
        filled += size
    return portions


def _refuse_overflow(name: str, before: Tensor, after: Tensor, file: Path) -> None:
    """Raise LightningDiTError if finite values became infinite; damaged ones are found later, by `load_into`."""
    narrower = after.is_floating_point() and torch.finfo(after.dtype).max < torch.finfo(before.dtype).max
    if narrower and not _is_finite(after) and _is_finite(before):
        largest, kind = float(before.abs().max()), str(after.dtype).removeprefix("torch.")
        raise LightningDiTError(
            f"{file}: tensor {name} reaches {largest:g}, {kind} ends at {torch.finfo(after.dtype).max:g}",
            "sample with --precision bf16 or fp32",
        )


def check_shapes(
    module: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    path: str | Path,
    ignored: tuple[str, ...] = (),
) -> None:
    """Raise LightningDiTError unless names and shapes fit `module` one to one, apart from `ignored` prefixes."""
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    missing = [name for name in wanted if name not in shapes]
    unknown = [name for name in shapes if name not in wanted and not name.startswith(ignored or ("\0",))]
    differing = [
        f"{name} {list(shapes[name])} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in shapes and shapes[name] != shape
    ]
    problems = [
        f"{len(names)} {label}: {', '.join(names[:LISTED_NAMES])}{' ...' if len(names) > LISTED_NAMES else ''}"
        for label, names in (("missing", missing), ("of another shape", differing), ("unknown", unknown))
        if names
    ]
    if problems:
        raise LightningDiTError(
            f"{path} does not fit {type(module).__name__}: tensors {'; '.join(problems)}",
            "choose the configuration that belongs to this file",
        )


def save_weights(weights: Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors, atomically."""
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with _saved(path) as temporary:
        save_file(tensors, temporary, dict(metadata or {}))


def save_training_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a dictionary of tensors and plain values by `torch.save`, atomically."""
    with _saved(path) as temporary:
        torch.save(dict(state), temporary)


@contextlib.contextmanager
def _saved(path: str | Path) -> Iterator[Path]:
    """Give a temporary path as `atomic_path` does, with one-line errors for the writers of tensors too."""
    from safetensors import SafetensorError

    try:
        with atomic_path(path) as temporary:
            yield temporary
    except (RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeErrors
        raise LightningDiTError(f"{path} cannot be written ({first_line(error)})", OS_FIXES[errno.ENOSPC]) from error


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Return what `save_training_state` wrote; raise LightningDiTError for any other file."""
    return _load_pickle(_existing_file(path))


def _open(path: str | Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    file = _existing_file(path)
    metadata: dict[str, str] = {}
    if file.suffix == ".safetensors":
        content, metadata = _load_safetensors(file)
    else:
        content = _load_pickle(file)
    key = next((key for key in WEIGHT_KEYS if isinstance(content.get(key), Mapping)), "")
    weights = content[key] if key else content
    tensors = {_bare(name): value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        raise LightningDiTError(
            f"{file} holds no tensors (entries: {', '.join(map(str, list(content)[:LISTED_NAMES])) or 'none'})",
            "name a weights file",
        )
    others = [name for name, value in content.items() if name != key and (key or not isinstance(value, Tensor))]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return CheckpointInfo(file, key, shapes, tuple(map(str, others)), metadata), tensors


def _bare(name: str) -> str:
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _existing_file(path: str | Path) -> Path:
    file = Path(path)
    fix = _fix_of(file)
    if file.is_dir():
        raise LightningDiTError(f"{file} is a folder, a weights file was expected", "name the file inside it")
    if not file.exists():
        raise LightningDiTError(f"weights file {file} does not exist", fix)
    if file.stat().st_size == 0:
        raise LightningDiTError(f"weights file {file} is empty (0 bytes)", fix)
    _refuse_foreign_content(file)
    return file


def _fix_of(file: Path) -> str:
    """Return the command that restores a missing or damaged weights file."""
    if BUNDLED_FOLDER in file.parts:
        return f"git restore models/{BUNDLED_FOLDER}"
    return "delete it if it is damaged, then python step2_download_models.py"


def _refuse_foreign_content(file: Path) -> None:
    """Raise LightningDiTError for what people find instead of weights: a web page, or a pointer of git LFS."""
    with file.open("rb") as stream:
        start = stream.read(64).lstrip()
    fix = _fix_of(file)
    if start[:1] == b"<":
        raise LightningDiTError(f"{file} is a web page, not weights: the download was answered with HTML", fix)
    if start.startswith(b"version https://git-lfs"):
        raise LightningDiTError(f"{file} is a git LFS pointer, not the weights themselves", fix)


def _load_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys()  # the opened file is no mapping and cannot be iterated
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise LightningDiTError(f"{file} is cut short or no safetensors file ({error})", _fix_of(file)) from error


def _can_be_mapped(file: Path) -> bool:
    """Return whether tensors of a weights file are read from the disk only when they are used."""
    return file.suffix == ".safetensors" or zipfile.is_zipfile(file)


def _load_pickle(file: Path) -> dict[str, Any]:
    mapped = _can_be_mapped(file)
    try:
        content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=mapped or None)
    except pickle.UnpicklingError as error:
        raise LightningDiTError(_refusal(file, error), "use a file from a source you trust, as safetensors") from error
    except Exception as error:  # arbitrary bytes make the unpickler fail in arbitrary ways
        reason = first_line(error)
        raise LightningDiTError(f"{file} is cut short or no weights file ({reason})", _fix_of(file)) from error
    if not isinstance(content, dict):
        raise LightningDiTError(
            f"{file} holds a {type(content).__name__}; a dictionary of tensors is expected",
            "name a weights file",
        )
    return content


def _refusal(file: Path, error: pickle.UnpicklingError) -> str:
    """Return why a pickle was not opened: it holds more than tensors and plain values, or it is damaged."""
    reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
    foreign = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", reason)  # torch 2.4 and newer, or older
    if foreign:
        return f"{file} is refused: opening it would run code ({foreign[1]}), and weights are data"
    return f"{file} is cut short or no weights file ({reason[:160]})"
