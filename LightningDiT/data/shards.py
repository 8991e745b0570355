"""Latent shards in the published layout: safetensors files of `latents`, `latents_flip` and `labels`.

Shards of levels also have `conditions` (a second label), `augmentation` (what was done to each window) and `windows`
(the row of its split that each latent comes from), where these are known.
"""

from __future__ import annotations

import hashlib
import json
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.data.labels import LATENTS_MANIFEST, natural_key
from LightningDiT.errors import LightningDiTError
from LightningDiT.files import read_json, require_regular, require_unicode

RECORD = "extraction"  # key of a shard's own record, JSON in its metadata
DIGEST = "digest"  # key in that record, and in the rows of the manifest, of a hash of the record and the tensors
EXTRAS = ("conditions", "augmentation", "windows")  # tensors of some shards, a row for each latent
KEPT_BATCHES = 2  # whose memory is reused
FIX = "python -m LightningDiT.extract_features --help"
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def shard_path(folder: str | Path, rank: int, index: int) -> Path:
    """Return the file of shard `index` that process `rank` writes."""
    return Path(folder) / f"latents_rank{rank:02d}_shard{index:03d}.safetensors"


def write_shard(
    path: Path,
    latents: Tensor,
    labels: Tensor,
    flipped: Tensor | None = None,
    metadata: Mapping[str, str] | None = None,
    extras: Mapping[str, Tensor] | None = None,
) -> None:
    """Write latents (N, C, h, w), labels (N,) and, if given, the latents of the mirrored images, and `EXTRAS`."""
    tensors = {"latents": latents, "labels": labels, **(extras or {})}
    if flipped is not None:
        tensors["latents_flip"] = flipped
    save_weights(tensors, path, metadata)


def shard_digest(record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256, in hexadecimal, of a shard's record without its digest, and of its tensors by name."""
    told = {name: value for name, value in record.items() if name != DIGEST}
    found = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().numpy().reshape(-1).view(np.uint8))
    return found.hexdigest()


def shard_files(folder: str | Path) -> list[Path]:
    """Return the shards in `folder` in the order of the numbers in their names, whatever their digits."""
    return sorted(Path(folder).glob("*.safetensors"), key=lambda path: natural_key(path.name))


def iterate_shards(folder: str | Path) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of every shard in `folder`, mapped into memory, in the order of `shard_files`.

    Raises:
        LightningDiTError: the folder is missing or holds no shards, or a file is no shard.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    root = Path(folder)
    if root.is_file():
        raise LightningDiTError(f"{root} is a file, the folder of latent shards was expected", f"name {root.parent}")
    require_unicode(root)
    paths, digests = shard_files(root), manifest_digests(root)
    if not paths:
        raise LightningDiTError(f"no latent shards (*.safetensors) in {root}", FIX)
    for path in paths:
        try:
            require_regular(path)
            tensors = load_file(path)
            if path.name in digests and _told_digest(path) != digests[path.name]:
                raise LightningDiTError(
                    f"latent shard {path} is not the one that {LATENTS_MANIFEST} beside it names",
                    "run the extraction again, which makes that shard again",
                )
        except (SafetensorError, OSError) as error:
            raise LightningDiTError(f"latent shard {path} is cut short or damaged ({error})", FIX) from error
        missing = [name for name in ("latents", "labels") if name not in tensors]
        if missing:
            raise LightningDiTError(f"{path} is no latent shard: {', '.join(missing)} missing", FIX)
        _check_rows(path, tensors)
        yield tensors


def manifest_digests(folder: Path) -> dict[str, str]:
    """Return the digests that the manifest of a finished extraction has, by the names of the files."""
    try:
        rows = read_json(folder / LATENTS_MANIFEST)["shards"]
        return {row["file"]: row[DIGEST] for row in rows if DIGEST in row}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # latents of another program, or of an earlier release; readers of the manifest name what is odd


def _told_digest(path: Path) -> str | None:
    """Return the digest in a shard's own record, which its header holds; None without one."""
    from safetensors import safe_open

    require_regular(path)
    with safe_open(path, framework="pt") as opened:
        try:
            return json.loads((opened.metadata() or {})[RECORD])[DIGEST]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None


