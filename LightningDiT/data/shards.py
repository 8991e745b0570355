"""Latent shards in the published layout: safetensors files of `latents`, `latents_flip` and `labels`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from LightningDiT.checkpoint import save_weights
from LightningDiT.errors import LightningDiTError

MEND = "python -m LightningDiT.extract_features --help"


def shard_path(folder: str | Path, rank: int, index: int) -> Path:
    """Return the file of shard `index` that process `rank` writes."""
    return Path(folder) / f"latents_rank{rank:02d}_shard{index:03d}.safetensors"


def write_shard(path: Path, latents: Tensor, labels: Tensor, flipped: Tensor | None = None) -> None:
    """Write latents (N, C, h, w), labels (N,) and, where given, the latents of the mirrored images."""
    tensors = {"latents": latents, "labels": labels}
    if flipped is not None:
        tensors["latents_flip"] = flipped
    save_weights(tensors, path)


def iterate_shards(folder: str | Path) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors of every shard in `folder`, in the order of their names.

    Raises:
        LightningDiTError: the folder is missing or holds no shards, or one is no shard.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    if place.is_file():
        raise LightningDiTError(f"{place} is a file, the folder of latent shards was expected", f"name {place.parent}")
    paths = sorted(place.glob("*.safetensors"))
    if not paths:
        raise LightningDiTError(f"no latent shards (*.safetensors) in {place}", MEND)
    for path in paths:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LightningDiTError(f"latent shard {path} is cut short or damaged ({error})", MEND) from error
        missing = [name for name in ("latents", "labels") if name not in tensors]
        if missing:
            raise LightningDiTError(f"{path} is no latent shard: {', '.join(missing)} missing", MEND)
        yield tensors


class LatentShards:
    """All shards of a folder, mapped into memory, as one set with random access.

    Attributes:
        labels: (N,) int64.
        shape: (C, h, w) of one latent.
    """

    def __init__(self, folder: str | Path) -> None:
        self._shards = list(iterate_shards(folder))
        self.labels = torch.cat([shard["labels"].long() for shard in self._shards])
        self.shape = tuple(self._shards[0]["latents"].shape[1:])
        sizes = torch.tensor([len(shard["labels"]) for shard in self._shards])
        self._ends = sizes.cumsum(0)
        self.has_flips = all("latents_flip" in shard for shard in self._shards)

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Tensor, flips: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return latents (B, C, h, w) float32 and labels (B,) of the samples `indices`.

        Args:
            flips: (B,) bool, where the mirrored image's latent is wanted; ignored in sets without flips.
        """
        shards = torch.searchsorted(self._ends, indices, right=True)  # (B,)
        latents = torch.empty(len(indices), *self.shape)
        flipped = flips if flips is not None and self.has_flips else torch.zeros(len(indices), dtype=torch.bool)
        for number in shards.unique().tolist():
            shard = self._shards[number]
            start = int(self._ends[number]) - len(shard["labels"])
            for name, wanted in (("latents", ~flipped), ("latents_flip", flipped)):
                rows = ((shards == number) & wanted).nonzero().squeeze(1)
                if len(rows):
                    latents[rows] = shard[name][indices[rows] - start].float()
        return latents, self.labels[indices]
