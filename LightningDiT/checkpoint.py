"""Weights as data: safe loading, inspection, a strict match with a module, and atomic saving."""

from __future__ import annotations

import contextlib
import errno
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from LightningDiT.errors import OS_FIXES, LightningDiTError, first_line, is_out_of_memory, warn_user
from LightningDiT.files import atomic_path, check_target, open_regular, read_json, refuse_inputs, require_unicode
from LightningDiT.formats import diffusers_vae

if TYPE_CHECKING:
    from LightningDiT.files import Ours

#: Entries in which training scripts keep weights, the best first.
WEIGHT_KEYS = ("ema", "model_ema", "ema_model", "model", "module", "state_dict")
#: Parts of names by wrappers: data parallel (in front alone), torch.compile, FSDP, activation checkpoints.
WRAPPER = re.compile(r"^module\.|(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
AVERAGE_PREFIX = "model_ema."  # of LDM's LitEma, whose further names have no dots
FIRST_STAGE_PREFIX = "first_stage_model."  # of the tokenizer in a file of LDM
DIFFUSERS_NAMES = re.compile(r"(?:^|\.)(?:(?:down|up)_blocks\.\d+\.resnets|mid_block\.resnets|transformer_blocks\.\d)")
UNET_PREFIX = "unet."  # of the tensors of a U-Net of ours, which are diffusers'
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)")
INDEX_ENDING = ".index.json"
#: Types that people's training scripts save beside weights. Each is read as an empty placeholder, never as itself.
HARMLESS = {
    "argparse": ("Namespace",),
    "builtins": ("bool", "dict", "float", "int", "list", "str", "tuple"),  # default_factory of a defaultdict
    "collections": ("defaultdict",),
    "datetime": ("date", "datetime", "timedelta", "timezone"),
    "easydict": ("EasyDict",),
    "lightning_fabric.utilities.data": ("AttributeDict",),
    "ml_collections.config_dict.config_dict": ("ConfigDict", "FrozenConfigDict"),
    "numpy": ("bool_", "dtype", "float32", "float64", "int32", "int64", "ndarray"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "omegaconf.base": ("ContainerMetadata", "Metadata"),
    "omegaconf.dictconfig": ("DictConfig",),
    "omegaconf.listconfig": ("ListConfig",),
    "omegaconf.nodes": ("AnyNode", "BooleanNode", "FloatNode", "IntegerNode", "PathNode", "StringNode"),
    "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),  # Python 3.13
    "pytorch_lightning.callbacks.model_checkpoint": ("ModelCheckpoint",),
    "pytorch_lightning.utilities.parsing": ("AttributeDict",),
    "types": ("SimpleNamespace",),
    "typing": ("Any",),
}
DICTIONARIES = ("AttributeDict", "EasyDict", "defaultdict")  # of these, whose entries may be the weights
UNPACKED_RATIO, UNPACKED_BYTES = 20, 2**26  # a compressed file may grow to this many times its size and these bytes
#: Bytes of a number in torch's kinds of storages.
STORED_BYTES = {
    **dict.fromkeys(("Untyped", "Bool", "Byte", "Char", "QInt8", "QUInt8", "QUInt4x2", "QUInt2x4"), 1),
    **dict.fromkeys(("BFloat16", "Half", "Short"), 2),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("ComplexFloat", "Double", "Long"), 8),
    "ComplexDouble": 16,
}
WRITTEN_BY = "written_by"  # metadata of a file that one of our tools wrote, and may replace: the tool's name
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
        kinds: tensor name -> kind of its numbers, as `kind_of` says.
        extras: the file's other entries.
        metadata: the text metadata of a safetensors file.
        notes: what was chosen or passed over in reading, a text each.
    """

    path: Path
    weights_key: str
    shapes: dict[str, tuple[int, ...]]
    kinds: dict[str, str]
    extras: tuple[str, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...]

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
    """Return the tensors of a `.safetensors` or `torch.save` file, mapped rather than read, or of an index of shards.

    Of a dictionary of dictionaries these are the tensors of its first entry in `WEIGHT_KEYS`. Names lose the parts of
    wrappers. An average by LDM goes before the weights themselves, and of a whole LDM the first stage is taken. Types
    in `HARMLESS` are passed over, from torch 2.5 on. A warning says what was chosen or passed over.

    Raises:
        LightningDiTError: the file is missing, a folder, empty, cut short, no weights file, one shard of several, or
            holds more than tensors and plain values.
        MemoryError: it cannot be mapped or read for lack of memory.
    """
    info, weights = _open(path)
    for note in info.notes:
        warn_user(f"{path}: {note}")
    return weights


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
    check_kinds(module, {name: kind_of(tensor) for name, tensor in weights.items()}, path)
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
        LightningDiTError: tensors are missing, have another shape or kind, are unknown, or are not finite.
    """
    check_shapes(module, {name: tuple(tensor.shape) for name, tensor in weights.items()}, path, ignored)
    check_kinds(module, {name: kind_of(tensor) for name, tensor in weights.items()}, path)
    wanted = module.state_dict().keys()
    for name in wanted:
        tensor = weights[name]
        if not _is_finite(tensor):
            raise LightningDiTError(
                f"{path}: tensor {name} holds NaN or infinite values; the file is damaged",
                _fix_of_damage(Path(path)),
            )
    trained = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    module.load_state_dict({name: weights[name].detach() for name in wanted}, strict=True, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(trained[name])  # torch 2.2 switches gradients on with assign
    return [name for name in weights if name not in wanted]


def _is_finite(tensor: Tensor) -> bool:
    tensor = tensor.float() if tensor.itemsize == 1 else tensor  # torch has no such test for float8
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
        opened = _open(file)[1] if _can_be_mapped(file) else weights
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


def kind_of(tensor: Tensor) -> str:
    """Return the kind of a tensor's numbers: real, whole, bool or complex; or how it is stored, if not as usual."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "sparse or nested"
    if tensor.is_meta:
        return "without values"
    return _kind_of_type(tensor.dtype)


def _kind_of_type(dtype: torch.dtype) -> str:
    if dtype.is_complex:
        return "complex"
    if dtype.is_floating_point:
        return "real"
    return "bool" if dtype == torch.bool else "whole"


def check_kinds(module: nn.Module, kinds: Mapping[str, str], path: str | Path) -> None:
    """Raise LightningDiTError if a tensor in a file has numbers of another kind than that of the same name in `module`.

    Args:
        kinds: tensor name -> kind, as `kind_of` says.
    """
    wanted = {name: _kind_of_type(tensor.dtype) for name, tensor in module.state_dict().items()}
    differing = [name for name, kind in wanted.items() if kinds.get(name, kind) != kind]
    if differing:
        name = differing[0]
        more = f", and {len(differing) - 1} more tensors are of another kind too" if len(differing) > 1 else ""
        raise LightningDiTError(
            f"{path}: tensor {name} is {kinds[name]}; {wanted[name]} numbers are expected{more}",
            "save the weights as plain floating-point tensors",
        )


def save_weights(
    weights: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str] | None = None,
    ours: Ours | None = None,
) -> None:
    """Write tensors as safetensors, atomically.

    Args:
        ours: see `atomic_path`.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with _saved(path, ours) as temporary:
        save_file(tensors, temporary, dict(metadata or {}))


def written_by(tool: str) -> Ours:
    """Return a test that is true of a safetensors file that `tool` wrote, as its metadata `WRITTEN_BY` says."""

    def test(path: Path) -> bool:
        try:
            return _metadata(path).get(WRITTEN_BY) == tool
        except LightningDiTError:
            return False

    return test


def check_weights_target(target: Path, tool: str, inputs: Iterable[str | Path | None]) -> None:
    """Raise LightningDiTError unless `tool` may write `target`: a new .safetensors file, or one that it wrote before.

    Args:
        inputs: files that it reads, see `refuse_inputs`.
    """
    if target.suffix != ".safetensors" and not target.is_dir():
        raise LightningDiTError(
            f"{target} is to be a .safetensors file and is not called so", f"name it {target.name}.safetensors"
        )
    refuse_inputs(target, inputs)
    check_target(target, written_by(tool))


def save_training_state(state: Mapping[str, Any], path: str | Path) -> None:
    """Write a dictionary of tensors and plain values by `torch.save`, atomically."""
    with _saved(path) as temporary:
        torch.save(dict(state), temporary)


@contextlib.contextmanager
def _saved(path: str | Path, ours: Ours | None = None) -> Iterator[Path]:
    """Give a temporary path as `atomic_path` does, with one-line errors for the writers of tensors too."""
    from safetensors import SafetensorError

    try:
        with atomic_path(path, ours=ours) as temporary:
            yield temporary
    except (RuntimeError, SafetensorError) as error:  # torch's writer raises RuntimeErrors
        raise LightningDiTError(f"{path} cannot be written ({first_line(error)})", OS_FIXES[errno.ENOSPC]) from error


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Return what `save_training_state` wrote; raise LightningDiTError for any other file."""
    return _load_pickle(_existing_file(path))[0]


def _open(path: str | Path) -> tuple[CheckpointInfo, dict[str, Tensor]]:
    file = _existing_file(path)
    _refuse_one_shard(file)
    content, metadata, notes = _load_index(file) if file.name.endswith(INDEX_ENDING) else _load_one(file)
    key = next((key for key in WEIGHT_KEYS if _has_tensors(content.get(key))), "")
    weights = content[key] if key else content
    tensors = _without_wrappers(weights, file)
    if not tensors:
        listed = ", ".join(map(str, list(content)[:LISTED_NAMES])) or "none"
        raise LightningDiTError(f"{file} holds no tensors (entries: {listed})", "name a weights file")
    tensors = _from_diffusers(tensors, file)
    tensors = _with_average(_part_of_ldm(tensors, notes), notes)
    others = [name for name, value in content.items() if name != key and (key or not isinstance(value, Tensor))]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    kinds = {name: kind_of(tensor) for name, tensor in tensors.items()}
    return CheckpointInfo(file, key, shapes, kinds, tuple(map(str, others)), metadata, tuple(notes)), tensors


def _has_tensors(entry: object) -> bool:
    return isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values())


def _without_wrappers(weights: Mapping[Any, Any], file: Path) -> dict[str, Tensor]:
    """Return the tensors that have names, without the parts that wrappers add in any order and depth."""
    tensors: dict[str, Tensor] = {}
    for full, value in weights.items():
        if not isinstance(value, Tensor) or not isinstance(full, str):
            continue
        name, count = full, 1
        while count:
            name, count = WRAPPER.subn("", name)
        if name in tensors:
            raise LightningDiTError(f"{file} holds {name} twice, once as {full}", "save the weights of one model alone")
        tensors[name] = value.detach()
    return tensors


def _with_average(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return the tensors with those of LDM's LitEma in the places of their own, which have dots in their names."""
    average = {name.removeprefix(AVERAGE_PREFIX): x for name, x in tensors.items() if name.startswith(AVERAGE_PREFIX)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(AVERAGE_PREFIX)}
    if not average or not own:
        return tensors
    taken = [name for name in own if name.replace(".", "") in average]
    if taken:
        notes.append(f"took the averages of {AVERAGE_PREFIX} for {len(taken)} of {len(own)} tensors")
    else:
        notes.append(f"passed over {len(average)} tensors of {AVERAGE_PREFIX}, an average of other tensors")
    return own | {name: average[name.replace(".", "")] for name in taken}


def _part_of_ldm(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return the tokenizer's tensors if a file holds a whole LDM, else all."""
    prefix = FIRST_STAGE_PREFIX
    part = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if part and len(part) < len(tensors):
        notes.append(f"took {len(part)} tensors of {prefix} and passed over the other {len(tensors) - len(part)}")
    return part or tensors


def _from_diffusers(tensors: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Return the tensors of diffusers' AutoencoderKL under our names, others as they are; refuse its transformers."""
    if diffusers_vae.is_theirs(list(tensors)):
        return diffusers_vae.ours(tensors, diffusers_vae.filled_channels(file))
    found = next((name for name in tensors if DIFFUSERS_NAMES.search(name)), None)
    if found and not found.startswith(UNET_PREFIX):
        raise LightningDiTError(
            f"{file} has the tensor names of diffusers ({found}); those of the original code are expected",
            "take the file in the original format, or rename its tensors",
        )
    return tensors


def _existing_file(path: str | Path) -> Path:
    file = Path(path)
    if file.is_dir():
        raise LightningDiTError(f"{file} is a folder, a weights file was expected", "name the file inside it")
    if not file.exists():
        raise LightningDiTError(f"weights file {file} does not exist", _fix_of_absence(file))
    if not file.is_file():
        raise LightningDiTError(f"{file} is a pipe or a device, a weights file was expected", "name a regular file")
    if file.stat().st_size == 0:
        raise LightningDiTError(f"weights file {file} is empty (0 bytes)", _fix_of_damage(file))
    require_unicode(file)
    _refuse_foreign_content(file)
    return file


def _fix_of_absence(file: Path) -> str:
    """Return the command that brings a missing weights file."""
    if BUNDLED_FOLDER in file.parts:
        return f"git restore models/{BUNDLED_FOLDER}"
    return "name a file that exists, or python step2_download_models.py"


def _fix_of_damage(file: Path) -> str:
    """Return the command that restores a damaged weights file."""
    if BUNDLED_FOLDER in file.parts:
        return f"git restore models/{BUNDLED_FOLDER}"
    return "delete it, then fetch or write it again (python step2_download_models.py for published weights)"


def _refuse_foreign_content(file: Path) -> None:
    """Raise LightningDiTError for what people find instead of weights: a web page, or a pointer of git LFS."""
    with open_regular(file) as stream:
        start = stream.read(64).lstrip()
    fix = _fix_of_damage(file)
    if start[:1] == b"<":
        raise LightningDiTError(f"{file} is a web page, not weights: the download was answered with HTML", fix)
    if start.startswith(b"version https://git-lfs"):
        raise LightningDiTError(f"{file} is a git LFS pointer, not the weights themselves", fix)


def _refuse_one_shard(file: Path) -> None:
    match = SHARD.fullmatch(file.name)
    if match and int(match[3]) > 1:
        index = file.with_name(f"{match[1]}.{match[4]}{INDEX_ENDING}")
        raise LightningDiTError(
            f"{file} is shard {int(match[2])} of {int(match[3])}, a part of the weights", f"name {index}"
        )


def _load_index(file: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return tensors, metadata and notes of all shards that an index lists."""
    try:
        listed = read_json(file)["weight_map"]
        names = sorted(set(listed.values()))
        plain = all(isinstance(name, str) and name not in ("", "..") and name == Path(name).name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LightningDiTError(f"{file} is no index of shards ({first_line(error)})", _fix_of_damage(file)) from error
    if not names or not plain:
        raise LightningDiTError(f"{file} names no shards in its own folder", _fix_of_damage(file))
    tensors: dict[str, Any] = {}
    notes: list[str] = []
    for name in names:
        content, _, found = _load_one(_existing_file(file.with_name(name)))
        tensors |= content
        notes += found
    if missing := [name for name in listed if name not in tensors]:
        raise LightningDiTError(
            f"{file} lists {missing[0]} in {listed[missing[0]]}, which does not hold it", _fix_of_damage(file)
        )
    return tensors, {}, notes


def _load_one(file: Path) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Return content, metadata and notes of a file."""
    if file.suffix == ".safetensors":
        return (*_load_safetensors(file), [])
    content, passed_over = _load_pickle(file)
    notes = [f"passed over {', '.join(sorted(passed_over))}: tensors and plain values alone are read"]
    return content, {}, notes if passed_over else []


def _load_safetensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with _opened_safetensors(file) as opened:
        names = opened.keys()  # the opened file is no mapping and cannot be iterated
        return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}


def _metadata(path: Path) -> dict[str, str]:
    """Return the texts in a safetensors file, without its tensors; raises LightningDiTError for any other file."""
    file = _existing_file(path)
    with _opened_safetensors(file) as opened:
        return opened.metadata() or {}


@contextlib.contextmanager
def _opened_safetensors(file: Path) -> Iterator[Any]:
    """Open a safetensors file by its own reader; raises LightningDiTError if it is none."""
    from safetensors import safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except Exception as error:  # safetensors' own, the system's, and torch's for numbers that it does not know
        _raise_what_is_no_damage(error, file)
        raise LightningDiTError(
            f"{file} is cut short or no safetensors file ({first_line(error)})", _fix_of_damage(file)
        ) from error


def _raise_what_is_no_damage(error: Exception, file: Path) -> None:
    """Raise MemoryError or the error itself if memory or permission is missing, and not a part of the file."""
    if is_out_of_memory(error):
        raise MemoryError(f"{file} cannot be opened ({first_line(error)})") from error
    if isinstance(error, PermissionError):
        raise error


def _can_be_mapped(file: Path) -> bool:
    """Return whether tensors of a weights file are read from the disk only when they are used."""
    if file.suffix == ".safetensors" or file.name.endswith(INDEX_ENDING):
        return True
    return zipfile.is_zipfile(file) and not _is_compressed(file)


def _is_compressed(file: Path) -> bool:
    """Return whether a zip file has compressed records, which a mapping would take for numbers.

    Raises:
        zipfile.BadZipFile: it is damaged, or a name is there twice.
        LightningDiTError: it would grow beyond `UNPACKED_RATIO`.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
    if len({record.filename for record in records}) < len(records):
        raise zipfile.BadZipFile("a record is there twice")
    unpacked = sum(record.file_size for record in records)
    if unpacked > UNPACKED_RATIO * file.stat().st_size + UNPACKED_BYTES:
        raise LightningDiTError(
            f"{file} is compressed and would grow to {unpacked:,} bytes, more than {UNPACKED_RATIO} times its size",
            "unpack it, and pack it again without compression",
        )
    return any(
        record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size for record in records
    )


class _Inert:
    """Stands for any object of a pickle; does nothing."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass

    def __setitem__(self, _: object, __: object) -> None:
        pass

    def append(self, _: object) -> None:
        """Ignore an entry."""

    add = append


class _Storages(pickle.Unpickler):
    """Reads the bytes that each storage needs from the pickle of a zip file; nothing of it comes to life."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the name of a type of storages, and `_Inert` for all else."""
        return name if module.startswith("torch") and name.endswith("Storage") else _Inert

    def persistent_load(self, pid: Any) -> _Inert:
        """Note the size of a storage."""
        _, kind, key, _, count = pid
        self.sizes[key] = max(count * STORED_BYTES[kind.removesuffix("Storage")], self.sizes.get(key, 0))
        return _Inert()


def _refuse_short_records(file: Path) -> None:
    """Raise zipfile.BadZipFile if a record has fewer or more bytes than its storage; a mapping would read on."""
    with zipfile.ZipFile(file) as archive:
        folder = archive.namelist()[0].partition("/")[0]
        pickled = archive.getinfo(f"{folder}/data.pkl")
        if not any(record.CRC for record in archive.infolist()):
            del pickled.CRC  # the archive was written without checksums, and zipfile would miss it
        with archive.open(pickled) as stream:
            scan = _Storages(stream)
            scan.load()
        for key, needed in scan.sizes.items():
            held = archive.getinfo(f"{folder}/data/{key}").file_size
            if held != needed:
                raise zipfile.BadZipFile(f"its record {key} has {held} bytes, {needed} expected")


def _load_pickle(file: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the dictionary in a file of `torch.save`, and the names of the types that were passed over."""
    passed_over: set[str] = set()
    try:
        zipped = zipfile.is_zipfile(file)
        mapped = zipped and not _is_compressed(file)
        with _placeholders(passed_over):
            content = torch.load(str(file), map_location="cpu", weights_only=True, mmap=mapped or None)
        if zipped:
            _refuse_short_records(file)
    except LightningDiTError:
        raise
    except pickle.UnpicklingError as error:
        raise LightningDiTError(*_refusal(file, error)) from error
    except Exception as error:  # arbitrary bytes make the unpickler fail in arbitrary ways
        _raise_what_is_no_damage(error, file)
        reason = first_line(error)
        raise LightningDiTError(f"{file} is cut short or no weights file ({reason})", _fix_of_damage(file)) from error
    if not isinstance(content, dict):
        raise LightningDiTError(
            f"{file} holds a {type(content).__name__}; a dictionary of tensors is expected",
            "name a weights file",
        )
    return content, passed_over


def _placeholders(met: set[str]) -> contextlib.AbstractContextManager[object]:
    """Return a context in which torch reads the types in `HARMLESS` as placeholders, and adds their names to `met`.

    Nothing before torch 2.5, which has no such list.
    """
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    stubs = [_placeholder(module, name, met) for module, names in HARMLESS.items() for name in names]
    return torch.serialization.safe_globals(stubs)


def _placeholder(module: str, name: str, met: set[str]) -> type:
    """Return a class under another's name whose instances are `_Inert`, or an OrderedDict for a dictionary."""

    def create(cls: type, *_: object, **__: object) -> object:
        if name in DICTIONARIES:
            return OrderedDict()  # torch fills no other kind
        met.add(f"{module}.{name}")
        return object.__new__(cls)

    content = {"__module__": module, "__qualname__": name, "__new__": create}
    return type(name, (_Inert,), content)


def _refusal(file: Path, error: pickle.UnpicklingError) -> tuple[str, str]:
    """Return message and fix for a pickle that was not opened: it holds foreign types, or it is damaged."""
    fix = "use a file from a source you trust, as safetensors"
    reason = " ".join(str(error).split("WeightsUnpickler error:")[-1].split())
    foreign = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", reason)  # torch 2.4 and newer, or older
    if not foreign:
        return f"{file} is cut short or no weights file ({reason[:160]})", fix
    module, _, name = foreign[1].rpartition(".")
    if name in HARMLESS.get(module, ()):
        return (
            f"{file} holds {foreign[1]} beside its tensors, which torch {torch.__version__} cannot pass over",
            "install torch 2.5 or newer, or save the tensors alone",
        )
    return f"{file} is refused: opening it would run code ({foreign[1]}), and weights are data", fix