def _check_rows(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise LightningDiTError if the tensors of a shard do not belong together."""
    latents, labels = tensors["latents"], tensors["labels"]
    if latents.dim() != 4 or labels.shape != (len(latents),) or labels.is_floating_point():
        raise LightningDiTError(
            f"{path} is no latent shard: latents {list(latents.shape)} and labels {list(labels.shape)}"
            f" ({str(labels.dtype).removeprefix('torch.')}); [N, C, h, w] and [N] whole numbers are expected",
            FIX,
        )
    flipped = tensors.get("latents_flip", latents)
    if flipped.shape != latents.shape:
        raise LightningDiTError(
            f"{path}: latents_flip has the shape {list(flipped.shape)}, latents {list(latents.shape)}", FIX
        )
    if len(labels) and int(labels.min()) < 0:
        raise LightningDiTError(f"{path}: the label {int(labels.min())} is no class; 0 and more are", FIX)
    for name in EXTRAS:
        if name in tensors:
            _check_extra(path, name, tensors[name], len(latents))


def _check_extra(path: Path, name: str, rows: Tensor, count: int) -> None:
    """Raise LightningDiTError unless one of `EXTRAS` has a row for each of `count` latents, of its kind."""
    wide = name == "augmentation"
    kind = rows.is_floating_point() if wide else rows.dtype in WHOLE
    if rows.dim() != 1 + wide or len(rows) != count or not kind:
        raise LightningDiTError(
            f"{path}: {name} is {list(rows.shape)} ({str(rows.dtype).removeprefix('torch.')});"
            f" {'[N, A] fractions' if wide else '[N] whole numbers'} with N = {count} are expected",
            FIX,
        )
    if not wide and count and int(rows.min()) < 0:
        raise LightningDiTError(f"{path}: {name} has {int(rows.min())}; 0 and more are expected", FIX)
    if wide and not bool(rows.isfinite().all()):
        raise LightningDiTError(f"{path}: {name} has values that are NaN or infinite", FIX)


class LatentShards:
    """All shards of a folder, mapped into memory, as one set with random access.

    The files are opened once. A batch is copied row by row from the mapping, by NumPy and without threads: rows of
    32 KB are copied at the speed of memory, and threads would wait for cores that the training uses.

    Attributes:
        labels: (N,) int64.
        shape: (C, h, w) of one latent.
        has_flips: whether every shard has the latents of the mirrored images.
        conditions: (N,) int64, the second label; None unless every shard has it.
        augmentation: (N, A) float32, how each latent was augmented; None unless every shard has it.
        windows: (N,) int64, the row of split.json that each latent comes from; None unless every shard has it.

    Raises:
        LightningDiTError: see `iterate_shards`; or there are no latents, or those of two shapes.
    """

    def __init__(self, folder: str | Path) -> None:
        found = list(zip(iterate_shards(folder), shard_files(folder), strict=True))
        shards = [shard for shard, _ in found if len(shard["labels"])]
        if not shards:
            raise LightningDiTError(f"the latent shards in {folder} hold no latents", FIX)
        shapes = sorted({tuple(shard["latents"].shape[1:]) for shard in shards})
        if len(shapes) > 1:
            raise LightningDiTError(
                f"the shards in {folder} hold latents of the shapes {shapes[0]} and {shapes[1]}", FIX
            )
        self.shape = shapes[0]
        self.labels = torch.cat([shard["labels"].long() for shard in shards])
        self.has_flips = all("latents_flip" in shard for shard in shards)
        conditions, augmentation, windows = (_joined(folder, name, shards) for name in EXTRAS)
        self.conditions = None if conditions is None else conditions.long()
        self.augmentation = None if augmentation is None else augmentation.float()
        self.windows = None if windows is None else windows.long()
        self._starts = np.cumsum([0, *(len(shard["labels"]) for shard in shards)])
        self._files = [path for shard, path in found if len(shard["labels"])]
        names = ("latents", "latents_flip") if self.has_flips else ("latents",)
        self._memory = _Memory()
        self._rows = [[_as_array(shard[name]) for name in names] for shard in shards]

    def __len__(self) -> int:
        return len(self.labels)

    def origin(self, number: int) -> str:
        """Return the row, counted from 0, and the file of a sample, for messages."""
        shard = int(np.searchsorted(self._starts, number, side="right")) - 1
        return f"row {number - self._starts[shard]} of {self._files[shard]}"

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w) float32 and labels (B,) of the samples `indices`.

        Args:
            flips: (B,) bool, which samples are to be mirrored; ignored in sets without flips.
        """
        target = self._memory.take((len(indices), *self.shape))
        numbers = indices.numpy()
        shards = np.searchsorted(self._starts, numbers, side="right") - 1  # (B,)
        rows = numbers - self._starts[shards]
        mirrored = flips.tolist() if flips is not None and self.has_flips else [False] * len(rows)
        for index, (shard, row, flip) in enumerate(zip(shards.tolist(), rows.tolist(), mirrored, strict=True)):
            target[index] = self._rows[shard][flip][row]
        return torch.from_numpy(target), torch.from_numpy(self.labels.numpy()[numbers])


def _joined(folder: str | Path, name: str, shards: Sequence[Mapping[str, Tensor]]) -> Tensor | None:
    """Return one of `EXTRAS` of all shards; None if they have none."""
    there = [shard[name] for shard in shards if name in shard]
    if not there:
        return None
    widths = {rows.shape[1:] for rows in there}
    if len(there) < len(shards) or len(widths) > 1:
        raise LightningDiTError(
            f"{len(there)} of {len(shards)} shards in {folder} have {name}, of {len(widths)} widths", FIX
        )
    return torch.cat(there)


class _Memory:
    """Memory of batches, reused when nobody holds them: the first use of new memory takes longer than the copy.

    A tensor that shares the memory of an array holds that array, and so do the tensor's views.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lent: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return a float32 array whose values are not set."""
        with self._lock:
            free = (whole for whole, holder in self._lent if holder() is None and whole.shape == shape)
            whole = next(free, None)
            if whole is None:
                whole = np.empty(shape, np.float32)
            part = whole[:]
            others = [pair for pair in self._lent if pair[0] is not whole]
            self._lent = [*others, (whole, weakref.ref(part))][-KEPT_BATCHES:]
        return part


def _as_array(latents: Tensor) -> np.ndarray:
    """Return the mapped values; those of bfloat16, which NumPy lacks, as float32 in memory."""
    return (latents.float() if latents.dtype == torch.bfloat16 else latents).numpy()
